"""Counts and sizes of everything in a tree, as Tahoe-LAFS 1.20's deep-stats gives them.

Sizes are of contents, in bytes; a directory's is its table's. Mutable files are counted, their sizes are not known.
The histogram has two buckets a decade: 0-0, 1-3, 4-10, 11-31, 32-100, …
"""

from __future__ import annotations

from collections import Counter
from math import isqrt
from typing import Any

from attrs import define, field

from grid.formats.caps import LiteralCap, UnknownCap
from grid.nodes.traversal import Visit


@define
class DeepStats:
    """Feed it with visits."""

    _counts: Counter[str] = field(factory=Counter)
    _largest: dict[str, int] = field(factory=dict)
    _histogram: Counter[tuple[int, int]] = field(factory=Counter)

    def add(self, visit: Visit) -> None:
        cap, size = visit.cap, visit.size or 0
        if isinstance(cap, UnknownCap):
            self._counts["count-unknown"] += 1
        elif cap.is_directory:
            self._counts["count-directories"] += 1
            self._counts["size-directories"] += size
            self._note("largest-directory", size)
            self._note("largest-directory-children", visit.children or 0)
        else:
            self._counts["count-files"] += 1
            if visit.size is None:
                self._counts["count-mutable-files"] += 1
                return
            kind = "literal" if isinstance(cap, LiteralCap) else "immutable"
            self._counts[f"count-{kind}-files"] += 1
            self._counts[f"size-{kind}-files"] += size
            self._histogram[bucket_of(size)] += 1
            if kind == "immutable":
                self._note("largest-immutable-file", size)

    def _note(self, name: str, value: int) -> None:
        self._largest[name] = max(self._largest.get(name, 0), value)

    def to_json(self) -> dict[str, Any]:
        counts = ("immutable-files", "mutable-files", "literal-files", "files", "directories", "unknown")
        names = [f"count-{name}" for name in counts]
        names += [f"size-{name}" for name in ("immutable-files", "literal-files", "directories")]
        largest = ("largest-directory", "largest-directory-children", "largest-immutable-file")
        return {
            "api-version": 1,
            **{name: self._counts[name] for name in names},
            **{name: self._largest.get(name, 0) for name in largest},
            "size-files-histogram": [[low, high, count] for (low, high), count in sorted(self._histogram.items())],
        }


def bucket_of(size: int) -> tuple[int, int]:
    """The histogram's bucket of a file of this many bytes: (smallest, largest)."""
    low, high, step = 0, 0, 0
    while size > high:
        step += 1
        low, high = high + 1, isqrt(10**step)  # the square root of ten, to this power
    return low, high
