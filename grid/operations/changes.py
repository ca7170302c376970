"""What is to be different in the next version of a mutable file, and which segments that touches.

    Changes   spans of bytes, where to read them from, and the size afterwards
    plan      the touched segments, cut into steps: one version each, so small that all its shares fit in memory

A segment is touched when a changed byte is in it, when it is new (a file may grow beyond the changes: zeros), or when
it is the last one, before or after, and its length changes. Arithmetic only, but for the source of the bytes.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Self

from attrs import field, frozen

from grid.formats.segments import MDMF_SEGMENT_BYTES, Segmentation, div_ceil
from grid.formats.ueb import SEGMENTS_MAX

VERSION_BYTES_MAX: Final = 32 << 20  # of all shares' blocks in one version made of Changes: they are in memory at once
MDMF_DATA_BYTES_MAX: Final = SEGMENTS_MAX * MDMF_SEGMENT_BYTES  # ours: of one file

Span = tuple[int, int]  # [start, stop) in bytes


@frozen
class Changes:
    """`read(offset, length)` gives all the bytes of any part of a span. It may be asked again, when another writer was
    faster, and for several parts at once.
    """

    spans: Sequence[Span]  # ascending, apart from each other
    read: Callable[[int, int], Awaitable[bytes]] = field(repr=False)
    size: int | None = None  # None: as it is, or as far as the spans reach

    @classmethod
    def of_bytes(cls, offset: int, data: bytes) -> Self:
        """Write `data` at `offset`; what is between it and an earlier end becomes zeros."""

        async def read(at: int, length: int) -> bytes:
            return data[at - offset : at - offset + length]

        return cls([(offset, offset + len(data))] if data else [], read)

    @classmethod
    def to_size(cls, size: int) -> Self:
        """Cut, or lengthen with zeros."""

        async def read(at: int, length: int) -> bytes:
            raise AssertionError("nothing to read")

        return cls([], read, size)

    @classmethod
    def everything(cls, size: int, read: Callable[[int, int], Awaitable[bytes]]) -> Self:
        """New contents of `size` bytes."""
        return cls([(0, size)] if size else [], read, size)

    def new_size(self, old_size: int) -> int:
        if self.size is not None:
            return self.size
        return max(old_size, self.spans[-1][1] if self.spans else 0)

    async def over(self, before: bytes, size: int) -> bytes:
        """The first `size` bytes of the new contents of a file that was `before`, zeros where it was shorter."""
        data = bytearray(before[:size].ljust(size, b"\0"))
        for start, stop in self.within(0, size):
            data[start:stop] = await self.read(start, stop - start)
        return bytes(data)

    def within(self, start: int, stop: int) -> list[Span]:
        """The spans' parts in [start, stop)."""
        first = bisect_right(self.spans, start, key=lambda span: span[1])
        last = bisect_left(self.spans, stop, key=lambda span: span[0])
        return [(max(a, start), min(b, stop)) for a, b in self.spans[first:last]]


@frozen
class Step:
    """One version on the way: these segments anew, and so many bytes in the file."""

    segments: Sequence[int]  # ascending
    size: int


def touched(old: Segmentation, changes: Changes) -> list[int]:
    """The segments to be encoded anew, ascending. Raises ValueError when the file would be too large."""
    segment_size = old.segment_size
    size = changes.new_size(old.size)
    count = div_ceil(size, segment_size)
    if count > SEGMENTS_MAX:
        raise ValueError(f"a mutable file has at most {SEGMENTS_MAX} segments")
    found: set[int] = set()
    for start, stop in changes.within(0, size):
        found.update(range(start // segment_size, div_ceil(stop, segment_size)))
    if size != old.size:
        found.update(range(min(size, old.size) // segment_size, count))  # the tail that changes, and all new ones
    return sorted(found)


def segments_at_once(k: int, n: int, segment_size: int) -> int:
    """So many segments can be written in one version."""
    return max(1, VERSION_BYTES_MAX // (n * (segment_size // k)))


def fits_at_once(size: int, k: int, n: int) -> bool:
    """Whether a whole file can be written in one version."""
    return size * n // k <= VERSION_BYTES_MAX


def plan(old: Segmentation, n: int, changes: Changes) -> list[Step]:
    """The versions that lead from a file of `old` segmentation, in `n` shares, to the changed one; none for no change.

    Front to back; a file that shrinks does so in the last step. Raises ValueError, see `touched`.
    """
    segments = touched(old, changes)
    size = changes.new_size(old.size)
    if not segments:
        return [] if size == old.size else [Step([], size)]
    most = segments_at_once(old.k, n, old.segment_size)
    groups = [segments[at : at + most] for at in range(0, len(segments), most)]
    steps = [Step(group, max(old.size, min(size, (group[-1] + 1) * old.segment_size))) for group in groups[:-1]]
    return [*steps, Step(groups[-1], size)]
