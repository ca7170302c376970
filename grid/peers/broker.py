"""The storage broker: which servers are known and connected, and in which order to ask them for a file.

The order is that of SHA1(storage index + permutation seed), preferred servers first: every client of a grid
gets the same one, so a reader looks first where the writer put the shares. Servers that have stopped
answering come last, as long as they do.

Servers come from introducers (`grid/peers/introducer.py`) and from `servers.yaml`, whose entries count more. One that
announces where it is reached over HTTP is used over HTTP, all others over Foolscap; never one and then the other.
Source: Tahoe-LAFS 1.20's server selection.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeAlias

import trio
from cachetools import LRUCache

from grid.errors import FormatError
from grid.formats.announcement import SERVICE_STORAGE, Announcement, certified_until, from_mapping
from grid.formats.furl import Furl
from grid.formats.hashutil import permuted_key
from grid.interfaces import IStorageServer
from grid.peers.foolscap_storage import FoolscapStorageServer
from grid.peers.gbs_storage import GBSStorageServer
from grid.peers.introducer import IntroducerClient, cache_path
from grid.peers.reconnect import Reconnector
from grid.peers.suspend import watch_for_suspend
from grid.wire.gbs import Nurl, usable_nurls

log = logging.getLogger(__name__)

SERVERS_MAX: Final = 2000
DIALS_AT_ONCE_MAX: Final = 64
MISTAKE_PAUSE_S: Final = 60.0  # after a mistake of ours
ORDERS_KEPT: Final = 256  # of all servers; directories are looked at again and again
SETTLE_S: Final = 2.0  # so long nothing may change before "these are all there are" is believed
_LOOK_AGAIN_S: Final = 0.5  # a slow dial settles by time alone

StorageServer: TypeAlias = FoolscapStorageServer | GBSStorageServer


class StorageBroker:
    """IStorageBroker. `run()` finds servers and keeps them connected."""

    def __init__(
        self,
        *,
        introducers: Mapping[str, Furl],
        static_servers: Mapping[str, Mapping[str, Any]],
        keepalive_s: float,
        preferred: tuple[str, ...] = (),
        grid_manager_keys: tuple[bytes, ...] = (),
        nickname: str = "",
        cache_directory: Path | None = None,
        force_foolscap: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._preferred = frozenset(preferred)
        self._grid_manager_keys = grid_manager_keys
        self._keepalive_s = keepalive_s
        self._force_foolscap = force_foolscap
        self._clock = clock
        self._servers: dict[str, StorageServer] = {}
        self._static_ids: frozenset[str] = frozenset()
        self._full = False
        self._orders: LRUCache[bytes, list[StorageServer]] = LRUCache(ORDERS_KEPT)  # by storage index
        self._certified: dict[str, tuple[Announcement, float]] = {}  # until when, by server id
        self._running: dict[str, trio.CancelScope] = {}
        self._nursery: trio.Nursery | None = None
        self._reconnector = Reconnector()
        self._dials = trio.CapacityLimiter(DIALS_AT_ONCE_MAX)
        self._changed = trio.Event()
        self.introducers = [
            IntroducerClient(
                petname,
                furl,
                announced=self.add_announcement,
                changed=self._wake,
                cache_path=cache_path(cache_directory, petname) if cache_directory else None,
                nickname=nickname,
                keepalive_s=keepalive_s,
            )
            for petname, furl in introducers.items()
        ]
        for introducer in self.introducers:
            introducer.subscribe_to(SERVICE_STORAGE)
        for server_id, mapping in static_servers.items():
            try:
                self.add_announcement(from_mapping(server_id, mapping))
            except FormatError as error:
                log.warning("servers.yaml: entry %s left out: %s", server_id[:11], error)
        self._static_ids = frozenset(self._servers)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled: `await nursery.start(broker.run)`. Being offline is no error."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                for server in self._servers.values():
                    nursery.start_soon(self._run_server, server)
                for introducer in self.introducers:
                    nursery.start_soon(self._run_peer, introducer)
                task_status.started()
                await watch_for_suspend(self.doubt_connections)
        finally:
            self._nursery = None

    async def _run_server(self, server: StorageServer) -> None:
        with trio.CancelScope() as scope:
            if self._servers.get(server.server_id) is server:  # not replaced before it could start
                self._running[server.server_id] = scope
                await self._run_peer(server)

    async def _run_peer(self, peer: StorageServer | IntroducerClient) -> None:
        """Until cancelled. A mistake of ours, which a peer may have found, costs that peer, and nothing else."""
        while True:
            try:
                await peer.run(self._reconnector, self._dials)
            except Exception:
                log.exception("%r failed", peer)
                peer.last_failure = "internal error, see the log"
                self._wake()
            await trio.sleep(MISTAKE_PAUSE_S)

    def doubt_connections(self) -> None:
        """The network may be another than it was. Who does not answer soon is dialled anew, who was away at once."""
        log.info("back after a suspend: looking which of %d connections are alive", self.connected_count)
        for peer in (*self._servers.values(), *self.introducers):
            peer.doubt()
        self._reconnector.reset_all()

    def retry_now(self) -> None:
        self._reconnector.reset_all()

    def look_for_life(self) -> None:
        for server in self._servers.values():
            server.wonder()

    def add_announcement(self, announcement: Announcement) -> None:
        """Take over a server that was announced, again or for the first time. Static servers stay as they are."""
        server_id = announcement.server_id
        if server_id in self._static_ids:
            return
        held = self._servers.get(server_id)
        if held is not None and self._place(held.announcement) == self._place(announcement):
            held.announcement = announcement  # the place is the same: stay connected
            self._orders.clear()
            return
        if held is None and len(self._servers) >= SERVERS_MAX:
            if not self._full:
                log.warning("more than %d storage servers: the others are left out", SERVERS_MAX)
            self._full = True
            return
        try:
            server = self._server_of(announcement)
        except FormatError as error:
            log.warning("storage server %s left out: %s", server_id.removeprefix("v0-")[:8], error)
            return
        if scope := self._running.pop(server_id, None):
            scope.cancel()  # it moved
        self._servers[server_id] = server
        self._orders.clear()
        if self._nursery is not None:
            self._nursery.start_soon(self._run_server, server)
        self._wake()

    def _place(self, announcement: Announcement) -> object:
        """Where the server is, and over what: when that changes, it is connected anew."""
        return announcement.furl, frozenset(self._nurls_of(announcement))

    def _nurls_of(self, announcement: Announcement) -> list[Nurl]:
        return [] if self._force_foolscap else usable_nurls(announcement.nurls)

    def _server_of(self, announcement: Announcement) -> StorageServer:
        """Raises FormatError."""
        if self._nurls_of(announcement):
            return GBSStorageServer(announcement, changed=self._wake)
        return FoolscapStorageServer(announcement, keepalive_s=self._keepalive_s, changed=self._wake)

    # --- IStorageBroker ---------------------------------------------------------------------------------------------

    def get_permuted_servers(self, storage_index: bytes) -> list[IStorageServer]:
        order = self._orders.get(storage_index)
        if order is None:
            order = self._orders[storage_index] = sorted(self._servers.values(), key=partial(self._rank, storage_index))
        connected = [server for server in order if server.connected]
        # who does not answer comes last
        connected.sort(key=_is_unresponsive)
        return [*connected]

    def _rank(self, storage_index: bytes, server: StorageServer) -> tuple[bool, bytes]:
        return server.server_id not in self._preferred, permuted_key(storage_index, server.permutation_seed)

    def get_known_servers(self) -> list[IStorageServer]:
        return list(self._servers.values())

    @property
    def connected_count(self) -> int:
        return sum(server.connected for server in self._servers.values())

    def permits_upload(self, server: IStorageServer) -> bool:
        if not self._grid_manager_keys:
            return True
        held = self._servers.get(server.server_id)
        if held is None:
            return False
        announcement, until = self._certified.get(held.server_id, (None, 0.0))
        if announcement is not held.announcement:  # verifying takes longer than all else a placement does
            certificates = held.announcement.grid_manager_certificates
            until = certified_until(certificates, self._grid_manager_keys, held.server_id)
            self._certified[held.server_id] = held.announcement, until
        return until > self._clock()

    async def wait_for_servers(self, count: int, timeout_s: float) -> int:
        """Also returns, with fewer, once all introducers and servers known have answered or failed, for SETTLE_S."""
        with trio.move_on_after(timeout_s):
            while self.connected_count < count:
                changed = self._changed
                settled = self._settled
                with trio.move_on_after(SETTLE_S if settled else _LOOK_AGAIN_S) as quiet:
                    await changed.wait()
                if settled and quiet.cancelled_caught:
                    break
        return self.connected_count

    @property
    def _settled(self) -> bool:
        return all(introducer.settled for introducer in self.introducers) and all(
            server.settled for server in self._servers.values()
        )

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()


def _is_unresponsive(server: StorageServer) -> bool:
    return not server.responsive
