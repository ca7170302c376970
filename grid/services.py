"""What `tahoefs run` runs: the services a node directory enables, on one port, from start to an orderly stop.

    node directory → tub ─┬─ introducer                         Foolscap
                          ├─ storage ── shares on disk          Foolscap
                     port ┴─ storage ── the same                HTTP, unless force_foolscap
                          └─ helper ── a client of the grid     Foolscap
                     publisher: announces the storage to every introducer, again after every reconnection

`serve_node` runs one node until its `stop` is set: then no new connections are taken, requests that came are answered,
and it returns. Cancelling it ends it at once; the disk is left as after a kill, which is fine too.
"""

from __future__ import annotations

import logging
import secrets
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

import trio
from attrs import frozen

from grid.client import join_grid
from grid.crypto import SigningKey, spki_hash_of_certificate
from grid.errors import NodeDirectoryError, PeerError
from grid.formats.announcement import SERVICE_STORAGE, SignedAnnouncement, sign_announcement
from grid.formats.base32 import b2a
from grid.formats.furl import Furl
from grid.node_directory import NodeDirectory
from grid.peers.reconnect import Reconnector, keep_connected
from grid.server.errors import StorageError
from grid.server.expirer import Expirer, ExpiryPolicy
from grid.server.foolscap import FoolscapStorage
from grid.server.gbs import GBSStorage
from grid.server.helper import Helper
from grid.server.helper_files import HelperFiles
from grid.server.introducer import Introducer
from grid.server.shares import ShareStore
from grid.server.storage import StorageService
from grid.server_directory import ServerDirectory
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


async def serve_node(
    node: ServerDirectory, stop: trio.Event, *, task_status: trio.TaskStatus[Serving] = trio.TASK_STATUS_IGNORED
) -> None:
    """Run a node's services until `stop` is set, then answer what is under way and return.

    Raises NodeDirectoryError when a port is in use, or the storage directory cannot be had.
    """
    tub = Tub(node.identity, keepalive_s=node.keepalive_s, location=node.location)
    async with trio.open_nursery() as nursery:
        services: list[str] = []
        store: ShareStore | None = None
        port = CombinedPort(tub=tub)
        published = trio.Event()
        try:
            await nursery.start(tub.run)
            if node.introducer is not None:
                introducer = Introducer()
                await nursery.start(introducer.run)
                tub.register(introducer, node.introducer)
                services.append("introducer")
            if node.storage is not None:
                store = _open_store(node, node.storage)
                service = StorageService(store)
                storage = FoolscapStorage(service)
                for task in (service.run, storage.run, Expirer(service, _expiry(node.storage)).run):
                    await nursery.start(task)
                tub.register(storage, node.storage.swissnum)
                services.append("storage")
                if node.storage.http:
                    handler = GBSStorage(service, node.storage.swissnum)
                    port = CombinedPort(tub=tub, handler=handler, tls=ServerTLS(node.identity))
            helper: Helper | None = None
            if node.helper is not None:
                helper = await nursery.start(_run_helper, node)
                tub.register(helper, node.helper.swissnum)
                services.append("helper")
            async with trio.open_nursery() as listening:
                ports = tuple([await listening.start(_listen, port, node, *endpoint) for endpoint in node.endpoints])
                if node.storage is not None and node.introducers:
                    nursery.start_soon(_publish_everywhere, node, _signed_announcement(node, node.storage), published)
                else:
                    published.set()
                task_status.started(Serving(tuple(services), ports, published))
                await stop.wait()
                listening.cancel_scope.deadline = trio.current_time() + DRAIN_TIMEOUT_S
                if helper is not None:
                    helper.stop()
                await tub.drain()
                port.drain()
            if listening.cancel_scope.cancelled_caught:
                log.warning("stopped with requests unanswered after %g s", DRAIN_TIMEOUT_S)
            nursery.cancel_scope.cancel()
        finally:
            if store is not None:
                store.close()


async def _listen(
    port: CombinedPort, node: ServerDirectory, host: str | None, number: int, *, task_status: trio.TaskStatus[int]
) -> None:
    try:
        await port.run(host or _ANY_INTERFACE, number, task_status=task_status)
    except OSError as error:
        raise NodeDirectoryError(f"{node.path}: cannot listen on port {number}: {error.strerror or error}") from error


async def _run_helper(node: ServerDirectory, *, task_status: trio.TaskStatus[Helper]) -> None:
    """With a client of the grid beneath it, of the same node."""
    settings = node.helper
    assert settings is not None
    files = HelperFiles(settings.directory, reserved_space=settings.reserved_space)
    try:
        files.prepare()
    except OSError as error:
        raise NodeDirectoryError(f"cannot use {settings.directory}: {error.strerror}") from error
    async with join_grid(NodeDirectory.open(node.path)) as client, trio.open_nursery() as nursery:
        helper = Helper(files, client.broker, client.uploader, client.secrets)
        await nursery.start(helper.run)
        task_status.started(helper)


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
