"""The introducer: tells every subscriber what every publisher said of itself, and keeps nothing on disk.

    publish_v2(announcement, canary)       kept by (service name, key); goes on to the service's subscribers
    subscribe_v2(subscriber, name, info)   answered once the subscriber has taken all that is known

A newer announcement replaces an older one of the same service and key if its seqnum says so. Nothing expires: after a
restart publishers announce themselves again when they reconnect. A subscription ends with its connection.

Announcements that come while a subscriber is busy with earlier ones go out together, the newest of each key: a slow
subscriber costs no more memory than a quick one. Source: Tahoe-LAFS 1.20's introducer protocol, version 2.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, ClassVar, Final

import trio
from attrs import define, field

from grid.errors import FormatError, PeerError, RemoteFailure, Violation
from grid.formats.announcement import Announcement, SignedAnnouncement, parse_signed
from grid.peers.introducer import supersedes
from grid.stats import Metric
from grid.transports.tub import Referenceable, RemoteReference
from grid.wire.remote_interfaces import RIIntroducerPublisherAndSubscriberService_v2
from grid.wire.schemas import RemoteInterface

log = logging.getLogger(__name__)

METRICS: Final = (
    Metric("introducer_announcements", "gauge", "Announcements this introducer passes on."),
    Metric("introducer_subscriptions", "gauge", "Clients that hear of announcements."),
)
V2_KEY: Final = b"http://allmydata.org/tahoe/protocols/introducer/v2"
APPLICATION_VERSION: Final = b"tahoe-lafs/1.20.0"  # what peers know; they look at the key above, not at this
ANNOUNCEMENTS_MAX: Final = 2000
ANNOUNCED_BYTES_MAX: Final = 16 << 20  # of all announcements together
SUBSCRIPTIONS_MAX: Final = 5000
SERVICE_NAME_BYTES_MAX: Final = 256
DELIVERY_TIMEOUT_S: Final = 600.0  # a connected subscriber that has not answered by then is given up

_Key = tuple[str, str]  # service name, server id


@define(eq=False)
class _Subscription:
    subscriber: RemoteReference
    waiting: dict[_Key, SignedAnnouncement]
    to_send: trio.Event = field(factory=trio.Event)
    caught_up: trio.Event = field(factory=trio.Event)  # or over

    def add(self, key: _Key, signed: SignedAnnouncement) -> None:
        self.waiting[key] = signed
        self.to_send.set()


class Introducer(Referenceable):
    """To be registered under the introducer's swissnum. `run()` sends what subscribers are to hear."""

    remote_interface: ClassVar[RemoteInterface | None] = RIIntroducerPublisherAndSubscriberService_v2

    def __init__(self) -> None:
        self._held: dict[_Key, tuple[Announcement, SignedAnnouncement]] = {}
        self._held_bytes = 0
        self._subscriptions: dict[tuple[object, int, str], _Subscription] = {}  # by connection, object, service
        self._nursery: trio.Nursery | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                task_status.started()
                await trio.sleep_forever()
        finally:
            self._nursery = None

    @property
    def announcement_count(self) -> int:
        return len(self._held)

    @property
    def subscription_count(self) -> int:
        return len(self._subscriptions)

    def get_stats(self) -> Mapping[str, float]:
        """What it keeps."""
        return {"introducer_announcements": len(self._held), "introducer_subscriptions": len(self._subscriptions)}

    # --- calls

    async def remote_get_version(self) -> dict[bytes, Any]:
        return {V2_KEY: {}, b"application-version": APPLICATION_VERSION}

    async def remote_publish_v2(self, announcement: object, canary: RemoteReference) -> None:
        try:
            new = parse_signed(announcement)
        except FormatError as error:
            log.warning("an announcement was refused: %s", error)
            raise
        assert isinstance(announcement, tuple | list)
        message, signature, key_text = announcement
        signed: SignedAnnouncement = (message, signature, key_text)
        key = new.service_name, new.server_id
        if (held := self._held.get(key)) is not None and not supersedes(new, held[0]):
            return
        grown = len(message) - (len(held[1][0]) if held is not None else 0)
        if (held is None and len(self._held) >= ANNOUNCEMENTS_MAX) or self._held_bytes + grown > ANNOUNCED_BYTES_MAX:
            log.warning("more announcements than an introducer keeps: %s was left out", new.short_name)
            raise RemoteFailure("builtins.MemoryError", "too many announcements")
        self._held[key] = new, signed
        self._held_bytes += grown
        log.info("%s announces %r (%s)", new.short_name, new.service_name[:40], new.nickname)
        for (_, _, service), subscription in self._subscriptions.items():
            if service == new.service_name:
                subscription.add(key, signed)

    async def remote_subscribe_v2(
        self, subscriber: RemoteReference, service_name: bytes, subscriber_info: dict[bytes, Any]
    ) -> None:
        if len(service_name) > SERVICE_NAME_BYTES_MAX:
            raise Violation("a service name that long does not exist")
        service = service_name.decode("utf-8", "replace")
        place = subscriber.connection, subscriber.clid, service
        if place in self._subscriptions or self._nursery is None:
            return
        if len(self._subscriptions) >= SUBSCRIPTIONS_MAX:
            log.warning("more than %d subscriptions: one was refused", SUBSCRIPTIONS_MAX)
            raise RemoteFailure("builtins.MemoryError", "too many subscriptions")
        known = {key: signed for key, (held, signed) in self._held.items() if held.service_name == service}
        subscription = self._subscriptions[place] = _Subscription(subscriber, known)
        self._nursery.start_soon(self._serve, place, subscription)
        await subscription.caught_up.wait()

    # --- one subscriber

    async def _serve(self, place: tuple[object, int, str], subscription: _Subscription) -> None:
        """As long as its connection lasts."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_cancel_when_lost, subscription.subscriber, nursery.cancel_scope)
                await self._deliver(subscription)
                nursery.cancel_scope.cancel()
        finally:
            del self._subscriptions[place]
            subscription.caught_up.set()

    async def _deliver(self, subscription: _Subscription) -> None:
        while True:
            while subscription.waiting:
                batch, subscription.waiting = subscription.waiting, {}
                try:
                    announcements = set(batch.values())
                    await subscription.subscriber.call("announce_v2", announcements, timeout_s=DELIVERY_TIMEOUT_S)
                except (RemoteFailure, Violation) as error:
                    log.info("a subscriber did not take an announcement: %s", error)
                except PeerError as error:
                    log.info("a subscription ends: %s", error)
                    return
            subscription.caught_up.set()
            await subscription.to_send.wait()
            subscription.to_send = trio.Event()


async def _cancel_when_lost(reference: RemoteReference, scope: trio.CancelScope) -> None:
    await reference.wait_lost()
    scope.cancel()
