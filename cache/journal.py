"""The journal: every operation gets a position, and one can wait until all up to a position has taken effect.

Kept in memory only. An operation's *effects* (a name to be published in a directory, a mutable file to be
replaced) are added when it is done and settled when the grid has them, or when nobody wants them any more. An effect
that takes the place of another keeps the smaller position: who waits for what was overwritten waits for what
overwrote it, since what was overwritten will never be there.

    operations   1 link a   2 link b   3 link a again   4 unlink b
    effects      a at 1                                 (b is gone)        wait(2) waits for a, the second one

`wait` needs no lock: it looks, then waits for `changed`, and nothing runs between the two.
"""

from __future__ import annotations

import heapq
from typing import Protocol

import trio

from cache.spool import SpoolFullError


class Effect(Protocol):
    position: int


class JournalFullError(SpoolFullError):
    """Too many operations are not on the grid yet: the mount answers ENOSPC. Nothing is dropped."""


class Journal:
    """Positions given out, effects outstanding; `limit` is how many of those there may be."""

    def __init__(self, limit: int) -> None:
        self.position = 0  # of the last operation
        self._limit = limit
        self._outstanding: dict[Effect, None] = {}
        self._heap: list[tuple[int, int, Effect]] = []
        self._pushes = 0
        self._changed = trio.Event()

    def __len__(self) -> int:
        return len(self._outstanding)

    def begin(self) -> int:
        """The next operation's position."""
        self.position += 1
        return self.position

    def add(self, effect: Effect) -> None:
        self._outstanding[effect] = None
        self._pushes += 1
        heapq.heappush(self._heap, (effect.position, self._pushes, effect))

    def settle(self, effect: Effect) -> None:
        """It took effect, or is wanted no more. Harmless when repeated."""
        if effect in self._outstanding:
            del self._outstanding[effect]
            self.wake()

    def wake(self) -> None:
        """Let those who wait look again."""
        self._changed.set()
        self._changed = trio.Event()

    def oldest(self) -> int | None:
        """The smallest position with an effect outstanding."""
        while self._heap and self._heap[0][2] not in self._outstanding:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def settled(self, position: int) -> bool:
        oldest = self.oldest()
        return oldest is None or oldest > position

    async def changed(self) -> None:
        """Return when something was settled, or failed, after this call."""
        await self._changed.wait()

    async def room(self, wait_s: float) -> None:
        """Return once another operation may be journalled. Raises JournalFullError."""
        with trio.move_on_after(wait_s):
            while len(self._outstanding) >= self._limit:
                await self.changed()
            return
        raise JournalFullError(f"{len(self._outstanding)} changes are not on the grid yet")
