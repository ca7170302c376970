"""ShareFinder: walks the permuted server list until enough shares of one file are known.

Shares may sit anywhere in the list, so the search gives up only at its end. At first so many servers are asked as
shares are wanted, since a healthy file has one on each at the head of the list; as soon as one of them turns out to
have none, QUERIES_MAX at a time. One that is late no longer holds up the others. The search belongs to the read
that needs it: it stops with that read and the next one carries on from there.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from typing import Final

import trio

from grid.errors import PeerError, PeerTimeoutError, ShareError
from grid.interfaces import IStorageBroker, IStorageServer
from grid.operations.responsiveness import Bell, Responsiveness
from grid.operations.share_reader import FileState, RemoteShare

log = logging.getLogger(__name__)

QUERIES_MAX: Final = 10  # unanswered and not late
SPARE_QUERIES: Final = 2  # beyond k in the first round: each costs its server as much as the read of a small share
QUERY_TIMEOUT_S: Final = 10.0
ATTEMPTS_MAX: Final = 2  # per server and search: a lost connection may be back
SHARES_PER_SERVER_MAX: Final = 256


class ShareFinder:
    """One file's shares as known so far. Shared by all reads of the file."""

    def __init__(self, broker: IStorageBroker, file: FileState, responsiveness: Responsiveness) -> None:
        self.shares: list[RemoteShare] = []  # usable, as far as known, in the order found
        self.failures: dict[str, PeerError] = {}  # {server id: why it did not answer, in this search}
        self.condemned: dict[tuple[str, int], ShareError] = {}  # {(server id, share number): what is wrong with it}
        self.searches = 0  # begun
        self._broker = broker
        self._file = file
        self._responsiveness = responsiveness
        self._listeners: set[Bell] = set()
        self._walk = trio.Lock()  # held by the one read that searches on behalf of all
        self._unasked: list[IStorageServer] = []
        self._attempts: Counter[str] = Counter()
        self._disappointed = False  # a server had nothing, or did not answer: the shares are not where they should be

    @property
    def exhausted(self) -> bool:
        return self.searches > 0 and not self._unasked and not self._walk.locked()

    def restart(self) -> None:
        """Search anew: the next find() asks all servers now connected that hold no share we know."""
        holders = {share.server.server_id for share in self.shares}
        order = self._broker.get_permuted_servers(self._file.storage_index)
        unasked = [server for server in order if server.server_id not in holders]
        self._unasked = sorted(unasked, key=lambda server: self._responsiveness.is_late(server.server_id))
        self._attempts.clear()
        self.failures.clear()
        self.searches += 1

    def condemn(self, share: RemoteShare, error: ShareError) -> None:
        """This share is of no use, now and in later searches."""
        self.condemned[share.server.server_id, share.number] = error
        self._forget(share)

    def lost(self, share: RemoteShare) -> None:
        """Its reader is dead; the server may be asked for another one."""
        self._forget(share)
        if share.server not in self._unasked and self._attempts[share.server.server_id] < ATTEMPTS_MAX:
            self._unasked.append(share.server)

    def _forget(self, share: RemoteShare) -> None:
        if share in self.shares:
            self.shares.remove(share)

    async def find(self, enough: Callable[[], bool], listener: Bell) -> None:
        """Search until `enough()` or the end of the list; rings `listener` whenever shares were found.

        While one read searches, others wait for it and, if it is cancelled, take over.
        """
        self._listeners.add(listener)
        try:
            async with self._walk:
                if not self.searches:
                    self.restart()
                if not enough():
                    await self._ask_in_order(enough)
        finally:
            self._listeners.discard(listener)
            listener.ring()

    async def _ask_in_order(self, enough: Callable[[], bool]) -> None:
        asked: dict[IStorageServer, float] = {}  # {server without answer yet: when it was asked}
        bell = Bell()

        async def ask(server: IStorageServer) -> None:
            await self._ask(server)
            del asked[server]
            bell.ring()

        try:
            await self._ask_while(enough, asked, bell, ask)
        finally:
            self._put_back(asked)

    async def _ask_while(
        self,
        enough: Callable[[], bool],
        asked: dict[IStorageServer, float],
        bell: Bell,
        ask: Callable[[IStorageServer], Awaitable[None]],
    ) -> None:
        async with trio.open_nursery() as nursery:
            while not enough():
                now = trio.current_time()
                late_after = self._responsiveness.hedge_delay_s
                patient = [began for began in asked.values() if now < began + late_after]
                while self._unasked and len(patient) < self._at_once():
                    server = self._unasked.pop(0)
                    asked[server] = now
                    patient.append(now)
                    nursery.start_soon(ask, server)
                for server, began in asked.items():
                    if now >= began + late_after:
                        self._disappointed = True
                        self._responsiveness.late(server.server_id)
                if not asked:
                    break
                await bell.wait_until(min((began + late_after for began in patient), default=math.inf))
            nursery.cancel_scope.cancel()

    def _at_once(self) -> int:
        """How many servers to have asked, not counting those that are late."""
        if self._disappointed:
            return QUERIES_MAX
        return max(1, self._file.k + SPARE_QUERIES - len({share.number for share in self.shares}))

    def _put_back(self, asked: Iterable[IStorageServer]) -> None:
        """Servers that had not answered when it was enough: asked again when it is not, late ones last."""
        for server in asked:
            self._attempts[server.server_id] += self._responsiveness.is_late(server.server_id)
        again = [server for server in asked if self._attempts[server.server_id] < ATTEMPTS_MAX]
        self._unasked = sorted([*again, *self._unasked], key=lambda s: self._responsiveness.is_late(s.server_id))

    async def _ask(self, server: IStorageServer) -> None:
        began = trio.current_time()
        try:
            with trio.move_on_after(QUERY_TIMEOUT_S) as scope:
                readers = await server.get_buckets(self._file.storage_index)
            if scope.cancelled_caught:
                raise PeerTimeoutError(f"server {server.name} did not say what it holds")
        except PeerError as error:
            log.info("server %s: %s", server.name, error)
            self.failures[server.server_id] = error
            self._attempts[server.server_id] += 1
            self._disappointed = True
            return
        self._attempts[server.server_id] += 1
        self._responsiveness.said_what_it_holds(server.server_id, trio.current_time() - began)
        self._disappointed |= not readers
        known = {(share.server.server_id, share.number) for share in self.shares} | self.condemned.keys()
        for number in sorted(readers)[:SHARES_PER_SERVER_MAX]:
            if 0 <= number < self._file.n and (server.server_id, number) not in known:
                self.shares.append(RemoteShare(self._file, server, number, readers[number]))
        for listener in self._listeners:
            listener.ring()
