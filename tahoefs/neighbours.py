"""Guesses which files of a directory will be read next, from the order in which the last ones were.

A program that reads a whole directory takes its files as they are listed (rsync, grep, Python), or by inode number (cp,
tar). Three files in a row that stand close together in one of these orders make a *walk*: from then on the next ones
are named before they are asked for, 2 at first, then twice as many each time, up to WINDOW_FILES_MAX. A read from
elsewhere ends the walk. Once a walk was long, its order is expected in other directories too, and a read
of the very first file there is enough. So whoever opens single files costs nothing beyond them.

Pure: remembers names and positions, fetches nothing.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from typing import Final

from attrs import define, field
from cachetools import LRUCache

DIRECTORIES_MAX: Final = 8  # watched at a time
WINDOW_FILES_MAX: Final = 16
GAP_MAX: Final = 3  # names that a walk may skip, in either direction: several readers come a little out of order
START_READS: Final = 3  # in a row, before anything is guessed
LONG_WALK: Final = 8  # files; then its order is a habit

Orders = Sequence[Sequence[str]]


@define(eq=False)
class _Watch:
    """One directory. `indexes`: name to position, for each order, as of `version` of the listing."""

    recent: deque[str] = field(factory=lambda: deque(maxlen=START_READS))
    version: object = None
    orders: Orders = ()
    indexes: list[dict[str, int]] = field(factory=list)
    order: int | None = None  # of the walk, if one is on
    at: int = 0  # its furthest read
    named: int = 0  # positions below this were named
    window: int = 0
    length: int = 0

    def learn(self, version: object, orders: Orders) -> None:
        self.version, self.orders, self.order = version, orders, None
        self.indexes = [{name: place for place, name in enumerate(order)} for order in orders]

    def begin(self, order: int, at: int) -> None:
        self.order, self.at, self.named, self.window, self.length = order, at, at + 1, 1, 0


class Neighbours:
    """Feed it every file that begins to be read; it answers with the names to have ready, nearest first."""

    def __init__(self) -> None:
        self._watched: LRUCache[Hashable, _Watch] = LRUCache(DIRECTORIES_MAX)
        self._habit: int | None = None

    def note(self, directory: Hashable, name: str, version: object, orders: Callable[[], Orders]) -> Sequence[str]:
        """`orders()`: the directory's names in each order; asked for only when a guess might come of it.

        It is believed while `version` stays the same.
        """
        watch = self._watched.get(directory)
        if watch is None:
            watch = self._watched[directory] = _Watch()
        watch.recent.append(name)
        if watch.order is None or not self._follows(watch, name):
            watch.order = None
            if len(watch.recent) < START_READS and (self._habit is None or len(watch.recent) > 1):
                return ()
            if watch.version != version or not watch.orders:
                watch.learn(version, orders())
            self._find_walk(watch, name)
        return self._next(watch)

    def _follows(self, watch: _Watch, name: str) -> bool:
        assert watch.order is not None
        place = watch.indexes[watch.order].get(name)
        if place is None or abs(place - watch.at) > max(GAP_MAX, watch.window):
            return False
        watch.at = max(watch.at, place)
        watch.length += 1
        if watch.length >= LONG_WALK:
            self._habit = watch.order
        return True

    def _find_walk(self, watch: _Watch, name: str) -> None:
        if len(watch.recent) == START_READS:
            for order, index in enumerate(watch.indexes):
                places = [index.get(each, -GAP_MAX) for each in watch.recent]
                steps = [after - before for before, after in itertools.pairwise(places)]
                if min(places) >= 0 and all(0 < step <= GAP_MAX for step in steps):
                    watch.begin(order, places[-1])
                    return
        if self._habit is not None and self._habit < len(watch.orders) and watch.orders[self._habit][:1] == [name]:
            watch.begin(self._habit, 0)

    def _next(self, watch: _Watch) -> Sequence[str]:
        if watch.order is None:
            return ()
        watch.window = min(WINDOW_FILES_MAX, watch.window * 2)
        start, stop = max(watch.named, watch.at + 1), watch.at + 1 + watch.window
        watch.named = max(watch.named, stop)
        return watch.orders[watch.order][start:stop]
