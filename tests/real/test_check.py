"""Checking and verifying against the real client's own opinion, field by field, after every kind of damage.

Where the two differ it is on purpose, and said here: `LOOSER` names what the real client lets pass or fails on.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import pytest
import trio

from grid.client import GridClient, join_grid
from grid.formats.base32 import b2a
from grid.formats.caps import parse_known_cap
from grid.node_directory import NodeDirectory
from grid.operations.check import check_cap
from tests.real.damage import (
    CHK_FIELDS,
    MDMF_FIELDS,
    SDMF_FIELDS,
    Copies,
    Damage,
    deleted,
    field_flipped,
    first,
    moved_together,
    truncated,
)
from tests.real.tahoe_grid import SERVERS, TahoeGrid

pytestmark = pytest.mark.interop

SIZES: Final = {"CHK": 2_200_000, "SDMF": 60_000, "MDMF": 300_000}
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
# (kind, field): the real client's verifier fails with an error of its own, or its answer depends on which server
# answers first, since it checks one signature a version only. Offsets that cannot be are to us an invalid share and to
# it another version.
LOOSER: Final = {
    ("CHK", "block_hashes_offset"),
    *((kind, field) for kind in ("SDMF", "MDMF") for field in ("public_key", "signature")),
    *(("SDMF", field) for field in SDMF_FIELDS if field.startswith("offset_")),
    *(("MDMF", field) for field in MDMF_FIELDS if field.startswith("offset_")),
}
FIELDS: Final = {"CHK": CHK_FIELDS, "SDMF": SDMF_FIELDS, "MDMF": MDMF_FIELDS}


@asynccontextmanager
async def joined(grid: TahoeGrid) -> AsyncIterator[GridClient]:
    async with join_grid(NodeDirectory.open(grid.client.path)) as client:
        assert await client.broker.wait_for_servers(SERVERS, SERVERS_TIMEOUT_S) == SERVERS
        yield client


def copies_of(grid: TahoeGrid, cap: str) -> Copies:
    storage_index = parse_known_cap(cap).storage_index
    assert storage_index is not None
    return grid.share_files(b2a(storage_index))


def restore(grid: TahoeGrid, cap: str, pristine: dict[Path, bytes]) -> None:
    for copies in copies_of(grid, cap).values():
        for _, file in copies:
            file.unlink()
    for file, data in pristine.items():
        file.write_bytes(data)


def saved(grid: TahoeGrid, cap: str) -> dict[Path, bytes]:
    return {file: file.read_bytes() for copies in copies_of(grid, cap).values() for _, file in copies}


def new_file(grid: TahoeGrid, kind: str, seed: str) -> str:
    return grid.put(random.Random(f"{kind} {seed}").randbytes(SIZES[kind]), kind)


def comparable(answer: dict[str, Any]) -> dict[str, Any]:
    """Without what is ours, and with lists that have no order sorted; a share named twice counts once."""
    results = {key: value for key, value in answer["results"].items() if key not in OURS}
    corrupt = sorted({tuple(each) for each in results.get("list-corrupt-shares", ())})
    results |= {"list-corrupt-shares": corrupt, "count-corrupt-shares": len(corrupt)}
    results["servers-responding"] = sorted(results.get("servers-responding", ()))
    summary = answer.get("summary", "").partition(" Corrupt Shares:")[0]
    return {**answer, "results": results, "summary": summary}


def theirs(grid: TahoeGrid, cap: str, verify: bool) -> dict[str, Any]:
    answer: dict[str, Any] = grid.check(cap, verify=verify)
    return answer


async def ours(client: GridClient, cap: str, verify: bool) -> dict[str, Any]:
    return (await check_cap(client.broker, parse_known_cap(cap), verify=verify)).to_json()


async def assert_agree(
    grid: TahoeGrid, client: GridClient, cap: str, what: str, modes: tuple[bool, ...] = (False, True)
) -> None:
    for verify in modes:
        own = comparable(await ours(client, cap, verify))
        real = comparable(await trio.to_thread.run_sync(theirs, grid, cap, verify))
        assert own == real, f"{what}, verify={verify}"


@pytest.mark.parametrize("kind", SIZES)
async def test_shares_lost_moved_and_cut(real_grid: TahoeGrid, kind: str) -> None:
    async with joined(real_grid) as client:
        cap = await trio.to_thread.run_sync(new_file, real_grid, kind, "damaged")
        pristine = saved(real_grid, cap)
        for name, damage in COMMON.items():
            damage(real_grid, copies_of(real_grid, cap))
            await assert_agree(real_grid, client, cap, name)
            restore(real_grid, cap, pristine)


@pytest.mark.parametrize("kind", SIZES)
async def test_each_field_corrupt(real_grid: TahoeGrid, kind: str) -> None:
    async with joined(real_grid) as client:
        cap = await trio.to_thread.run_sync(new_file, real_grid, kind, "fields")
        pristine = saved(real_grid, cap)
        for field in FIELDS[kind]:
            field_flipped(field, 2)(real_grid, copies_of(real_grid, cap))
            if (kind, field) in LOOSER:
                results = (await ours(client, cap, True))["results"]
                assert not results["healthy"] and results["count-shares-good"] == 9, field
            else:
                await assert_agree(real_grid, client, cap, field, (True,))
            restore(real_grid, cap, pristine)


@pytest.mark.parametrize("kind", ["SDMF", "MDMF"])
async def test_several_versions(real_grid: TahoeGrid, kind: str) -> None:
    """Shares of the version before, too few, enough, and more than of the newest; two newest ones."""

    def replace(cap: str, seed: str) -> dict[int, bytes]:
        path = "/uri/" + cap.replace(":", "%3A")
        real_grid.request("PUT", path, random.Random(seed).randbytes(SIZES[kind]))
        return {number: first(copies_of(real_grid, cap), number).read_bytes() for number in range(10)}

    def put_back(cap: str, shares: dict[int, bytes], count: int) -> None:
        for number in range(count):
            first(copies_of(real_grid, cap), number).write_bytes(shares[number])

    async with joined(real_grid) as client:
        cap = await trio.to_thread.run_sync(new_file, real_grid, kind, "versions")
        old = {number: first(copies_of(real_grid, cap), number).read_bytes() for number in range(10)}
        one = await trio.to_thread.run_sync(replace, cap, "one")
        for count in (1, 3, 8):
            put_back(cap, one, 10)
            put_back(cap, old, count)
            await assert_agree(real_grid, client, cap, f"{count} old shares")
            await assert_agree(real_grid, client, str(parse_known_cap(cap).readonly), f"{count} old, read cap")
        put_back(cap, old, 10)
        await trio.to_thread.run_sync(replace, cap, "other")
        put_back(cap, one, 5)
        await assert_agree(real_grid, client, cap, "two heads")


async def test_directories_literals_and_verify_caps(real_grid: TahoeGrid) -> None:
    """The real web API does not check verify caps; ours must say the same as for the cap they come from."""

    def make() -> list[str]:
        file, literal = real_grid.put(random.Random(5).randbytes(1000)), real_grid.put(b"literal")
        children = {"a": ["filenode", {"ro_uri": file}], "l": ["filenode", {"ro_uri": literal}]}
        mutable = [real_grid.put(random.Random(6).randbytes(5000), kind) for kind in ("SDMF", "MDMF")]
        directories = [real_grid.mkdir(), real_grid.mkdir("MDMF"), real_grid.mkdir_immutable(children)]
        for directory in directories[
            :2
        ]:  # with something in them: of an empty MDMF file the real client verifies nothing
            real_grid.put_at(directory, "x", b"some contents")
        return [file, literal, *mutable, *directories, real_grid.mkdir_immutable({})]

    async with joined(real_grid) as client:
        for cap in await trio.to_thread.run_sync(make):
            known = parse_known_cap(cap)
            for number, damage in enumerate((deleted(), deleted(1), field_flipped("share_hashes", 2))):
                if known.storage_index is not None:
                    damage(real_grid, copies_of(real_grid, cap))
                await assert_agree(real_grid, client, cap, f"{known.kind}, damage {number}")
                if known.verifier is not None:
                    for verify in (False, True):
                        assert await ours(client, str(known.verifier), verify) == await ours(client, cap, verify)


async def test_servers_that_are_gone(real_grid: TahoeGrid) -> None:
    with real_grid.without([0, 5]):
        async with join_grid(NodeDirectory.open(real_grid.client.path)) as client:
            assert await client.broker.wait_for_servers(SERVERS - 2, SERVERS_TIMEOUT_S) >= SERVERS - 2
            for kind in SIZES:
                cap = await trio.to_thread.run_sync(new_file, real_grid, kind, "few servers")
                await assert_agree(real_grid, client, cap, kind)
