"""What `tahoefs run` runs: the services a node directory enables, on one port, from start to an orderly stop.

    node directory → tub ─┬─ introducer                         Foolscap
                          ├─ storage ── shares on disk          Foolscap
                     port ┴─ storage ── the same                HTTP, unless force_foolscap
                          ├─ helper ── a client of the grid     Foolscap
                          ├─ control ─ the same, on demand      Foolscap
                          └─ statistics gatherer                Foolscap
                     publisher: announces the storage to every introducer, again after every reconnection

`serve_node` runs one node until its `stop` is set: then no new connections are taken, requests that came are answered,
and it returns. Cancelling it ends it at once; the disk is left as after a kill, which is fine too.
"""

from __future__ import annotations

import logging
import secrets
import sqlite3
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

import trio
from attrs import frozen

from grid.atomic_file import replace_file
from grid.client import METRICS as client_metrics
from grid.client import GridClient, join_grid
from grid.control import ControlClient
from grid.crypto import SigningKey, spki_hash_of_certificate
from grid.errors import NodeDirectoryError, PeerError
from grid.formats.announcement import SERVICE_STORAGE, SignedAnnouncement, sign_announcement
from grid.formats.base32 import b2a
from grid.formats.furl import Furl
from grid.node_directory import NodeDirectory
from grid.operations import process
from grid.operations.process import ProcessStats
from grid.peers.reconnect import Reconnector, keep_connected
from grid.peers.stats_gatherer import provide_stats
from grid.server.allocator import keep_freed_memory
from grid.server.errors import StorageError
from grid.server.expirer import Expirer, ExpiryPolicy
from grid.server.foolscap import FoolscapStorage
from grid.server.gatherer import DATABASE, History, StatsGatherer
from grid.server.gbs import GBSStorage
from grid.server.helper import METRICS as helper_metrics
from grid.server.helper import Helper
from grid.server.helper_files import HelperFiles
from grid.server.introducer import METRICS as introducer_metrics
from grid.server.introducer import Introducer
from grid.server.shares import ShareStore
from grid.server.stats import METRICS as storage_metrics
from grid.server.stats import StorageStats
from grid.server.storage import StorageService
from grid.server_directory import HelperSettings, ServerDirectory
from grid.stats import Registry
from grid.storage_settings import StorageSettings
from grid.transports.listener import CombinedPort
from grid.transports.tls import ServerTLS
from grid.transports.tub import Referenceable, RemoteReference, Tub
from grid.wire.gbs import Nurl
from grid.wire.remote_interfaces import RIIntroducerPublisherAndSubscriberService_v2

log = logging.getLogger(__name__)

DRAIN_TIMEOUT_S: Final = 20.0  # for requests under way when we are told to stop
PUBLISH_TIMEOUT_S: Final = 60.0
DIALS_AT_ONCE_MAX: Final = 8
NONCE_BYTES: Final = 32
_ANY_INTERFACE: Final = "0.0.0.0"  # "listen" in the configuration means this


@frozen
class Serving:
    """What runs, once it does."""

    services: tuple[str, ...]
    ports: tuple[int, ...]
    published: trio.Event  # every introducer has our announcement; set at once when there is nothing to announce
    registry: Registry  # of statistics


async def serve_node(
    node: ServerDirectory, stop: trio.Event, *, task_status: trio.TaskStatus[Serving] = trio.TASK_STATUS_IGNORED
) -> None:
    """Run a node's services until `stop` is set, then answer what is under way and return.

    Raises NodeDirectoryError when a port is in use, or a directory cannot be had.
    """
    keep_freed_memory()
    async with trio.open_nursery() as nursery:
        services = _Services(node, nursery)
        published = trio.Event()
        try:
            await services.start()
            port = services.port
            async with trio.open_nursery() as listening:
                ports = tuple([await listening.start(_listen, port, node, *endpoint) for endpoint in node.endpoints])
                if node.storage is not None and node.introducers:
                    nursery.start_soon(_publish_everywhere, node, _signed_announcement(node, node.storage), published)
                else:
                    published.set()
                task_status.started(Serving(tuple(services.names), ports, published, services.registry))
                await stop.wait()
                listening.cancel_scope.deadline = trio.current_time() + DRAIN_TIMEOUT_S
                await services.drain()
                port.drain()
            if listening.cancel_scope.cancelled_caught:
                log.warning("stopped with requests unanswered after %g s", DRAIN_TIMEOUT_S)
            nursery.cancel_scope.cancel()
        finally:
            services.close()


class _Services:
    """One node's services, as its directory enables them. Their tasks are in `nursery`."""

    def __init__(self, node: ServerDirectory, nursery: trio.Nursery) -> None:
        self.names: list[str] = []
        self.registry = Registry()
        self._node = node
        self._nursery = nursery
        self._tub = Tub(node.identity, keepalive_s=node.keepalive_s, location=node.location)
        self.port = CombinedPort(tub=self._tub)
        self._grid = _GridOnDemand(node, nursery, self.registry)
        self._store: ShareStore | None = None
        self._helper: Helper | None = None
        self._history: History | None = None

    async def start(self) -> None:
        """Raises NodeDirectoryError."""
        node = self._node
        self.registry.register(ProcessStats(), process.METRICS)
        await self._nursery.start(self._tub.run)
        if node.introducer is not None:
            await self._start_introducer(node.introducer)
        if node.gatherer is not None:
            await self._start_gatherer(node.gatherer)
        if node.storage is not None:
            await self._start_storage(node.storage)
        if node.helper is not None:
            await self._start_helper(node.helper)
        if node.storage is not None or node.helper is not None:
            furl = self._tub.register(ControlClient(self._grid.client))  # under a new name at every start
            replace_file(node.path / "private" / "control.furl", f"{furl}\n".encode())
        if node.stats_gatherer is not None:
            provide = partial(provide_stats, keepalive_s=node.keepalive_s)
            self._nursery.start_soon(provide, node.stats_gatherer, self.registry, node.nickname, node.identity)

    async def drain(self) -> None:
        """Answer what was asked; the caller sets the deadline."""
        if self._helper is not None:
            self._helper.stop()
        await self._tub.drain()

    def close(self) -> None:
        if self._store is not None:
            self._store.close()
        if self._history is not None:
            self._history.close()

    async def _start_introducer(self, swissnum: str) -> None:
        introducer = Introducer()
        await self._nursery.start(introducer.run)
        self._tub.register(introducer, swissnum)
        self.registry.register(introducer, introducer_metrics)
        self.names.append("introducer")

    async def _start_gatherer(self, swissnum: str) -> None:
        path = self._node.path / DATABASE
        try:
            self._history = await trio.to_thread.run_sync(History, path)
        except sqlite3.Error as error:
            raise NodeDirectoryError(f"cannot use {path}: {error}") from error
        gatherer = StatsGatherer(self._history)
        await self._nursery.start(gatherer.run)
        self._tub.register(gatherer, swissnum)
        self.names.append("stats-gatherer")

    async def _start_storage(self, settings: StorageSettings) -> None:
        self._store = _open_store(self._node, settings)
        service = StorageService(self._store)
        storage = FoolscapStorage(service)
        expirer = Expirer(service, _expiry(settings))
        for task in (service.run, storage.run, expirer.run):
            await self._nursery.start(task)
        self._tub.register(storage, settings.swissnum)
        self.registry.register(StorageStats(service, expirer), storage_metrics)
        self.names.append("storage")
        if settings.http:
            handler = GBSStorage(service, settings.swissnum)
            self.port = CombinedPort(tub=self._tub, handler=handler, tls=ServerTLS(self._node.identity))

    async def _start_helper(self, settings: HelperSettings) -> None:
        files = HelperFiles(settings.directory, reserved_space=settings.reserved_space)
        try:
            files.prepare()
        except OSError as error:
            raise NodeDirectoryError(f"cannot use {settings.directory}: {error.strerror}") from error
        client = await self._grid.client()
        self._helper = Helper(files, client.broker, client.uploader, client.secrets)
        await self._nursery.start(self._helper.run)
        self._tub.register(self._helper, settings.swissnum)
        self.registry.register(self._helper, helper_metrics)
        self.names.append("helper")


class _GridOnDemand:
    """The grid, joined as a client of the same node when somebody first needs it, and left when the node ends."""

    def __init__(self, node: ServerDirectory, nursery: trio.Nursery, registry: Registry) -> None:
        self._node = node
        self._nursery = nursery
        self._registry = registry
        self._joining = trio.Lock()  # held by the one who joins
        self._client: GridClient | None = None

    async def client(self) -> GridClient:
        """Raises NodeDirectoryError."""
        async with self._joining:
            if self._client is None:
                self._client = await self._nursery.start(self._run)
                self._registry.register(self._client, client_metrics)
            return self._client

    async def _run(self, *, task_status: trio.TaskStatus[GridClient]) -> None:
        async with join_grid(NodeDirectory.open(self._node.path)) as client:
            task_status.started(client)
            await trio.sleep_forever()


async def _listen(
    port: CombinedPort, node: ServerDirectory, host: str | None, number: int, *, task_status: trio.TaskStatus[int]
) -> None:
    try:
        await port.run(host or _ANY_INTERFACE, number, task_status=task_status)
    except OSError as error:
        raise NodeDirectoryError(f"{node.path}: cannot listen on port {number}: {error.strerror or error}") from error


def _open_store(node: ServerDirectory, settings: StorageSettings) -> ShareStore:
    try:
        return ShareStore(
            settings.directory,
            reserved_space=settings.reserved_space,
            readonly=settings.readonly,
            tub_id=Furl(node.identity.tub_id, (), "").tub_id_bytes,
        )
    except (StorageError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise NodeDirectoryError(f"cannot use the storage directory {settings.directory}: {reason}") from error


def _expiry(settings: StorageSettings) -> ExpiryPolicy:
    expiry = settings.expiry
    return ExpiryPolicy(expiry.enabled, expiry.mode, expiry.override_lease_duration_s, expiry.cutoff, expiry.kinds)


# --- announcing -------------------------------------------------------------------------------------------------


def storage_announcement(
    node: ServerDirectory, settings: StorageSettings, *, seqnum: int, nonce: str
) -> dict[str, Any]:
    """The announcement, with the keys and in the order that 1.20 has them."""
    furl = f"pb://{node.identity.tub_id}@{node.location}/{settings.swissnum}"
    announcement: dict[str, Any] = {
        "version": 0,
        "nickname": node.nickname,
        "app-versions": [],
        "my-version": _my_version(),
        "oldest-supported": "1.0.0",
        "service-name": SERVICE_STORAGE,
        "permutation-seed-base32": settings.permutation_seed,
    }
    if settings.http and (nurls := _nurls(node, settings)):
        announcement["anonymous-storage-NURLs"] = nurls
    announcement["anonymous-storage-FURL"] = furl
    if settings.certificates:
        announcement["grid-manager-certificates"] = [dict(each) for each in settings.certificates]
    return announcement | {"seqnum": seqnum, "nonce": nonce}


def _nurls(node: ServerDirectory, settings: StorageSettings) -> list[str]:
    """One for each address we can be dialled at."""
    spki_hash = spki_hash_of_certificate(node.identity.certificate_der)
    places = Furl.parse(f"pb://{node.identity.tub_id}@{node.location}/x").tcp_hints()
    return [str(Nurl(spki_hash, host, port, settings.swissnum)) for host, port in places]


def _my_version() -> str:
    try:
        return f"tahoefs/{version('tahoefs')}"
    except PackageNotFoundError:
        return "tahoefs"


def _signed_announcement(node: ServerDirectory, settings: StorageSettings) -> SignedAnnouncement:
    assert isinstance(node.signing_key, SigningKey)
    announcement = storage_announcement(
        node, settings, seqnum=node.next_seqnum(), nonce=b2a(secrets.token_bytes(NONCE_BYTES))
    )
    return sign_announcement(announcement, node.signing_key)


async def _publish_everywhere(node: ServerDirectory, signed: SignedAnnouncement, published: trio.Event) -> None:
    """To every introducer, again whenever a connection is new: an introducer forgets when it is restarted."""
    reconnector, dials = Reconnector(), trio.CapacityLimiter(DIALS_AT_ONCE_MAX)
    waiting = set(node.introducers)

    async def publish_to(petname: str, furl: Furl) -> None:
        backoff = reconnector.join()
        failures = 0

        async def serve(_: Tub, introducer: RemoteReference) -> None:
            nonlocal failures
            await introducer.call("publish_v2", signed, Referenceable(), timeout_s=PUBLISH_TIMEOUT_S)
            backoff.connected()
            failures = 0
            log.info("announced to introducer %r", petname)
            waiting.discard(petname)
            if not waiting:
                published.set()
            await trio.sleep_forever()

        def failed(error: PeerError) -> None:
            nonlocal failures
            log.log(logging.DEBUG if failures else logging.WARNING, "introducer %r: %s", petname, error)
            failures += 1

        await keep_connected(
            furl,
            RIIntroducerPublisherAndSubscriberService_v2,
            serve=serve,
            failed=failed,
            backoff=backoff,
            dials=dials,
            keepalive_s=node.keepalive_s,
        )

    async with trio.open_nursery() as nursery:
        for petname, furl in node.introducers.items():
            nursery.start_soon(publish_to, petname, furl)
