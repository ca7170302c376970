"""Which bytes of an upload were written: spans, in order, never touching. No I/O."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from typing import Final

SPANS_MAX: Final = 10_000  # ours: nobody who writes a share needs more holes than that


class Spans:
    """Half-open spans. Writing front to back costs the same however much was written."""

    def __init__(self) -> None:
        self._begins: list[int] = []
        self._ends: list[int] = []
        self.total = 0  # bytes

    def __len__(self) -> int:
        return len(self._begins)

    def add(self, begin: int, end: int) -> None:
        if begin >= end:
            return
        ends = self._ends
        if ends and begin == ends[-1]:
            ends[-1] = end
            self.total += end - begin
            return
        first = bisect_left(ends, begin)  # the first one that ends at or after `begin`
        last = bisect_right(self._begins, end)  # one past the last that begins at or before `end`
        merged = range(first, last)
        if merged:
            self.total -= sum(ends[i] - self._begins[i] for i in merged)
            begin = min(begin, self._begins[first])
            end = max(end, ends[last - 1])
        self._begins[first:last] = [begin]
        self._ends[first:last] = [end]
        self.total += end - begin

    def within(self, begin: int, end: int) -> list[tuple[int, int]]:
        """What of [begin, end) was written."""
        if not self._ends or begin >= self._ends[-1]:
            return []
        first = bisect_right(self._ends, begin)
        last = bisect_left(self._begins, end)
        return [(max(begin, self._begins[i]), min(end, self._ends[i])) for i in range(first, last)]

    def missing(self, size: int) -> list[tuple[int, int]]:
        """What of [0, size) was not written."""
        edges = [0, *(edge for span in zip(self._begins, self._ends, strict=True) for edge in span), size]
        return [(begin, end) for begin, end in zip(edges[::2], edges[1::2], strict=True) if begin < end]
