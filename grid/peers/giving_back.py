"""Shares on one server that are being given back: allocated for an upload that was given up meanwhile.

A server refuses a share that it takes to be on its way already. Whoever uploads the same file again just after the
first upload was cancelled would be refused because of that one, so an allocation waits for what is being given back of
the same storage index. Nobody else waits: who gave up goes on at once.
"""

from __future__ import annotations

import trio

from grid.peers.deadlines import GIVING_BACK_TIMEOUT_S


class GivingBack:
    """Of one server. Holds no more than what is under way."""

    def __init__(self) -> None:
        self._under_way: dict[bytes, set[trio.Event]] = {}

    def note(self, storage_index: bytes, done: trio.Event) -> None:
        """Until `done` is set, shares of it may be taken for being on their way."""
        events = self._under_way.setdefault(storage_index, set())
        events.difference_update([event for event in events if event.is_set()])
        events.add(done)

    async def wait(self, storage_index: bytes) -> None:
        """Return when all of it was given back; or after a while, for the server may be hanging."""
        with trio.move_on_after(GIVING_BACK_TIMEOUT_S):
            for event in list(self._under_way.get(storage_index, ())):
                await event.wait()
        events = self._under_way.get(storage_index)
        if events is not None and all(event.is_set() for event in events):
            del self._under_way[storage_index]
