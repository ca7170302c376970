"""The introducer over real tubs: who hears what, in which order, and what is refused."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import trio

from grid.crypto import SigningKey, make_tub_identity
from grid.errors import RemoteFailure
from grid.formats.announcement import SignedAnnouncement, sign_announcement
from grid.formats.furl import Furl
from grid.peers.broker import StorageBroker
from grid.server import introducer as introducer_module
from grid.server.introducer import V2_KEY, Introducer
from grid.transports.tub import Referenceable, RemoteReference, Tub
from grid.wire.remote_interfaces import RIIntroducerSubscriberClient_v2
from grid.wire.schemas import RemoteInterface
from tests.grid.peers.loopback import Listener, until

KEY = SigningKey.from_seed(bytes(32))
OTHER_KEY = SigningKey.from_seed(bytes(range(32)))
INFO: dict[bytes, Any] = {b"version": 0, b"nickname": "tester", b"app-versions": []}
TIMEOUT_S = 30


def signed(key: SigningKey = KEY, **fields: Any) -> SignedAnnouncement:
    furl = "pb://aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa@tcp:127.0.0.1:9/swissnum"
    return sign_announcement({"service-name": "storage", "anonymous-storage-FURL": furl, "seqnum": 1, **fields}, key)


class Subscriber(Referenceable):
    """Writes down what it is told. `busy` until `awake` is set."""

    remote_interface: ClassVar[RemoteInterface | None] = RIIntroducerSubscriberClient_v2

    def __init__(self) -> None:
        self.calls: list[set[SignedAnnouncement]] = []
        self.awake = trio.Event()
        self.awake.set()

    async def remote_announce_v2(self, announcements: set[SignedAnnouncement]) -> None:
        self.calls.append(announcements)
        await self.awake.wait()


class Party:
    """An introducer, and what a peer needs to talk to it."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.nursery = nursery
        self.introducer = Introducer()
        self.listener = Listener(nursery)
        self.furl = ""

    async def start(self) -> None:
        await self.nursery.start(self.introducer.run)
        await self.listener.start()
        self.furl = self.listener.tub.register(self.introducer)

    async def peer(self) -> RemoteReference:
        """Through a tub of its own, so over a connection of its own."""
        tub = Tub(make_tub_identity())
        await self.nursery.start(tub.run)
        return await tub.get_reference(self.furl)


@pytest.fixture
async def party(nursery: trio.Nursery) -> AsyncIterator[Party]:
    party = Party(nursery)
    await party.start()
    yield party


async def publish(peer: RemoteReference, announcement: object) -> None:
    assert await peer.call("publish_v2", announcement, Referenceable(), timeout_s=TIMEOUT_S) is None


async def subscribe(peer: RemoteReference, subscriber: Subscriber, service: bytes = b"storage") -> None:
    assert await peer.call("subscribe_v2", subscriber, service, INFO, timeout_s=TIMEOUT_S) is None


async def test_version(party: Party) -> None:
    version = await (await party.peer()).call("get_version", timeout_s=TIMEOUT_S)
    assert version == {V2_KEY: {}, b"application-version": b"tahoe-lafs/1.20.0"}


async def test_all_that_is_known_comes_before_the_answer(party: Party) -> None:
    publisher, subscriber = await party.peer(), Subscriber()
    await publish(publisher, signed())
    await publish(publisher, signed(OTHER_KEY))
    await publish(publisher, signed(OTHER_KEY, **{"service-name": "something else"}))
    await subscribe(await party.peer(), subscriber)
    assert subscriber.calls == [{signed(), signed(OTHER_KEY)}]


async def test_nothing_is_sent_when_nothing_is_known(party: Party) -> None:
    subscriber = Subscriber()
    await subscribe(await party.peer(), subscriber)
    assert subscriber.calls == []
    await publish(await party.peer(), signed())
    await until(lambda: subscriber.calls == [{signed()}])


async def test_the_answer_waits_for_the_subscriber(party: Party, nursery: trio.Nursery) -> None:
    """A client takes the answer to mean that it has heard everything."""
    await publish(await party.peer(), signed())
    subscriber, peer = Subscriber(), await party.peer()
    subscriber.awake = trio.Event()
    call = peer.send("subscribe_v2", subscriber, b"storage", INFO)
    await until(lambda: bool(subscriber.calls))
    await peer.call("get_version", timeout_s=TIMEOUT_S)
    assert not call.is_done
    subscriber.awake.set()
    assert await call.result(TIMEOUT_S) is None


@pytest.mark.parametrize(
    "later",
    [
        {"seqnum": 5},
        {"seqnum": 4, "nickname": "older"},
        {"seqnum": 5, "nickname": "as old"},
        {"seqnum": "6", "nickname": "no integer"},
        {"seqnum": None, "nickname": "none"},
    ],
)
async def test_what_is_not_newer_is_ignored(party: Party, later: dict[str, Any]) -> None:
    publisher, subscriber = await party.peer(), Subscriber()
    await publish(publisher, signed(seqnum=5))
    await publish(publisher, signed(**later))
    await subscribe(await party.peer(), subscriber)
    assert subscriber.calls == [{signed(seqnum=5)}]


async def test_what_is_newer_is_passed_on(party: Party) -> None:
    publisher, subscriber = await party.peer(), Subscriber()
    await publish(publisher, signed(seqnum=None))
    await subscribe(await party.peer(), subscriber)
    await publish(publisher, signed(seqnum=None, nickname="changed"))
    await until(lambda: len(subscriber.calls) == 2)
    await publish(publisher, signed(seqnum=5))
    await until(lambda: len(subscriber.calls) == 3)
    assert subscriber.calls[1:] == [{signed(seqnum=None, nickname="changed")}, {signed(seqnum=5)}]


async def test_a_busy_subscriber_gets_the_newest_of_each_when_it_is_back(party: Party) -> None:
    publisher, subscriber = await party.peer(), Subscriber()
    await subscribe(await party.peer(), subscriber)
    subscriber.awake = trio.Event()
    await publish(publisher, signed(seqnum=1))
    await until(lambda: len(subscriber.calls) == 1)
    for seqnum in (2, 3, 4):
        await publish(publisher, signed(seqnum=seqnum))
    await publish(publisher, signed(OTHER_KEY))
    subscriber.awake.set()
    await until(lambda: len(subscriber.calls) == 2)
    assert subscriber.calls == [{signed(seqnum=1)}, {signed(seqnum=4), signed(OTHER_KEY)}]


async def test_subscribing_twice_is_subscribing_once(party: Party) -> None:
    peer, subscriber = await party.peer(), Subscriber()
    await subscribe(peer, subscriber)
    await subscribe(peer, subscriber)
    await subscribe(peer, subscriber, b"another service")
    assert party.introducer.subscription_count == 2
    await publish(await party.peer(), signed())
    await until(lambda: subscriber.calls == [{signed()}])


async def test_a_subscription_ends_with_its_connection(party: Party) -> None:
    await publish(await party.peer(), signed())
    await subscribe(await party.peer(), Subscriber())
    party.listener.drop()
    await until(lambda: party.introducer.subscription_count == 0)
    assert party.introducer.announcement_count == 1  # what was announced stays


@pytest.mark.parametrize(
    "announcement",
    [
        b"nothing signed",
        (b"{}", b"v0-sig", b"v0-key"),
        (*signed()[:2], signed(OTHER_KEY)[2]),
        (signed()[0] + b" ", *signed()[1:]),
        (signed()[0], None, None),
        sign_announcement({"nickname": "x" * (1 << 16)}, KEY),
    ],
)
async def test_what_is_not_genuine_is_refused(party: Party, announcement: object) -> None:
    peer = await party.peer()
    with pytest.raises(RemoteFailure):
        await publish(peer, announcement)
    assert party.introducer.announcement_count == 0
    await publish(peer, signed())  # the connection goes on


async def test_a_crowd_is_refused(party: Party, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(introducer_module, "ANNOUNCEMENTS_MAX", 1)
    monkeypatch.setattr(introducer_module, "SUBSCRIPTIONS_MAX", 1)
    peer = await party.peer()
    await publish(peer, signed())
    with pytest.raises(RemoteFailure, match="too many"):
        await publish(peer, signed(OTHER_KEY))
    await publish(peer, signed(seqnum=2))  # of one that is known, newer ones are welcome
    await subscribe(peer, Subscriber())
    with pytest.raises(RemoteFailure, match="too many"):
        await subscribe(peer, Subscriber())


async def test_our_own_client_learns_of_servers(party: Party, nursery: trio.Nursery, tmp_path: Path) -> None:
    broker = StorageBroker(
        introducers={"default": Furl.parse(party.furl)}, static_servers={}, keepalive_s=240, cache_directory=tmp_path
    )
    await nursery.start(broker.run)
    await until(lambda: party.introducer.subscription_count == 1)
    await publish(await party.peer(), signed(nickname="late"))
    await until(lambda: [each.server_id[:3] for each in broker.get_known_servers()] == ["v0-"])
