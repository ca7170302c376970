"""Which corrupt shares were reported lately: to the log and to their servers, once a day each.

A share that cannot be replaced (an immutable one, or one of a file we cannot write) is met again at every look at
its file: every few seconds, for as long as a mount lives.
"""

from __future__ import annotations

from typing import Final
from weakref import WeakKeyDictionary

import trio
from cachetools import LRUCache

from grid import stats
from grid.interfaces import IStorageBroker

CORRUPT_SHARES: Final = stats.counter("corrupt_shares", "Damaged shares met on servers, each once a day.")

AGAIN_AFTER_S: Final = 86400.0
REPORTS_KEPT: Final = 4096


class CorruptionReports:
    """One for each grid."""

    def __init__(self) -> None:
        self._made_at: LRUCache[tuple[bytes, str, int], float] = LRUCache(REPORTS_KEPT)  # trio time

    def is_news(self, storage_index: bytes, server_id: str, share_number: int) -> bool:
        """Whether to report this share now; it counts as reported then."""
        key = storage_index, server_id, share_number
        now = trio.current_time()
        if now < self._made_at.get(key, -AGAIN_AFTER_S) + AGAIN_AFTER_S:
            return False
        self._made_at[key] = now
        CORRUPT_SHARES.add()
        return True


_BY_BROKER: WeakKeyDictionary[IStorageBroker, CorruptionReports] = WeakKeyDictionary()


def reports_of(broker: IStorageBroker) -> CorruptionReports:
    """The one shared by everything that reads through this broker."""
    return _BY_BROKER.setdefault(broker, CorruptionReports())
