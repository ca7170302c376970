"""An immutable file's segments on the local disk, for whoever reads many of them: in worker threads, without the grid.

One thread reads a segment, proves it and decrypts it in the place where it is wanted; none of that is seen by the event
loop, and nothing is copied.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

from attrs import field, frozen

from cache.disk_tier import BlockName, DiskTier
from grid.crypto import AESCTRStream
from grid.formats.caps import CHKReadCap
from grid.nodes.immutable import cache_secret_of


@frozen
class LocalSegments:
    """`has` and `read_into` block, and may be called from several threads at once."""

    size: int  # plaintext bytes of the file
    segment_size: int  # of each segment but the last
    note_served: Callable[[int], None]  # on the event loop: so many segments were handed on
    _disk: DiskTier
    _key: bytes = field(repr=False)
    _secret: bytes = field(repr=False)

    @classmethod
    def of(cls, cap: CHKReadCap, segment_size: int, disk: DiskTier, note_served: Callable[[int], None]) -> Self:
        return cls(cap.size, segment_size, note_served, disk, cap.key, cache_secret_of(cap))

    def has(self, number: int) -> bool:
        """Is it here, as far as can be seen without reading it?"""
        return self._disk.has(BlockName.of(self._secret, b"", number))

    def read_into(self, number: int, buffer: memoryview) -> int:
        """Put the plaintext of a segment at the front of `buffer`; returns its bytes, 0 when it is not here.

        What else the buffer held may be gone, also beyond the segment.
        """
        start = number * self.segment_size
        wanted = min(self.segment_size, self.size - start)
        record = self._disk.read_into(BlockName.of(self._secret, b"", number), buffer)
        if record is None or len(record.payload) != wanted:
            return 0
        return AESCTRStream(self._key, start).update_into(record.payload, record.payload)
