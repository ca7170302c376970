"""Checking and verifying against the real client's own opinion, field by field, after every kind of damage.

Where the two differ it is on purpose, and said here: `LOOSER` names what the real client lets pass or fails on.

A damage each needs a file each: the shares of one, put under other storage indexes. The real client checks all of them
in one call, as what is in a directory.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest
import trio
from attrs import evolve

from grid.client import GridClient, join_grid
from grid.formats.caps import parse_known_cap
from grid.formats.segments import MAX_SEGMENT_BYTES
from grid.interfaces import EncodingParameters
from grid.node_directory import NodeDirectory
from grid.operations.check import check_cap
from grid.operations.uploadables import DataUploadable
from tests.real.damage import (
    CHK_FIELDS,
    MDMF_FIELDS,
    SDMF_FIELDS,
    Copies,
    Damage,
    another,
    copies_of,
    deleted,
    field_flipped,
    first,
    moved_together,
    truncated,
)
from tests.real.tahoe_grid import SERVERS, TahoeGrid

pytestmark = pytest.mark.interop

SIZES: Final = {"CHK": 60_000, "SDMF": 60_000, "MDMF": 140_000}  # segments: 3, 1, 2
CHK_SEGMENT_BYTES: Final = 24_999  # a multiple of k
LARGE_CHK_BYTES: Final = 2 * MAX_SEGMENT_BYTES + 100_000
SPARE: Final = 7  # n - k
PRIVATE_KEY_BYTES: Final = 1216  # at the end of an SDMF share
SERVERS_TIMEOUT_S: Final = 60

# Our own keys, and the one list whose order nobody promises.
OURS: Final = {"list-invalid-shares", "list-incompatible-shares", "servers-silent"}

COMMON: Final[dict[str, Damage]] = {
    "nothing": deleted(),
    "one deleted": deleted(3),
    "k left": deleted(*range(7)),
    "k-1 left": deleted(*range(8)),
    "none left": deleted(*range(10)),
    "one twice": moved_together([3], 4, keep=True),
    "four on one server": moved_together([1, 2, 3], 4, keep=False),
    "last byte missing": truncated(1, 2),
    "end missing": truncated(400, 2),
    "most missing": truncated(19_000, 2),
    "unknown version, too many": field_flipped("version", *range(8)),
    "data, too many": field_flipped("data", *range(8)),
}
FIELDS: Final = {"CHK": CHK_FIELDS, "SDMF": SDMF_FIELDS, "MDMF": MDMF_FIELDS}
# (kind, damage): the real client's verifier fails with an error of its own, or its answer depends on which server
# answers first, since it checks one signature a version only. Offsets that cannot be are to us an invalid share and to
# it another version. Where an SDMF share ends too early, within the private key, it notices only by a write cap.
LOOSER: Final = {
    *(("SDMF", name) for name in ("last byte missing", "end missing")),
    ("CHK", "block_hashes_offset"),
    *((kind, field) for kind in ("SDMF", "MDMF") for field in ("public_key", "signature")),
    *(("SDMF", field) for field in SDMF_FIELDS if field.startswith("offset_")),
    *(("MDMF", field) for field in MDMF_FIELDS if field.startswith("offset_")),
}


class SmallSegments(DataUploadable):
    async def get_all_encoding_parameters(self) -> EncodingParameters:
        return evolve(await super().get_all_encoding_parameters(), segment_size=CHK_SEGMENT_BYTES)


@asynccontextmanager
async def joined(grid: TahoeGrid) -> AsyncIterator[GridClient]:
    async with join_grid(NodeDirectory.open(grid.client.path)) as client:
        assert await client.broker.wait_for_servers(SERVERS, SERVERS_TIMEOUT_S) == SERVERS
        yield client


def noise(kind: str, seed: str) -> bytes:
    return random.Random(f"{kind} {seed}").randbytes(SIZES[kind])


async def new_file(grid: TahoeGrid, client: GridClient, kind: str, seed: str) -> str:
    """By the real client; an immutable one by ours, which can be told to make several segments of so little."""
    if kind != "CHK":
        return await trio.to_thread.run_sync(grid.put, noise(kind, seed), kind)
    return (await client.upload(SmallSegments(noise(kind, seed), client.node.convergence))).uri


def saved(grid: TahoeGrid, cap: str) -> dict[Path, bytes]:
    return {file: file.read_bytes() for copies in copies_of(grid, cap).values() for _, file in copies}


def restore(grid: TahoeGrid, cap: str, pristine: dict[Path, bytes]) -> None:
    for copies in copies_of(grid, cap).values():
        for _, file in copies:
            file.unlink()
    for file, data in pristine.items():
        file.write_bytes(data)


def damaged(grid: TahoeGrid, cap: str, name: str, damage: Damage) -> str:
    other = another(grid, cap, name)
    damage(grid, copies_of(grid, other))
    return other


def comparable(answer: dict[str, Any]) -> dict[str, Any]:
    """Without what is ours, and with lists that have no order sorted; a share named twice counts once."""
    results = {key: value for key, value in answer["results"].items() if key not in OURS}
    corrupt = sorted({tuple(each) for each in results.get("list-corrupt-shares", ())})
    results |= {"list-corrupt-shares": corrupt, "count-corrupt-shares": len(corrupt)}
    results["servers-responding"] = sorted(results.get("servers-responding", ()))
    summary = answer.get("summary", "").partition(" Corrupt Shares:")[0]
    return {**answer, "results": results, "summary": summary}


async def ours(client: GridClient, cap: str, verify: bool) -> dict[str, Any]:
    return (await check_cap(client.broker, parse_known_cap(cap), verify=verify)).to_json()


async def theirs(grid: TahoeGrid, cap: str, verify: bool) -> dict[str, Any]:
    answer: dict[str, Any] = await trio.to_thread.run_sync(partial(grid.check, cap, verify=verify))
    return answer


async def assert_agree(
    grid: TahoeGrid, client: GridClient, cap: str, what: str, modes: tuple[bool, ...] = (False, True)
) -> None:
    for verify in modes:
        own, real = comparable(await ours(client, cap, verify)), comparable(await theirs(grid, cap, verify))
        assert own == real, f"{what}, verify={verify}"


async def assert_agree_on_all(
    grid: TahoeGrid, client: GridClient, caps: Mapping[str, str], modes: tuple[bool, ...] = (False, True)
) -> None:
    """`caps`: {what was done to it: read cap of a file}."""

    def link() -> str:
        directory = grid.mkdir()
        grid.set_children(directory, {name: ["filenode", {"ro_uri": cap}] for name, cap in caps.items()})
        return directory

    directory = await trio.to_thread.run_sync(link)
    for verify in modes:
        own: dict[str, dict[str, Any]] = {}

        async def check(name: str, cap: str, verify: bool = verify, own: dict[str, dict[str, Any]] = own) -> None:
            own[name] = comparable(await ours(client, cap, verify))

        async with trio.open_nursery() as nursery:
            for name, cap in caps.items():
                nursery.start_soon(check, name, cap)
        units = await trio.to_thread.run_sync(partial(grid.deep_check, directory, verify=verify))
        real = {unit["path"][0]: comparable(unit["check-results"]) for unit in units[1:-1]}
        assert own.keys() == real.keys()
        for name in caps:
            assert own[name] == real[name], f"{name}, verify={verify}"


@pytest.mark.parametrize("kind", SIZES)
async def test_shares_lost_moved_and_cut_and_each_field_corrupt(real_grid: TahoeGrid, kind: str) -> None:
    async with joined(real_grid) as client:
        cap = await new_file(real_grid, client, kind, "damaged")
        caps = {name: damaged(real_grid, cap, name, damage) for name, damage in COMMON.items()}
        exact = {name: cap for name, cap in caps.items() if (kind, name) not in LOOSER}
        await assert_agree_on_all(real_grid, client, exact)
        # as many fields at once as shares may be bad; both sides name each of these
        fields = [field for field in FIELDS[kind] if (kind, field) not in LOOSER]
        groups = [fields[at : at + SPARE] for at in range(0, len(fields), SPARE)]
        corrupt = {"; ".join(group): another(real_grid, cap, group[0]) for group in groups}
        for group, other in zip(groups, corrupt.values(), strict=True):
            for number, field in enumerate(group):
                field_flipped(field, number)(real_grid, copies_of(real_grid, other))
        await assert_agree_on_all(real_grid, client, corrupt, (True,))
        for name in [name for looser_kind, name in LOOSER if looser_kind == kind]:
            other = caps[name] if name in caps else damaged(real_grid, cap, name, field_flipped(name, 2))
            results = (await ours(client, other, True))["results"]
            assert not results["healthy"] and results["count-shares-good"] == 9, name


@pytest.mark.parametrize("kind", ["SDMF", "MDMF"])
async def test_mutable_files_by_the_write_cap(real_grid: TahoeGrid, kind: str) -> None:
    """That proves the private key as well."""
    damages = {name: COMMON[name] for name in ("nothing", "one deleted", "last byte missing", "end missing")}
    damages |= {name: field_flipped(name, 2) for name in ("private_key", "data", "seqnum")}
    async with joined(real_grid) as client:
        cap = await new_file(real_grid, client, kind, "write cap")
        pristine = saved(real_grid, cap)
        for name, damage in damages.items():
            damage(real_grid, copies_of(real_grid, cap))
            await assert_agree(real_grid, client, cap, name, (True,) if name in FIELDS[kind] else (False, True))
            restore(real_grid, cap, pristine)


async def test_a_large_file_made_by_the_real_client(real_grid: TahoeGrid) -> None:
    async with joined(real_grid) as client:
        data = random.Random("large").randbytes(LARGE_CHK_BYTES)
        cap = await trio.to_thread.run_sync(real_grid.put, data)
        await assert_agree(real_grid, client, cap, "nothing")
        field_flipped("crypttext_padding", 4)(real_grid, copies_of(real_grid, cap))
        await assert_agree(real_grid, client, cap, "a hash of the ciphertext tree", (True,))


@pytest.mark.parametrize("kind", ["SDMF", "MDMF"])
async def test_several_versions(real_grid: TahoeGrid, tmp_path: Path, kind: str) -> None:
    """Shares of the version before, too few, enough, and more than of the newest; two newest ones."""

    def publish(cap: str, seed: str) -> None:
        real_grid.request("PUT", "/uri/" + cap.replace(":", "%3A"), noise(kind, seed))

    def copied(cap: str, name: str) -> dict[int, Path]:
        (tmp_path / name).mkdir()
        copies = copies_of(real_grid, cap)
        return {n: Path(shutil.copy(first(copies, n), tmp_path / name / str(n))) for n in range(10)}

    def put_back(cap: str, shares: Mapping[int, Path]) -> None:
        for number, share in shares.items():
            shutil.copy(share, first(copies_of(real_grid, cap), number))

    async with joined(real_grid) as client:
        cap = await new_file(real_grid, client, kind, "versions")
        old = copied(cap, "old")
        await trio.to_thread.run_sync(publish, cap, "one")
        one = copied(cap, "one")
        put_back(cap, old)
        await trio.to_thread.run_sync(publish, cap, "other")
        other = copied(cap, "other")
        mixtures = {
            f"{count} old shares": {number: (old if number < count else one)[number] for number in range(10)}
            for count in (1, 3, 8)
        }
        mixtures["two heads"] = {number: (one if number < 5 else other)[number] for number in range(10)}
        caps = {name: another(real_grid, cap, name, shares) for name, shares in mixtures.items()}
        await assert_agree_on_all(real_grid, client, caps)
        for name in ("3 old shares", "two heads"):
            put_back(cap, mixtures[name])
            await assert_agree(real_grid, client, cap, f"{name}, write cap")


def with_old_version(grid: TahoeGrid, cap: str) -> Damage:
    """Change the directory; the damage puts some shares back as they were."""
    before = {number: first(copies, number).read_bytes() for copies in [copies_of(grid, cap)] for number in copies}
    grid.put_at(cap, "more", b"and more")

    def do(grid: TahoeGrid, copies: Copies) -> None:
        for number in (2, 7):
            first(copies, number).write_bytes(before[number])

    return do


DIRECTORY_DAMAGES: Final[dict[str, Damage]] = {
    "nothing": deleted(),
    "one deleted": deleted(1),
    "one corrupt": field_flipped("share_hashes", 2),
    "end missing": truncated(100, 5),
    "one twice": moved_together([3], 4, keep=True),
    "too few left": deleted(*range(8)),
}


async def test_directories_literals_and_verify_caps(real_grid: TahoeGrid) -> None:
    """The real web API does not check verify caps; ours must say the same as for the cap they come from."""

    def make() -> list[str]:
        file, literal = real_grid.put(random.Random(5).randbytes(1000)), real_grid.put(b"literal")
        children = {"a": ["filenode", {"ro_uri": file}], "l": ["filenode", {"ro_uri": literal}]}
        directories = [real_grid.mkdir(), real_grid.mkdir("MDMF"), real_grid.mkdir_immutable(children)]
        for directory in directories[:2]:  # not empty: of an empty MDMF file the real client verifies nothing
            real_grid.put_at(directory, "x", b"some contents")
        return [literal, *directories, real_grid.mkdir_immutable({})]

    async def look(cap: str) -> None:
        known = parse_known_cap(cap)
        damages = DIRECTORY_DAMAGES if known.storage_index is not None else {"nothing": deleted()}
        if known.is_mutable:
            damages = {"old shares": await trio.to_thread.run_sync(with_old_version, real_grid, cap)} | damages
        pristine = saved(real_grid, cap) if known.storage_index is not None else {}
        for name, damage in damages.items():
            if pristine:
                damage(real_grid, copies_of(real_grid, cap))
            if name == "end missing" and known.kind == "dir-sdmf":  # with the block, see LOOSER
                truncated(PRIVATE_KEY_BYTES, 5)(real_grid, copies_of(real_grid, cap))
            for each in {cap, str(known.readonly)} if name == "one corrupt" else {cap}:
                await assert_agree(real_grid, client, each, f"{known.kind}, {name}")
            if known.verifier is not None:
                for verify in (False, True):
                    assert await ours(client, str(known.verifier), verify) == await ours(client, cap, verify)
            if pristine:
                restore(real_grid, cap, pristine)

    async with joined(real_grid) as client:
        caps = await trio.to_thread.run_sync(make)
        async with trio.open_nursery() as nursery:
            for cap in caps:
                nursery.start_soon(look, cap)


async def test_servers_that_are_gone(real_grid: TahoeGrid) -> None:
    with real_grid.without([0, 5]):
        async with join_grid(NodeDirectory.open(real_grid.client.path)) as client:
            assert await client.broker.wait_for_servers(SERVERS - 2, SERVERS_TIMEOUT_S) >= SERVERS - 2
            for kind in SIZES:
                cap = await new_file(real_grid, client, kind, "few servers")
                await assert_agree(real_grid, client, cap, kind)
