"""Read-ahead of one open file: which segments to fetch before they are asked for.

Pure. Reads are sequential while each starts near where the last one ended (the kernel sends two at a time, and they
may change places). The second sequential read opens a window of one segment past the read; in the next segment it
is START_SEGMENTS. From there on it doubles with each segment the reader had to wait for: what is near, on the local
disk or on a fast grid, needs little, and what is far gets latency times bandwidth, up to WINDOW_SEGMENTS_MAX and
WINDOW_BYTES_MAX. A jump closes it. So a program that looks at a file's first bytes, or reads here and there, costs
only the segments it touches.
"""

from __future__ import annotations

from typing import Final

START_SEGMENTS: Final = 4
WINDOW_SEGMENTS_MAX: Final = 128
WINDOW_BYTES_MAX: Final = 16 << 20
NEAR_BYTES: Final = 512 << 10  # how far from the expected place a sequential read may start


class ReadAhead:
    """Feed it every read; it answers with the segments to have ready."""

    def __init__(self) -> None:
        self._expected: int | None = None  # where the next read starts, if it goes on; None before the first
        self._window = 0  # segments
        self._segment = -1  # the furthest one entered
        self._waited = False  # in it

    def note(self, offset: int, length: int, segment_size: int, size: int, *, waited: bool = False) -> range:
        """After a read of a file of `size` bytes, segments of `segment_size`: those to prefetch, nearest first.

        `waited`: what was read was not here yet.
        """
        near = self._expected is not None and abs(offset - self._expected) <= NEAR_BYTES
        self._expected = max(self._expected or 0, offset + length) if near else offset + length
        last = max(0, min(self._expected, size) - 1) // segment_size
        if not near:  # a jump, or the first read of all, which says nothing yet
            self._window, self._segment, self._waited = 0, last, False
            return range(0)
        self._waited |= waited
        if last > self._segment or self._window == 0:
            limit = max(1, min(WINDOW_SEGMENTS_MAX, WINDOW_BYTES_MAX // segment_size))
            if 0 < self._window < START_SEGMENTS:
                self._window = START_SEGMENTS
            elif self._waited or not self._window:
                self._window = max(1, self._window * 2)
            self._window, self._waited = min(self._window, limit), False
            self._segment = max(self._segment, last)
        count = -(-size // segment_size)
        return range(last + 1, min(last + 1 + self._window, count))
