"""Contents on the grid, read through the block cache with read-ahead."""

from __future__ import annotations

from typing import Final

import trio

from cache.blocks import BlockCache
from cache.local_segments import LocalSegments
from cache.readahead import ReadAhead
from grid.errors import FormatError
from grid.formats.caps import Cap, CHKReadCap
from grid.formats.segments import div_ceil
from grid.interfaces import IReadableSnapshot

READ_SEGMENTS_MAX: Final = 8  # of one read that are waited for at a time


class SnapshotContents:
    """One immutable file, or one version of a mutable one; open files of one snapshot share what is fetched."""

    def __init__(self, cap: Cap, snapshot: IReadableSnapshot, blocks: BlockCache) -> None:
        self.cap = cap
        self._snapshot = snapshot
        self._blocks = blocks
        self._ahead = ReadAhead()
        self._begun = 0  # read-ahead of all segments below is under way, or done
        self._segment_size = 0
        self._local: LocalSegments | None = None
        self._asking = trio.Lock()  # held while the grid is asked for the segment size, the first time only

    @property
    def size(self) -> int:
        return self._snapshot.size

    async def read(self, offset: int, length: int) -> bytes:
        stop = min(offset + length, self.size)
        if offset >= stop:
            return b""
        segment_size = self._segment_size or await self._ask_segment_size()
        first, last = offset // segment_size, (stop - 1) // segment_size
        waited = not self._blocks.has(self._snapshot, last)
        for number in range(first + 1, min(last, first + READ_SEGMENTS_MAX) + 1):
            self._prefetch(number)
        pieces = []
        for number in range(first, last + 1):
            start = number * segment_size
            a, b = max(offset - start, 0), min(stop - start, segment_size)
            segment = await self._blocks.get(self._snapshot, number, self._segment_bytes(number))
            if len(segment) < b:
                raise FormatError(f"segment {number} has {len(segment)} bytes")
            pieces.append(self._snapshot.decrypt(number, a, memoryview(segment)[a:b]))
            if number + READ_SEGMENTS_MAX <= last:
                self._prefetch(number + READ_SEGMENTS_MAX)
        wanted = self._ahead.note(offset, stop - offset, segment_size, self.size, waited=waited)
        if not wanted:
            self._begun = 0
        for number in range(max(wanted.start, self._begun), wanted.stop):
            if not self._prefetch(number):
                break
            self._begun = number + 1
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def local(self) -> LocalSegments | None:
        """For reading ahead what the local disk has. None: it may change, or too little is known of it yet."""
        if self._local is None and self._segment_size and isinstance(self.cap, CHKReadCap):
            self._local = self._blocks.local(self.cap, self._segment_size)
        return self._local

    async def warm(self) -> None:
        """Have the first segment in the cache: of a small file that is all of it."""
        self._segment_size = self._segment_size or await self._ask_segment_size()
        if not self._blocks.has(self._snapshot, 0):
            await self._blocks.get(self._snapshot, 0, self._segment_bytes(0))

    def close(self) -> None:
        self._blocks.forget_prefetches(self)

    async def _ask_segment_size(self) -> int:
        async with self._asking:
            if not self._segment_size:
                self._segment_size = await self._blocks.segment_size(self._snapshot)
        return self._segment_size

    def _prefetch(self, number: int) -> bool:
        return self._blocks.prefetch(self, self._snapshot, number, self._segment_bytes(number))

    def _segment_bytes(self, number: int) -> int:
        count = div_ceil(self.size, self._segment_size)
        return self._segment_size if number < count - 1 else self.size - (count - 1) * self._segment_size
