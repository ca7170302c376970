"""Verified ciphertext segments in memory, over those on the disk, and the one fetch there is of each.

A segment is kept under (storage index, version, number), as ciphertext: plaintext is made for the range that is
read and kept by nobody. However many readers wait for a segment, it is fetched once. The fetch belongs to the
nursery given here, not to the reader that came first, so it survives that reader; it is cancelled when neither a
reader nor read-ahead wants it any more. A failed fetch fails those who wait for it and is forgotten.

What was fetched from the grid goes to the disk (`cache/disk_tier.py`), with its file's segment size, without which it
could not be read again: that stands beside each segment, and for files of several segments in a block of its own.

No locks: `_fetches` is looked at and changed without an await between.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final, TypeVar

import trio
from cachetools import LRUCache

from cache.connectivity import Connectivity
from cache.disk_tier import BlockName, DiskTier
from cache.local_segments import LocalSegments
from grid.errors import FormatError, GridError
from grid.formats.caps import CHKReadCap
from grid.interfaces import IReadableSnapshot

log = logging.getLogger(__name__)

SEGMENT_SIZES_MAX: Final = 20_000  # files whose segment size is remembered: without it the grid must be asked again
PREFETCH_BYTES_MAX: Final = 32 << 20  # fetches under way that only read-ahead wants, over all files

FACTS_NUMBER: Final = (1 << 64) - 1  # of the block that has no bytes, only its file's segment size

T = TypeVar("T")
SegmentKey = tuple[bytes, bytes, int]  # storage index, version, segment number


class _Fetch:
    """One segment on its way."""

    def __init__(self, size: int) -> None:
        self.size = size  # bytes expected
        self.scope = trio.CancelScope()
        self.done = trio.Event()
        self.data: bytes | memoryview = b""
        self.from_grid = False
        self.error: Exception | None = None
        self.readers = 0
        self.prefetchers: set[object] = set()

    @property
    def wanted(self) -> bool:
        return self.readers > 0 or bool(self.prefetchers)


class BlockCache:
    """Segments by storage index, version and number; at most `limit_bytes` of them are kept."""

    def __init__(
        self,
        nursery: trio.Nursery,
        limit_bytes: int,
        disk: DiskTier | None = None,
        connectivity: Connectivity | None = None,
    ) -> None:
        self._nursery = nursery
        self._disk = disk
        self._connectivity = connectivity
        self._segments: LRUCache[SegmentKey, bytes | memoryview] = LRUCache(limit_bytes, getsizeof=len)
        self._fetches: dict[SegmentKey, _Fetch] = {}
        self._segment_sizes: LRUCache[tuple[bytes, bytes], int] = LRUCache(SEGMENT_SIZES_MAX)
        self._facts_kept: LRUCache[tuple[bytes, bytes], bool] = LRUCache(SEGMENT_SIZES_MAX)
        self.hits = 0  # reads that were served from here
        self.misses = 0  # reads that had to wait for the grid

    @property
    def held_bytes(self) -> int:
        return int(self._segments.currsize)

    @property
    def limit_bytes(self) -> int:
        return int(self._segments.maxsize)

    async def segment_size(self, snapshot: IReadableSnapshot) -> int:
        """Bytes in each segment but the last. Asks the snapshot once; raises what it raises."""
        key = _key(snapshot, 0)[:2]
        size = self._segment_sizes.get(key) or await self._kept_segment_size(snapshot)
        if size:
            snapshot.remember_segment_size(size)
            self._segment_sizes[key] = size
            return size
        size = await self._reach(snapshot.get_segment_size)
        if size <= 0:
            raise FormatError("a file's segments have no size")
        self._segment_sizes[key] = size
        return size

    async def _kept_segment_size(self, snapshot: IReadableSnapshot) -> int:
        """As the disk knows it, or 0."""
        names = [name for number in (0, FACTS_NUMBER) if (name := _name(snapshot, number)) is not None]
        if self._disk is None or not names:
            return 0
        record = await self._disk.get(*names)
        if record is not None and record.payload:  # the first segment, which will be read next
            self._keep(_key(snapshot, 0), record.payload)
        return record.segment_size if record is not None else 0

    def has(self, snapshot: IReadableSnapshot, number: int) -> bool:
        return _key(snapshot, number) in self._segments

    async def get(self, snapshot: IReadableSnapshot, number: int, size: int) -> bytes | memoryview:
        """Ciphertext segment `number`, which should have `size` bytes. Raises what the snapshot raises."""
        key = _key(snapshot, number)
        if (data := self._segments.get(key)) is not None:
            self.hits += 1
            return data
        fetch = self._fetches.get(key) or self._start(key, snapshot, size)
        fetch.readers += 1
        try:
            await fetch.done.wait()
        finally:
            fetch.readers -= 1
            self._cancel_unwanted(key, fetch)
        self.misses += fetch.from_grid
        self.hits += not fetch.from_grid
        if fetch.error is not None:
            raise fetch.error.with_traceback(None)
        return fetch.data

    def local(self, cap: CHKReadCap, segment_size: int) -> LocalSegments | None:
        """What the disk has of an immutable file; None without a disk."""
        if self._disk is None:
            return None
        return LocalSegments.of(cap, segment_size, self._disk, self._note_served)

    def _note_served(self, count: int) -> None:
        self.hits += count

    def prefetch(self, owner: object, snapshot: IReadableSnapshot, number: int, size: int) -> bool:
        """Begin to fetch a segment for read-ahead's `owner`, if it is not here. False: too much is under way."""
        key = _key(snapshot, number)
        if key in self._segments:
            return True
        if (fetch := self._fetches.get(key)) is None:
            under_way = sum(f.size for f in self._fetches.values() if f.readers == 0)
            if under_way + size > PREFETCH_BYTES_MAX or size > self.limit_bytes // 2:
                return False
            fetch = self._start(key, snapshot, size)
        fetch.prefetchers.add(owner)
        return True

    def forget_prefetches(self, owner: object) -> None:
        """`owner` reads no more: what only it wanted is cancelled."""
        for key, fetch in list(self._fetches.items()):
            if owner in fetch.prefetchers:
                fetch.prefetchers.discard(owner)
                self._cancel_unwanted(key, fetch)

    def _start(self, key: SegmentKey, snapshot: IReadableSnapshot, size: int) -> _Fetch:
        fetch = self._fetches[key] = _Fetch(size)
        self._nursery.start_soon(self._run, key, fetch, snapshot)
        return fetch

    def _cancel_unwanted(self, key: SegmentKey, fetch: _Fetch) -> None:
        if not fetch.wanted and not fetch.done.is_set():
            fetch.scope.cancel()
            if self._fetches.get(key) is fetch:
                del self._fetches[key]  # whoever comes now starts afresh

    async def _run(self, key: SegmentKey, fetch: _Fetch, snapshot: IReadableSnapshot) -> None:
        fetch.error = GridError("the mount is going away")
        try:
            with fetch.scope:
                fetch.data = await self._read_kept(snapshot, key[2], fetch.size)
                if not fetch.data:
                    fetch.from_grid = True
                    fetch.data = segment = await self._reach(partial(snapshot.get_segment, key[2]))
                    await self._keep_on_disk(snapshot, key[2], segment)
                fetch.error = None
                self._keep(key, fetch.data)
        except GridError as error:
            fetch.error = error
        except Exception as error:
            log.exception("fetching a segment failed in an unforeseen way")
            fetch.error = error
        finally:
            if self._fetches.get(key) is fetch:
                del self._fetches[key]
            fetch.done.set()

    async def _reach(self, work: Callable[[], Awaitable[T]]) -> T:
        return await (work() if self._connectivity is None else self._connectivity.reach(work))

    def _keep(self, key: SegmentKey, data: bytes | memoryview) -> None:
        if len(data) <= self.limit_bytes:
            self._segments[key] = data

    async def _read_kept(self, snapshot: IReadableSnapshot, number: int, size: int) -> bytes | memoryview:
        """From the disk; empty if it is not there."""
        name = _name(snapshot, number)
        record = None if self._disk is None or name is None else await self._disk.get(name)
        return record.payload if record is not None and len(record.payload) == size else b""

    async def _keep_on_disk(self, snapshot: IReadableSnapshot, number: int, data: bytes) -> None:
        name, facts = _name(snapshot, number), _name(snapshot, FACTS_NUMBER)
        if self._disk is None or name is None or facts is None:
            return
        segment_size = await snapshot.get_segment_size()  # known by now
        self._disk.put(name, segment_size, data)
        file = _key(snapshot, number)[:2]
        if number and file not in self._facts_kept:
            self._facts_kept[file] = self._disk.put(facts, segment_size, b"")


def _name(snapshot: IReadableSnapshot, number: int) -> BlockName | None:
    secret = snapshot.cache_secret
    return None if secret is None else BlockName.of(secret, snapshot.version, number)


def _key(snapshot: IReadableSnapshot, number: int) -> SegmentKey:
    return snapshot.storage_index or b"", snapshot.version, number
