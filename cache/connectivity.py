"""Whether the grid is there. The one place that says what *offline* means:

    fewer servers connected than a file needs shares (k, or all servers if there are fewer), for LOST_S;
    or so few that answer: a server that is silent to what it was asked (`grid/peers/pulse.py`) counts for SILENT_S

Nobody knows of a server that was asked nothing. So when as many as a file needs are silent, all others are asked for a
sign of life, at most every HURRY_S: a grid that hangs as a whole is offline before all were tried in vain.

Whoever needs the grid goes through `reach`, which fails at once while it is offline, and fails what is under way when
it goes offline, so that nobody waits for deadline after deadline. It comes back by itself; each call that found it
offline has the broker dial anew, at most every HURRY_S.

No locks: everything changes between awaits. One task, `run`, looks every LOOK_S.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

import trio

from grid.errors import GridUnreachableError
from grid.interfaces import IStorageBroker

log = logging.getLogger(__name__)

LOST_S: Final = 1.0  # a connection that is dialled anew at once is no reason to fail anything
SILENT_S: Final = 4.0  # on top of the pulse's own patience: busy servers are not gone
LOOK_S: Final = 0.25
HURRY_S: Final = 5.0

T = TypeVar("T")


class Connectivity:
    """`needed`: servers, as many as a file usually needs shares."""

    def __init__(self, broker: IStorageBroker, needed: int) -> None:
        self._broker = broker
        self._needed = needed
        self._few_since = math.inf  # trio's clock, as all times here
        self._silent_since = math.inf
        self._hurried_at = -math.inf
        self._looked_at = -math.inf
        self._scopes: set[trio.CancelScope] = set()
        self.offline = False

    async def run(self, changed: Callable[[], None] = lambda: None) -> None:
        """Watch, until cancelled; `changed` is called after the grid went or came back."""
        while True:
            before = self.offline
            self.look()
            if self.offline != before:
                changed()
            await trio.sleep(LOOK_S)

    def look(self) -> None:
        """Find out how things are now."""
        servers = self._broker.get_known_servers()
        needed = max(1, min(self._needed, len(servers)))
        now = trio.current_time()
        connected = sum(server.connected for server in servers)
        answering = sum(server.connected and server.responsive for server in servers)
        self._few_since = min(self._few_since, now) if connected < needed else math.inf
        self._silent_since = min(self._silent_since, now) if answering < needed else math.inf
        if connected - answering >= needed and now >= self._looked_at + HURRY_S:
            self._looked_at = now
            self._broker.look_for_life()
        offline = now >= min(self._few_since + LOST_S, self._silent_since + SILENT_S)
        if offline and not self.offline:
            log.warning("offline: %d of %d servers are connected, %d answer", connected, len(servers), answering)
            for scope in self._scopes:
                scope.cancel()
        elif self.offline and not offline:
            log.warning("online again: %d servers answer", answering)
        self.offline = offline

    async def reach(self, work: Callable[[], Awaitable[T]]) -> T:
        """What `work` gives. Raises GridUnreachableError when the grid is offline, or goes so meanwhile."""
        if self.offline:
            if trio.current_time() >= self._hurried_at + HURRY_S:
                self._hurried_at = trio.current_time()
                self._broker.retry_now()
        else:
            with trio.CancelScope() as scope:
                self._scopes.add(scope)
                try:
                    return await work()
                finally:
                    self._scopes.discard(scope)
        raise GridUnreachableError("the grid is offline: too few storage servers answer")
