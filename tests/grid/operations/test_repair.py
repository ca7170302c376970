"""Repair of immutable files: what is missing is made again byte for byte, once, where it spreads best."""

from __future__ import annotations

from typing import Any

import pytest
import trio.testing
from attrs import evolve

from grid.errors import InconsistentEncodingError
from grid.formats import hashutil
from grid.formats.caps import CHKReadCap
from grid.formats.chk_share import ShareLayout
from grid.formats.netstring import netstring
from grid.formats.ueb import URIExtension
from grid.operations.check import check_immutable
from grid.operations.check_results import RepairResults
from grid.operations.happiness import happiness, place_missing
from grid.operations.leases import Secrets
from grid.operations.repair import repair_immutable
from tests.grid.operations.grid import MemoryGrid, noise
from tests.memory_server import MemoryServer

CARETAKER = Secrets(b"another node's secret".ljust(32))


async def uploaded(servers: int = 10, size: int = 30_000, **how: int) -> tuple[MemoryGrid, CHKReadCap]:
    grid = MemoryGrid(servers)
    return grid, await grid.upload(noise(size), **({"segment_size": 6000} | how))


async def repair(grid: MemoryGrid, cap: CHKReadCap, *, verify: bool = False) -> RepairResults:
    """By somebody who holds nothing but the verify cap."""
    before = await check_immutable(grid.broker, cap.verifier, verify=verify)
    results = await repair_immutable(grid.broker, CARETAKER, cap.verifier, before)
    grid.assert_nothing_left()
    return results


def lose(grid: MemoryGrid, cap: CHKReadCap, *numbers: int) -> None:
    for number in numbers:
        for server in grid.holders(cap.storage_index)[number]:
            del server.immutable[cap.storage_index][number]


async def assert_whole(grid: MemoryGrid, cap: CHKReadCap) -> None:
    results = await check_immutable(grid.broker, cap.verifier, verify=True)
    assert results.healthy and not results.corrupt


@pytest.mark.parametrize("lost", [(3,), (0, 1, 2), tuple(range(7)), (2, 9)])
async def test_only_what_is_missing_is_made(lost: tuple[int, ...]) -> None:
    grid, cap = await uploaded()
    original = grid.shares(cap.storage_index)
    lose(grid, cap, *lost)
    sent = sum(server.bytes_written for server in grid.servers)
    results = await repair(grid, cap)
    assert results.attempted and results.successful and not results.reason
    assert grid.shares(cap.storage_index) == original
    assert [len(holders) for holders in grid.holders(cap.storage_index).values()] == [1] * 10
    sent = sum(server.bytes_written for server in grid.servers) - sent
    assert sent == sum(len(original[number]) for number in lost)
    assert results.after.happiness == 10, "each went to a server of its own"
    await assert_whole(grid, cap)


async def test_healthy_and_hopeless_files_are_left_alone() -> None:
    grid, cap = await uploaded()
    assert not (await repair(grid, cap)).attempted
    lose(grid, cap, *range(8))
    results = await repair(grid, cap)
    assert not results.attempted and results.reason and not results.after.recoverable


async def test_a_corrupt_share_is_made_anew_elsewhere() -> None:
    grid, cap = await uploaded(11)
    original = grid.shares(cap.storage_index)
    (holder,) = grid.holders(cap.storage_index)[5]
    holder.corrupt(cap.storage_index, 5, 300)
    assert not (await repair(grid, cap)).attempted, "nobody has looked at it"
    results = await repair(grid, cap, verify=True)
    assert results.successful
    good = [server for server in grid.holders(cap.storage_index)[5] if server is not holder]
    assert [bytes(server.share(cap.storage_index, 5)) for server in good] == [original[5]]
    assert len(holder.advisories) == 1
    assert not (await repair(grid, cap, verify=True)).attempted


async def test_more_shares_than_servers() -> None:
    grid, cap = await uploaded(4, happy=2)
    lose(grid, cap, 0, 1, 2, 3, 4)
    results = await repair(grid, cap)
    assert results.successful and results.after.happiness == 4
    loads = [len(server.immutable[cap.storage_index]) for server in grid.servers]
    assert max(loads) - min(loads) <= 1


@pytest.mark.parametrize("fault", ["full", "readonly", "forbidden", "allocate_buckets", "write", "close"])
async def test_servers_that_take_nothing(fault: str) -> None:
    """Two of the eleven take nothing; the others do, as far as that is known before shares are on their way."""
    grid, cap = await uploaded(11)
    original = grid.shares(cap.storage_index)
    empty = [server for server in grid.servers if not server.immutable.get(cap.storage_index)]
    holder = grid.holders(cap.storage_index)[2][0]
    lose(grid, cap, 2, 6)
    for server in (*empty, holder):
        if fault == "forbidden":
            grid.broker.forbidden.add(server.server_id)
        elif fault in ("full", "readonly"):
            setattr(server, fault, True)
        else:
            server.fail_on.add(fault)
    results = await repair(grid, cap)
    lost_on_the_way = fault in ("write", "close")
    assert results.successful == (not lost_on_the_way) and bool(results.reason) == lost_on_the_way
    for number, share in grid.shares(cap.storage_index).items():
        assert share == original[number]
    if lost_on_the_way:
        for server in (*empty, holder):
            server.fail_on.clear()
        assert (await repair(grid, cap)).successful
    await assert_whole(grid, cap)


async def test_a_silent_server_is_not_given_anything(autojump_clock: trio.testing.MockClock) -> None:
    grid, cap = await uploaded()
    lose(grid, cap, 4)
    silent = grid.holders(cap.storage_index)[7][0]
    silent.pause()
    results = await repair(grid, cap)
    assert results.successful, "its share counts as lost"
    assert silent.calls["allocate_buckets"] == 1, "of the upload"


def with_another_ueb(grid: MemoryGrid, cap: CHKReadCap, ueb: bytes) -> CHKReadCap:
    """The same file as an uploader would have left it that writes this UEB."""
    for server in grid.servers:
        for share in server.immutable.get(cap.storage_index, {}).values():
            layout = ShareLayout.parse(share)
            share[layout.ueb :] = layout.pack_ueb_size(len(ueb)) + ueb
    return evolve(cap, ueb_hash=hashutil.uri_extension_hash(ueb))


async def ueb_of(grid: MemoryGrid, cap: CHKReadCap) -> URIExtension:
    download = grid.download(cap)
    await download.get_segment_size()
    assert download.file.ueb is not None
    return download.file.ueb


async def test_an_old_ueb_is_kept() -> None:
    """Old uploaders wrote hashes of the plaintext as well, which nobody can compute from the ciphertext."""
    grid, cap = await uploaded()
    extra = b"plaintext_hash:" + netstring(b"p" * 32) + b"plaintext_root_hash:" + netstring(b"r" * 32)
    cap = with_another_ueb(grid, cap, (await ueb_of(grid, cap)).pack() + extra)
    original = grid.shares(cap.storage_index)
    lose(grid, cap, 1, 8)
    assert (await repair(grid, cap)).successful
    assert grid.shares(cap.storage_index) == original


async def test_what_encodes_to_something_else_is_not_repaired() -> None:
    """A broken uploader's file: its shares verify, but no share made from them would."""
    grid, cap = await uploaded()
    wrong = evolve(await ueb_of(grid, cap), crypttext_hash=b"w" * 32)
    cap = with_another_ueb(grid, cap, wrong.pack())
    lose(grid, cap, 1, 8)
    results = await repair(grid, cap)
    assert results.attempted and not results.successful and "uploader" in results.reason
    assert set(grid.shares(cap.storage_index)) == set(range(10)) - {1, 8}
    assert issubclass(InconsistentEncodingError, Exception)


@pytest.mark.parametrize("stage", ["read", "write"])
async def test_cancelled(stage: str, autojump_clock: trio.testing.MockClock) -> None:
    grid, cap = await uploaded()
    before_loss = grid.shares(cap.storage_index)
    lose(grid, cap, 0, 5)

    def hang(server: MemoryServer) -> None:
        server.hang_on.add(stage)

    for server in grid.servers:
        hang(server)
    before = await check_immutable(grid.broker, cap.verifier)
    with trio.move_on_after(5):
        await repair_immutable(grid.broker, CARETAKER, cap.verifier, before)
    grid.assert_nothing_left()
    for number, share in grid.shares(cap.storage_index).items():
        assert share == before_loss[number]


def placed(existing: dict[str, set[int]], missing: list[int], barred: set[tuple[str, int]]) -> dict[int, str]:
    return place_missing(["a", "b", "c", "d"], missing, existing, barred)


@pytest.mark.parametrize(
    ("existing", "missing", "barred", "expected"),
    [
        ({}, [0, 1], set(), {0: "a", 1: "b"}),
        ({"a": {0, 1, 2}}, [3, 4], set(), {3: "b", 4: "c"}),
        ({"a": {0, 1}, "b": {0}}, [2], set(), {2: "c"}),
        ({"a": {0}, "x": {1}}, [2], {("b", 2)}, {2: "c"}),
        ({}, [7], {(server, 7) for server in "abcd"}, {}),
    ],
)
def test_placement(existing: Any, missing: list[int], barred: Any, expected: dict[int, str]) -> None:
    assert placed(existing, missing, barred) == expected
    sharemap: dict[int, set[str]] = {number: {server} for number, server in placed(existing, missing, barred).items()}
    assert happiness(sharemap) == len(sharemap)
