"""The block cache and read-ahead: one fetch a segment, whoever comes and goes; bounded; never wrong bytes."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import wait_all_tasks_blocked

from cache.blocks import PREFETCH_BYTES_MAX, BlockCache
from cache.disk_tier import QUEUE_BYTES_MAX, BlockName, DiskTier
from cache.readahead import START_SEGMENTS, WINDOW_BYTES_MAX, ReadAhead
from cache.snapshots import SnapshotContents
from grid.crypto import aes_ctr
from grid.errors import NotEnoughSharesError
from grid.formats.caps import CHKReadCap, LiteralCap
from grid.nodes.immutable import cache_secret_of

KEY = bytes(range(16))
CAP = LiteralCap(b"")  # of no consequence


class Snapshot:
    """A file whose segments come when the test lets them."""

    version = b""
    cache_secret = bytes(32)

    def __init__(self, data: bytes, segment_size: int, name: bytes = b"one") -> None:
        self.storage_index = name
        self.size = len(data)
        self._ciphertext = aes_ctr(KEY, data)
        self._segment_size = segment_size
        self.fetched: list[int] = []
        self.cancelled: list[int] = []
        self.gate = trio.Event()
        self.gate.set()
        self.error: Exception | None = None

    def remember_segment_size(self, segment_size: int) -> None:
        pass

    async def get_segment_size(self) -> int:
        await trio.lowlevel.checkpoint()
        return self._segment_size

    async def get_segment(self, number: int) -> bytes:
        self.fetched.append(number)
        try:
            await trio.lowlevel.checkpoint()
            await self.gate.wait()
        except trio.Cancelled:
            self.cancelled.append(number)
            raise
        if self.error is not None:
            raise self.error
        return self._ciphertext[number * self._segment_size :][: self._segment_size]

    def decrypt(self, segment: int, offset: int, data: bytes | memoryview) -> bytes:
        return aes_ctr(KEY, data, segment * self._segment_size + offset)


DATA = random.Random(1).randbytes(10_000)


@settings(max_examples=60)
@given(
    st.integers(1, 3000),
    st.integers(1, 20_000),
    st.lists(st.tuples(st.integers(0, 11_000), st.integers(1, 4000)), max_size=12),
)
def test_any_range_reads_right(segment_size: int, cache_bytes: int, ranges: list[tuple[int, int]]) -> None:
    async def run() -> None:
        async with trio.open_nursery() as nursery:
            blocks = BlockCache(nursery, cache_bytes)
            contents = SnapshotContents(CAP, Snapshot(DATA, segment_size), blocks)
            for offset, length in ranges:
                assert await contents.read(offset, length) == DATA[offset : offset + length]
                assert blocks.held_bytes <= cache_bytes
            contents.close()

    trio.run(run)


async def test_one_fetch_however_many_readers(nursery: trio.Nursery) -> None:
    snapshot = Snapshot(DATA, 1000)
    snapshot.gate = trio.Event()
    blocks = BlockCache(nursery, 1 << 20)
    files = [SnapshotContents(CAP, snapshot, blocks) for _ in range(5)]
    found: list[bytes] = []

    async def read(contents: SnapshotContents, scope: trio.CancelScope) -> None:
        with scope:
            found.append(await contents.read(2100, 50))

    scopes = [trio.CancelScope() for _ in files]
    for contents, scope in zip(files, scopes, strict=True):
        nursery.start_soon(read, contents, scope)
    await wait_all_tasks_blocked()
    scopes[0].cancel()  # whoever came first
    await wait_all_tasks_blocked()
    snapshot.gate.set()
    await wait_all_tasks_blocked()
    assert snapshot.fetched == [2] and snapshot.cancelled == []
    assert found == [DATA[2100:2150]] * 4
    assert await files[0].read(2000, 10) == DATA[2000:2010] and blocks.hits == 1


async def test_a_fetch_nobody_wants_is_cancelled(nursery: trio.Nursery) -> None:
    snapshot = Snapshot(DATA, 1000)
    snapshot.gate = trio.Event()
    contents = SnapshotContents(CAP, snapshot, BlockCache(nursery, 1 << 20))
    with trio.CancelScope() as scope:
        nursery.start_soon(lambda: _cancel_when_blocked(scope))
        await contents.read(0, 10)
    await wait_all_tasks_blocked()
    assert snapshot.cancelled == [0]
    snapshot.gate.set()
    assert await contents.read(0, 10) == DATA[:10]  # and is begun again


async def _cancel_when_blocked(scope: trio.CancelScope) -> None:
    await wait_all_tasks_blocked()
    scope.cancel()


async def test_a_failed_fetch_is_forgotten(nursery: trio.Nursery) -> None:
    snapshot = Snapshot(DATA, 1000)
    contents = SnapshotContents(CAP, snapshot, BlockCache(nursery, 1 << 20))
    snapshot.error = NotEnoughSharesError(3, 1)
    with pytest.raises(NotEnoughSharesError):
        await contents.read(0, 10)
    snapshot.error = None
    assert await contents.read(0, 10) == DATA[:10]


async def test_read_ahead_fetches_what_comes_next_and_stops_with_its_file(nursery: trio.Nursery) -> None:
    snapshot = Snapshot(DATA, 1000)
    contents = SnapshotContents(CAP, snapshot, BlockCache(nursery, 1 << 20))
    await contents.read(0, 400)
    await wait_all_tasks_blocked()
    assert snapshot.fetched == [0]  # looking at a file's beginning costs no more
    await contents.read(400, 400)
    await wait_all_tasks_blocked()
    assert snapshot.fetched == [0, 1]
    snapshot.gate = trio.Event()
    nursery.start_soon(contents.read, 800, 300)
    await wait_all_tasks_blocked()
    await contents.read(1000, 100)
    await wait_all_tasks_blocked()
    assert sorted(snapshot.fetched) == [0, 1, 2, 3, 4, 5]
    contents.close()
    await wait_all_tasks_blocked()
    assert sorted(snapshot.cancelled) == [2, 3, 4, 5]


async def test_random_reads_touch_only_what_they_need(nursery: trio.Nursery) -> None:
    data = bytes(4 << 20)
    snapshot = Snapshot(data, 1000)
    contents = SnapshotContents(CAP, snapshot, BlockCache(nursery, 1 << 20))
    for number in (4000, 17, 2500, 900):
        await contents.read(number * 1000, 10)
    await wait_all_tasks_blocked()
    assert snapshot.fetched == [4000, 17, 2500, 900]


async def test_read_ahead_of_all_files_together_is_bounded(nursery: trio.Nursery) -> None:
    blocks = BlockCache(nursery, 64 << 20)
    size = 1 << 20
    begun = 0
    for number in range(40):
        snapshot = Snapshot(bytes(10), 10, b"%d" % number)
        snapshot.gate = trio.Event()
        begun += blocks.prefetch(self_owner := object(), snapshot, 0, size)
        assert self_owner is not None
    assert begun == PREFETCH_BYTES_MAX // size


@given(st.integers(1, 1 << 22), st.integers(1, 1 << 24), st.lists(st.integers(0, 1 << 24), max_size=20))
def test_read_ahead_stays_within_its_window(segment_size: int, size: int, offsets: list[int]) -> None:
    ahead = ReadAhead()
    for offset in offsets:
        wanted = ahead.note(offset, 1000, segment_size, size)
        assert len(wanted) <= max(1, WINDOW_BYTES_MAX // segment_size)
        assert all(0 <= number * segment_size < size for number in wanted)


def test_read_ahead_grows_while_reading_on() -> None:
    ahead, step, segment = ReadAhead(), 128 << 10, 1 << 20
    lengths = [len(ahead.note(offset, step, segment, 1 << 30)) for offset in range(0, 8 << 20, step)]
    assert lengths[0] == 0 and lengths[1] == 1 and max(lengths) == START_SEGMENTS and lengths == sorted(lengths)
    offsets = range(8 << 20, 24 << 20, step)  # what is far gets more
    lengths = [len(ahead.note(offset, step, segment, 1 << 30, waited=offset % segment == 0)) for offset in offsets]
    assert max(lengths) == WINDOW_BYTES_MAX // segment and lengths == sorted(lengths)
    assert len(ahead.note(500 << 20, step, segment, 1 << 30)) == 0  # a jump
    shuffled = [0, 2, 1, 3, 5, 4, 6, 7, 9, 8]  # two reads in flight change places
    ahead = ReadAhead()
    assert len([ahead.note(place * step, step, segment, 1 << 30) for place in shuffled][-1]) >= 1


@asynccontextmanager
async def _disk(folder: Path) -> AsyncIterator[DiskTier]:
    tier = DiskTier.open(folder, 8 << 20)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(tier.run)
            yield tier
            nursery.cancel_scope.cancel()
    finally:
        tier.close()


class Unreachable(Snapshot):
    """The same file when the grid is down: only what a cache holds can be read."""

    async def get_segment_size(self) -> int:
        raise NotEnoughSharesError(3, 0)

    async def get_segment(self, number: int) -> bytes:
        raise NotEnoughSharesError(3, 0)


@pytest.mark.parametrize("part", [(0, 10_000), (4000, 3000), (0, 100)])
async def test_what_was_read_is_on_the_disk(tmp_path: Path, part: tuple[int, int], nursery: trio.Nursery) -> None:
    """Also of a file of which only some segments in the middle were read."""
    offset, length = part
    async with _disk(tmp_path) as disk:
        contents = SnapshotContents(CAP, Snapshot(DATA, 1000), BlockCache(nursery, 5000, disk))
        assert await contents.read(offset, length) == DATA[offset : offset + length]
        again = SnapshotContents(CAP, Unreachable(DATA, 1000), BlockCache(nursery, 5000, disk))
        assert await again.read(offset, length) == DATA[offset : offset + length]  # perhaps not written yet
    async with _disk(tmp_path) as disk:
        blocks = BlockCache(nursery, 5000, disk)
        again = SnapshotContents(CAP, Unreachable(DATA, 1000), blocks)
        assert await again.read(offset, length) == DATA[offset : offset + length]
        assert blocks.misses == 0 and blocks.hits == -(-length // 1000)
        with pytest.raises(NotEnoughSharesError):
            await SnapshotContents(CAP, Other(DATA, 1000, b"two"), blocks).read(0, 10)


class Other(Unreachable):
    cache_secret = b"?" * 32


def _damage(folder: Path) -> None:
    (pack,) = folder.rglob("*.pack")
    data = bytearray(pack.read_bytes())
    data[4000] ^= 1
    pack.write_bytes(data)


async def test_threads_read_what_is_on_the_disk_by_whole_segments(tmp_path: Path, nursery: trio.Nursery) -> None:
    cap = CHKReadCap(KEY, bytes(32), 3, 10, len(DATA))
    snapshot = Snapshot(DATA, 1001)
    snapshot.cache_secret = cache_secret_of(cap)
    buffer = memoryview(bytearray(1010))
    async with _disk(tmp_path) as disk:
        contents = SnapshotContents(cap, snapshot, BlockCache(nursery, 5000, disk))
        assert contents.local() is None, "the segment size is not known yet"
        await contents.read(0, 8000)
        for number in range(8):
            await disk.written(BlockName.of(snapshot.cache_secret, b"", number))
        local = contents.local()
        assert local is not None and (local.size, local.segment_size) == (len(DATA), 1001)
        for number in range(8):
            assert local.has(number) and local.read_into(number, buffer) == 1001
            assert buffer[:1001] == DATA[number * 1001 :][:1001]
        assert not local.has(8) and local.read_into(8, buffer) == 0
        await contents.read(9500, 100)  # the last segment, which is shorter
        await disk.written(BlockName.of(snapshot.cache_secret, b"", 9))
        assert buffer[: local.read_into(9, buffer)] == DATA[9009:]
        _damage(tmp_path)
        assert [local.read_into(number, buffer) > 0 for number in range(8)].count(False) == 1, "the damaged one"
        assert SnapshotContents(CAP, snapshot, BlockCache(nursery, 5000, disk)).local() is None, "not immutable"


async def test_a_disk_that_is_slower_than_the_grid_is_left_out(tmp_path: Path) -> None:
    tier = DiskTier.open(tmp_path, 1 << 30)  # nothing writes
    size = 1 << 20
    kept = [tier.put(BlockName.of(bytes(32), b"", number), size, bytes(size)) for number in range(40)]
    assert kept == [True] * (QUEUE_BYTES_MAX // size) + [False] * (40 - QUEUE_BYTES_MAX // size)
    tier.close()
