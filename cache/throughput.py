"""How fast bytes go, lately. Pure: the clock's time is given."""

from __future__ import annotations

from collections import deque
from typing import Final

WINDOW_S: Final = 5.0
SLOT_S: Final = 0.25  # bytes within so many seconds are counted as one


class Meter:
    def __init__(self) -> None:
        self.total = 0  # bytes
        self._slots: deque[list[float]] = deque()  # [when it began, bytes], at most WINDOW_S / SLOT_S + 1 of them

    def add(self, count: int, now: float) -> None:
        self.total += count
        if not self._slots or now - self._slots[-1][0] >= SLOT_S:
            self._slots.append([now, 0])
            self._forget(now)
        self._slots[-1][1] += count

    def rate(self, now: float) -> float:
        """Bytes per second over the last WINDOW_S, or over less if it began later."""
        self._forget(now)
        if not self._slots:
            return 0.0
        return sum(count for _, count in self._slots) / max(SLOT_S, now - self._slots[0][0])

    def _forget(self, now: float) -> None:
        while self._slots and now - self._slots[0][0] > WINDOW_S:
            self._slots.popleft()
