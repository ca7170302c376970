"""Checking and verifying on servers in memory: every byte of a share, shares lost and doubled, ill servers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import trio.testing

from grid.formats.caps import CHKReadCap, DirectoryCap, LiteralCap, UnknownCap, parse_cap
from grid.formats.chk_share import ShareLayout
from grid.formats.mutable_share import parse_header
from grid.operations.check import QUERY_TIMEOUT_S, check_cap
from grid.operations.check_results import CheckResults
from grid.operations.mutable_encode import encode_sdmf
from grid.operations.verify import READ_BYTES
from tests.grid.operations import mutable_grid
from tests.grid.operations.grid import MemoryGrid, noise
from tests.memory_server import MemoryBroker, MemoryBucketReader
from tests.vectors import name_of


async def uploaded(servers: int = 10, size: int = 30_000, **how: int) -> tuple[MemoryGrid, CHKReadCap]:
    grid = MemoryGrid(servers)
    return grid, await grid.upload(noise(size), **({"segment_size": 6000} | how))


def share_of(grid: MemoryGrid, cap: CHKReadCap, number: int) -> bytearray:
    return grid.holders(cap.storage_index)[number][0].share(cap.storage_index, number)


async def test_a_healthy_file() -> None:
    grid, cap = await uploaded()
    for each in (cap, cap.verifier, DirectoryCap(cap), DirectoryCap(cap.verifier)):
        for verify in (False, True):
            results = await check_cap(grid.broker, each, verify=verify)
            assert (results.healthy, results.recoverable, len(results.good), results.happiness) == (True, True, 10, 10)
            assert results.summary == "Healthy" and set(results.responding) == {s.server_id for s in grid.servers}


@pytest.mark.parametrize("cap", [LiteralCap(b"x"), DirectoryCap(LiteralCap(b"")), UnknownCap(None, "ro.lafs://")])
async def test_nothing_to_check(cap: Any) -> None:
    assert (await check_cap(MemoryBroker(0), cap)).to_json() == {"storage-index": "", "results": {"healthy": True}}


def not_covered(layout: ShareLayout) -> set[int]:
    """Bytes of a CHK share (layout version 1) that no reader looks at: see grid/operations/verify.py."""
    return {*range(4, 12), *range(16, 20), *range(layout.plaintext_hashes, layout.crypttext_hashes)}


async def test_every_byte_of_an_immutable_share() -> None:
    grid, cap = await uploaded(1, 100, k=1, happy=1, n=1, segment_size=40)
    share = share_of(grid, cap, 0)
    layout = ShareLayout.parse(share)
    ueb_size_field = range(layout.ueb, layout.ueb + 4)  # a longer one than there is reads the same UEB
    for position in range(len(share)):
        share[position] ^= 1 << position % 8
        results = await check_cap(grid.broker, cap, verify=True)
        share[position] ^= 1 << position % 8
        if position not in ueb_size_field:
            assert results.healthy == (position in not_covered(layout)), position
            # of a layout we do not know is not corrupt
            assert len(results.corrupt) + len(results.incompatible) == (not results.healthy)


@pytest.mark.parametrize("format", ["sdmf", "mdmf"])
async def test_every_byte_of_a_mutable_share(format: str) -> None:
    """With the write cap, which proves the private key as well. A changed offset may make it another version."""
    wanted = [v for v in mutable_grid.files() if v["format"].lower() == format and mutable_grid.contents_of(v)]
    vector = min(wanted, key=lambda v: len(mutable_grid.contents_of(v)))
    broker = MemoryBroker(1)
    shares = mutable_grid.shares_of(vector)
    server = mutable_grid.permuted(broker)[0]
    for number in range(vector["k"]):
        mutable_grid.put(server, number, shares[number])
    share = server.share(mutable_grid.storage_index(), 0)
    offsets = parse_header(share).offsets
    gap = range(sum(offsets.public_key), offsets.share_data[0]) if format == "mdmf" else range(0)
    for position in range(len(share)):
        opaque = any(start <= position < start + length for start, length in (offsets.public_key, offsets.signature))
        if position in gap or (opaque and position % 8):
            continue
        share[position] ^= 0x10
        results = await check_cap(broker, mutable_grid.write_cap(), verify=True)
        share[position] ^= 0x10
        assert len(results.good) < vector["k"] and not results.recoverable, position
        wrong = results.wrong_shares > 0 or results.unrecoverable_versions > 1
        assert results.corrupt or results.invalid or results.incompatible or wrong, position


@pytest.mark.parametrize("vector", mutable_grid.files(), ids=name_of)
async def test_what_tahoe_wrote_is_whole(vector: dict[str, Any]) -> None:
    broker = MemoryBroker(vector["n"])
    mutable_grid.place(broker, mutable_grid.shares_of(vector))
    for cap in (mutable_grid.write_cap(), mutable_grid.write_cap().readonly, mutable_grid.write_cap().verifier):
        results = await check_cap(broker, cap, verify=True)
        assert results.healthy and not results.corrupt and not results.invalid
        assert (results.needed_shares, results.total_shares) == (vector["k"], vector["n"])


async def test_truncated_at_every_length() -> None:
    grid, cap = await uploaded(1, 300, k=1, happy=1, n=1, segment_size=200)
    share = share_of(grid, cap, 0)
    whole = bytes(share)
    for length in range(len(whole)):
        share[:] = whole[:length]
        results = await check_cap(grid.broker, cap, verify=True)
        assert not results.good and len(results.corrupt) == 1, length


async def test_corrupt_shares_are_reported_once() -> None:
    grid, cap = await uploaded()
    (holder,) = grid.holders(cap.storage_index)[4]
    holder.corrupt(cap.storage_index, 4, 200)
    for _ in range(2):
        results = await check_cap(grid.broker, cap.verifier, verify=True)
        assert [(each.server_id, each.share_number) for each in results.corrupt] == [(holder.server_id, 4)]
        assert "block 0" in results.corrupt[0].reason
    assert [(kind, number) for kind, _, number, _ in holder.advisories] == [("immutable", 4)]
    assert (await check_cap(grid.broker, cap)).healthy, "only verifying reads shares"


async def test_deleted_doubled_and_strange_shares() -> None:
    grid, cap = await uploaded()
    holders = grid.holders(cap.storage_index)
    (lost,), (one,), (two,) = holders[0], holders[1], holders[2]
    del lost.immutable[cap.storage_index]
    two.immutable[cap.storage_index][1] = bytearray(share_of(grid, cap, 1))
    two.immutable[cap.storage_index][200] = bytearray(b"no such share")
    results = await check_cap(grid.broker, cap, verify=True)
    assert results.summary == "Not Healthy: 9 shares (enc 3-of-10)"
    assert results.good[1] == {one.server_id, two.server_id}
    assert (len(results.good_hosts), results.happiness) == (9, 9) and not results.corrupt
    one.share(cap.storage_index, 1)[3] = 9
    results = await check_cap(grid.broker, cap, verify=True)
    assert results.incompatible == ((one.server_id, 1),) and results.good[1] == {two.server_id} and not results.corrupt


async def test_too_few_shares() -> None:
    grid, cap = await uploaded()
    for number in range(8):
        del grid.holders(cap.storage_index)[number][0].immutable[cap.storage_index]
    results = await check_cap(grid.broker, cap)
    assert not results.recoverable and (results.recoverable_versions, results.unrecoverable_versions) == (0, 1)


async def test_ill_servers(autojump_clock: trio.testing.MockClock) -> None:
    """One hangs, one is lost in the middle: their shares do not count, and are not corrupt. Late again is cheap."""
    grid, cap = await uploaded()
    hung, lost = grid.permuted(cap.storage_index)[:2]
    hung.pause()
    lost.fail_on.add("read")
    results = await check_cap(grid.broker, cap, verify=True)
    assert len(results.good) == 8 and not results.corrupt and results.silent == (hung.server_id,)
    assert hung.server_id not in results.responding and lost.server_id in results.responding
    began = trio.current_time()
    await check_cap(grid.broker, cap)
    assert trio.current_time() - began < QUERY_TIMEOUT_S / 2


async def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """However large blocks are, no more than a piece of one is asked for."""
    asked: list[int] = []
    read = MemoryBucketReader.read

    async def noting(self: MemoryBucketReader, offset: int, length: int) -> bytes:
        asked.append(length)
        return await read(self, offset, length)

    grid, cap = await uploaded(1, 3 * READ_BYTES, k=1, happy=1, n=1, segment_size=3 * READ_BYTES)
    monkeypatch.setattr(MemoryBucketReader, "read", noting)
    assert (await check_cap(grid.broker, cap, verify=True)).healthy
    assert sum(asked) >= 3 * READ_BYTES and max(asked) == READ_BYTES


# --- mutable files


def versions(*contents: tuple[int, bytes]) -> Iterator[dict[int, bytes]]:
    for seqnum, data in contents:
        yield dict(encode_sdmf(data, mutable_grid.keys(), seqnum=seqnum, salt=bytes(16), k=3, n=10).shares)


async def check_slot(broker: MemoryBroker, *, verify: bool = False) -> CheckResults:
    return await check_cap(broker, mutable_grid.write_cap().verifier, verify=verify)


async def test_shares_of_an_older_version() -> None:
    broker = MemoryBroker(10)
    old, new = versions((1, b"old"), (2, b"new"))
    mutable_grid.place(broker, new)
    servers = mutable_grid.permuted(broker)
    mutable_grid.put(servers[0], 0, old[0])
    results = await check_slot(broker)
    assert (results.healthy, results.recoverable, results.wrong_shares, len(results.good)) == (False, True, 1, 9)
    assert results.summary == "Unhealthy: some versions are unrecoverable 9 shares (enc 3-of-10)"
    for number in (1, 2):
        mutable_grid.put(servers[number], number, old[number])
    results = await check_slot(broker)
    assert results.summary == "Unhealthy: multiple versions are recoverable 7 shares (enc 3-of-10)"
    assert sorted(share_id.partition("-")[0] for share_id in results.sharemap) == ["seq1"] * 3 + ["seq2"] * 7


async def test_nothing_left_of_a_mutable_file() -> None:
    results = await check_slot(MemoryBroker(5))
    assert not results.recoverable and (results.needed_shares, results.total_shares) == (3, 10)
    assert results.summary == "Unhealthy: no versions are recoverable"


async def test_invalid_and_corrupt_shares_of_a_mutable_file() -> None:
    broker = MemoryBroker(10)
    (shares,) = versions((1, noise(5000)))
    mutable_grid.place(broker, shares)
    servers = mutable_grid.permuted(broker)
    servers[0].corrupt(mutable_grid.storage_index(), 0, 8)
    servers[1].corrupt(mutable_grid.storage_index(), 1, 1000)
    seen = await check_slot(broker)
    assert (len(seen.good), len(seen.invalid), len(seen.corrupt)) == (9, 1, 0)
    seen = await check_slot(broker, verify=True)
    assert (len(seen.good), len(seen.invalid), len(seen.corrupt)) == (8, 1, 1)
    assert f"Corrupt Shares: {servers[1].server_id[:8]}-sh1" in seen.summary
    assert [number for server in servers for _, _, number, _ in server.advisories] == [0, 1]
    assert json.dumps(seen.to_json())
    assert parse_cap(str(mutable_grid.write_cap().verifier)).storage_index == seen.storage_index
