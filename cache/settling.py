"""When a file may be sent: once it has rested, so that one that keeps changing is not sent each time it does.

    stored                       may be sent after `settle_s`
    stored again d seconds later after twice that time (at least `settle_s`), for it will probably be stored again
    in any case                  `latest_s` after the first version that was not sent

It is names that are stored again and again: each version is a PendingFile of its own. A file that is renamed over
another is one more version of that one, which is how many editors save. A mutable file goes by its storage index. The
clock is given; no I/O.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeAlias

from attrs import frozen
from cachetools import TTLCache

from cache.pending import PendingFile

NAMES_MAX: Final = 10_000  # remembered; a name that is forgotten is taken for new

# A storage index; or the id of a Directory, with a name in it: once that is gone it may mean another one, which costs a
# delay and nothing else.
Name: TypeAlias = bytes | tuple[int, str]


@frozen
class _Stored:
    at: float
    unsent_since: float | None  # when the first version after the last one sent was stored


class Settling:
    def __init__(self, settle_s: float, latest_s: float, clock: Callable[[], float]) -> None:
        self._settle_s = settle_s
        self._latest_s = latest_s
        self._clock = clock
        self._stored: TTLCache[Name, _Stored] = TTLCache(NAMES_MAX, latest_s, timer=clock)
        self._names: dict[PendingFile, set[Name]] = {}  # under which each was noted

    def note(self, file: PendingFile) -> tuple[float, bool]:
        """A file was stored, or got another name: (when it may be sent, is it known to keep changing?).

        The time is that of the names it got since the last call; without any, now.
        """
        now = self._clock()
        noted = self._names.setdefault(file, set())
        names = {(id(change.directory), change.name) for change in file.links} - noted
        noted |= names
        answers = [self.note_name(name) for name in names]
        return max((due for due, _ in answers), default=now), any(again for _, again in answers)

    def note_name(self, name: Name) -> tuple[float, bool]:
        """The same for one name."""
        now = self._clock()
        last = self._stored.get(name)
        since = now if last is None or last.unsent_since is None else last.unsent_since
        self._stored[name] = _Stored(now, since)
        rest_s = self._settle_s if last is None else max(self._settle_s, 2 * (now - last.at))
        return min(now + rest_s, since + self._latest_s), last is not None

    def sent(self, file: PendingFile) -> None:
        """What was stored under its names is on the grid."""
        for name in self._names.pop(file, ()):
            self.sent_name(name)

    def sent_name(self, name: Name) -> None:
        if (stored := self._stored.get(name)) is not None:
            self._stored[name] = _Stored(stored.at, None)

    def dropped(self, file: PendingFile) -> None:
        """It will not be sent; a newer version of it may."""
        self._names.pop(file, None)
