"""Verified ciphertext segments in memory, and the one fetch there is of each.

A segment is kept under (storage index, version, number), as ciphertext: plaintext is made for the range that is
read and kept by nobody. However many readers wait for a segment, it is fetched once. The fetch belongs to the
nursery given here, not to the reader that came first, so it survives that reader; it is cancelled when neither a
reader nor read-ahead wants it any more. A failed fetch fails those who wait for it and is forgotten.

No locks: `_fetches` is looked at and changed without an await between.
"""

from __future__ import annotations

import logging
from typing import Final

import trio
from cachetools import LRUCache

from grid.errors import FormatError, GridError
from grid.interfaces import IReadableSnapshot

log = logging.getLogger(__name__)

SEGMENT_SIZES_MAX: Final = 20_000  # files whose segment size is remembered: without it the grid must be asked again
PREFETCH_BYTES_MAX: Final = 16 << 20  # fetches under way that only read-ahead wants, over all files

SegmentKey = tuple[bytes, bytes, int]  # storage index, version, segment number


class _Fetch:
    """One segment on its way."""

    def __init__(self, size: int) -> None:
        self.size = size  # bytes expected
        self.scope = trio.CancelScope()
        self.done = trio.Event()
        self.data = b""
        self.error: Exception | None = None
        self.readers = 0
        self.prefetchers: set[object] = set()

    @property
    def wanted(self) -> bool:
        return self.readers > 0 or bool(self.prefetchers)


class BlockCache:
    """Segments by storage index, version and number; at most `limit_bytes` of them are kept."""

    def __init__(self, nursery: trio.Nursery, limit_bytes: int) -> None:
        self._nursery = nursery
        self._segments: LRUCache[SegmentKey, bytes] = LRUCache(limit_bytes, getsizeof=len)
        self._fetches: dict[SegmentKey, _Fetch] = {}
        self._segment_sizes: LRUCache[tuple[bytes, bytes], int] = LRUCache(SEGMENT_SIZES_MAX)
        self.hits = 0
        self.misses = 0

    @property
    def held_bytes(self) -> int:
        return int(self._segments.currsize)

    @property
    def limit_bytes(self) -> int:
        return int(self._segments.maxsize)

    async def segment_size(self, snapshot: IReadableSnapshot) -> int:
        """Bytes in each segment but the last. Asks the snapshot once; raises what it raises."""
        key = _key(snapshot, 0)[:2]
        size = self._segment_sizes.get(key)
        if size is not None:
            snapshot.remember_segment_size(size)
            return size
        size = await snapshot.get_segment_size()
        if size <= 0:
            raise FormatError("a file's segments have no size")
        self._segment_sizes[key] = size
        return size

    def has(self, snapshot: IReadableSnapshot, number: int) -> bool:
        return _key(snapshot, number) in self._segments

    async def get(self, snapshot: IReadableSnapshot, number: int, size: int) -> bytes:
        """Ciphertext segment `number`, which should have `size` bytes. Raises what the snapshot raises."""
        key = _key(snapshot, number)
        if (data := self._segments.get(key)) is not None:
            self.hits += 1
            return data
        self.misses += 1
        fetch = self._fetches.get(key) or self._start(key, snapshot, size)
        fetch.readers += 1
        try:
            await fetch.done.wait()
        finally:
            fetch.readers -= 1
            self._cancel_unwanted(key, fetch)
        if fetch.error is not None:
            raise fetch.error.with_traceback(None)
        return fetch.data

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
                fetch.data = await snapshot.get_segment(key[2])
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

    def _keep(self, key: SegmentKey, data: bytes) -> None:
        if len(data) <= self.limit_bytes:
            self._segments[key] = data


def _key(snapshot: IReadableSnapshot, number: int) -> SegmentKey:
    return snapshot.storage_index or b"", snapshot.version, number
