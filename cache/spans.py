"""Which byte ranges of a file are held: a sorted set of ranges that neither overlap nor touch.

Pure: no I/O. A range is [start, stop). Every operation is O(log n) to find its place plus a memmove;
callers bound the number of ranges (see `cache/spool.py`).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator


class Spans:
    """Held ranges, and how many bytes they make together (`total`)."""

    __slots__ = ("_starts", "_stops", "total")

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []
        self.total = 0
        for start, stop in ranges:
            self.add(start, stop)

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(tuple(self._starts), tuple(self._stops), strict=True)

    def copy(self) -> Spans:
        same = Spans()
        same._starts, same._stops, same.total = self._starts.copy(), self._stops.copy(), self.total
        return same

    @property
    def stop(self) -> int:
        """Where the last range ends; 0 when there is none."""
        return self._stops[-1] if self._stops else 0

    def add(self, start: int, stop: int) -> None:
        if start >= stop:
            return
        low = bisect_left(self._stops, start)  # the first range that ends at or after start: touching ones merge
        high = bisect_right(self._starts, stop)
        if low < high:
            start = min(start, self._starts[low])
            stop = max(stop, self._stops[high - 1])
        self._replace(low, high, [(start, stop)])

    def remove(self, start: int, stop: int) -> None:
        if start >= stop:
            return
        low = bisect_right(self._stops, start)
        high = bisect_left(self._starts, stop)
        if low >= high:
            return
        rest = [(self._starts[low], start), (stop, self._stops[high - 1])]
        self._replace(low, high, [(a, b) for a, b in rest if a < b])

    def covers(self, start: int, stop: int) -> bool:
        return start >= stop or self.run_from(start) >= stop

    def run_from(self, start: int) -> int:
        """Where the range that holds `start` ends; `start` itself if none does."""
        index = bisect_right(self._starts, start) - 1
        return max(start, self._stops[index]) if index >= 0 else start

    def cut(self, start: int, stop: int) -> list[tuple[int, int, bool]]:
        """[start, stop) in order as (start, stop, held) pieces, the longest possible ones."""
        pieces: list[tuple[int, int, bool]] = []
        index = bisect_right(self._stops, start)
        while start < stop:
            if index == len(self._starts) or self._starts[index] >= stop:
                pieces.append((start, stop, False))
                break
            if self._starts[index] > start:
                pieces.append((start, self._starts[index], False))
                start = self._starts[index]
            end = min(self._stops[index], stop)
            pieces.append((start, end, True))
            start = end
            index += 1
        return pieces

    def without(self, start: int, stop: int) -> list[tuple[int, int]]:
        """The parts of [start, stop) that are not held."""
        return [(a, b) for a, b, held in self.cut(start, stop) if not held]

    def missing_bytes(self, start: int, stop: int) -> int:
        """How many bytes of [start, stop) are not held."""
        return sum(b - a for a, b, held in self.cut(start, stop) if not held)

    def _replace(self, low: int, high: int, ranges: list[tuple[int, int]]) -> None:
        self.total += sum(b - a for a, b in ranges)
        self.total -= sum(self._stops[low:high]) - sum(self._starts[low:high])
        self._starts[low:high] = [a for a, _ in ranges]
        self._stops[low:high] = [b for _, b in ranges]
