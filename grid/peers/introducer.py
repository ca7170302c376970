"""The introducer client: learns from one introducer which storage servers there are.

    get_version                    must have the "v2" key
    subscribe_v2(me, "storage")    is answered only after we answered the announce_v2 that comes meanwhile
    announce_v2({(message, signature, key), …})    comes to us, at once and whenever a server is new or changed

What was announced is kept in a file in Tahoe's own format, and taken from there when the introducer
does not answer soon, so that a grid can be joined without it:

    introducer_PETNAME_cache.yaml    - {ann: {…}, key_s: v0-…}

Source: Tahoe-LAFS 1.20's introducer protocol, version 2.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar, Final

import trio
import yaml

from grid.atomic_file import replace_file
from grid.errors import FormatError, PeerError, RemoteProtocolError
from grid.formats.announcement import Announcement, from_mapping, parse_signed
from grid.formats.furl import Furl
from grid.peers.reconnect import Reconnector, keep_connected
from grid.transports.tub import RemoteReference, Tub
from grid.wire.references import Referenceable
from grid.wire.remote_interfaces import RIIntroducerPublisherAndSubscriberService_v2, RIIntroducerSubscriberClient_v2
from grid.wire.schemas import RemoteInterface

log = logging.getLogger(__name__)

CALL_TIMEOUT_S: Final = 60.0
CACHE_AFTER_S: Final = 2.0  # an introducer that has not answered by then may answer later
CACHE_WRITE_DELAY_S: Final = 1.0  # announcements come in bursts
ANNOUNCEMENTS_MAX: Final = 1000  # of one introducer: it must not choose how much memory we use
COMPLAINTS_MAX: Final = 20  # logged as warnings
CACHE_BYTES_MAX: Final = 16 << 20
# libyaml's where there is one: a large grid's cache takes the pure Python ones a second
_LOADER: Final = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_DUMPER: Final = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
_V2_KEY: Final = b"http://allmydata.org/tahoe/protocols/introducer/v2"
_SUBSCRIBER_VERSION: Final = "tahoefs"


class IntroducerClient:
    """IIntroducerClient of one introducer: `subscribe_to` a service, then `run()`.

    `announced` is called with every announcement that is new, from the network or from the cache.
    """

    def __init__(
        self,
        petname: str,
        furl: Furl,
        *,
        announced: Callable[[Announcement], None],
        changed: Callable[[], None] = lambda: None,
        cache_path: Path | None,
        nickname: str,
        keepalive_s: float,
    ) -> None:
        self.petname = petname
        self._furl = furl
        self._announced = announced
        self._changed = changed
        self._cache_path = cache_path
        self._nickname = nickname
        self._keepalive_s = keepalive_s
        self._connected = False
        self._services: set[str] = set()
        # by service and server id, in this session; what the cache file will hold
        self._heard: dict[tuple[str, str], Announcement] = {}
        self._to_save = trio.Event()
        self._subscribed_once = trio.Event()
        self._failed_once = trio.Event()
        self._doubted = trio.Event()
        self._cache_used = False
        self._complaints = 0
        self.last_failure: str | None = None

    def subscribe_to(self, service_name: str) -> None:
        """Before `run()`."""
        self._services.add(service_name)

    def connected_to_introducer(self) -> bool:
        return self._connected

    def doubt(self) -> None:
        """The connection may be dead without any sign of it: make a new one, which costs little."""
        self._doubted.set()

    @property
    def settled(self) -> bool:
        """What this introducer has to say, or failing that the cache, was delivered."""
        return self._subscribed_once.is_set() or self._cache_used

    def __repr__(self) -> str:
        return f"<IntroducerClient {self.petname}>"

    async def run(self, reconnector: Reconnector, dials: trio.CapacityLimiter) -> None:
        """Stay subscribed, until cancelled."""
        backoff = reconnector.join()

        async def serve(tub: Tub, reference: RemoteReference) -> None:
            try:
                await self._subscribe(reference)
                backoff.connected()
                self._connected = True
                log.info("subscribed to introducer %r", self.petname)
                self._subscribed_once.set()
                self._changed()
                self._doubted = trio.Event()
                await self._doubted.wait()
            finally:
                self._connected = False

        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._use_cache_if_needed)
                nursery.start_soon(self._save_changes)
                await keep_connected(
                    self._furl,
                    RIIntroducerPublisherAndSubscriberService_v2,
                    serve=serve,
                    failed=self._failed,
                    backoff=backoff,
                    dials=dials,
                    keepalive_s=self._keepalive_s,
                )
        finally:
            reconnector.leave(backoff)

    def _failed(self, error: PeerError) -> None:
        self.last_failure = f"{type(error).__name__}: {error}"
        log.log(
            logging.DEBUG if self._failed_once.is_set() else logging.WARNING, "introducer %r: %s", self.petname, error
        )
        self._failed_once.set()
        self._changed()

    async def _subscribe(self, reference: RemoteReference) -> None:
        version = await reference.call("get_version", timeout_s=CALL_TIMEOUT_S)
        if _V2_KEY not in version:
            raise RemoteProtocolError("the introducer does not speak version 2 of its protocol")
        about_us = {
            b"version": 0,
            b"nickname": self._nickname,
            b"app-versions": [],
            b"my-version": _SUBSCRIBER_VERSION,
            b"oldest-supported": "1.0.0",
        }
        subscriber = _Subscriber(self)
        for service in self._services:
            await reference.call("subscribe_v2", subscriber, service.encode(), about_us, timeout_s=CALL_TIMEOUT_S)

    # --- announcements ----------------------------------------------------------------------------------------------

    def receive(self, triple: object) -> None:
        """One announcement from the network. Raises FormatError when it is not one or not genuine."""
        announcement = parse_signed(triple)
        key = announcement.service_name, announcement.server_id
        if announcement.service_name not in self._services:
            return
        held = self._heard.get(key)
        if held is None and len(self._heard) >= ANNOUNCEMENTS_MAX:
            self.complain("it announces more than %d servers", ANNOUNCEMENTS_MAX)
            return
        if held is not None and not supersedes(announcement, held):
            return
        self._heard[key] = announcement
        self._to_save.set()
        self._announced(announcement)

    def complain(self, complaint: str, *args: object) -> None:
        """Anyone who knows the introducer can make it pass on nonsense, as often as they like: it is not all logged."""
        self._complaints += 1
        level = logging.WARNING if self._complaints <= COMPLAINTS_MAX else logging.DEBUG
        log.log(level, f"introducer %r: {complaint}", self.petname, *args)

    # --- the cache --------------------------------------------------------------------------------------------------

    async def _use_cache_if_needed(self) -> None:
        with trio.move_on_after(CACHE_AFTER_S):
            async with trio.open_nursery() as nursery:
                for event in (self._failed_once, self._subscribed_once):
                    nursery.start_soon(_cancel_after, event, nursery.cancel_scope)
        if self._subscribed_once.is_set():
            return
        if self._cache_path is not None:
            cached = await trio.to_thread.run_sync(read_cache, self._cache_path)
            for announcement in cached:
                key = announcement.service_name, announcement.server_id
                # what the introducer said meanwhile is newer
                if announcement.service_name in self._services and key not in self._heard:
                    self._announced(announcement)
            log.info("introducer %r does not answer; using %d servers announced before", self.petname, len(cached))
        self._cache_used = True
        self._changed()

    async def _save_changes(self) -> None:
        if self._cache_path is None:
            return
        try:
            while True:
                await self._to_save.wait()
                await trio.sleep(CACHE_WRITE_DELAY_S)
                self._to_save = trio.Event()
                await trio.to_thread.run_sync(self._save, self._cache_path, list(self._heard.values()))
        finally:
            if self._to_save.is_set():  # a command that was done in less than the delay
                self._save(self._cache_path, list(self._heard.values()))

    def _save(self, path: Path, announcements: list[Announcement]) -> None:
        try:
            write_cache(path, announcements)
        except OSError as error:
            log.warning("cannot keep the announcements of introducer %r: %s", self.petname, error.strerror)


class _Subscriber(Referenceable):
    """What the introducer calls."""

    remote_interface: ClassVar[RemoteInterface | None] = RIIntroducerSubscriberClient_v2

    def __init__(self, client: IntroducerClient) -> None:
        self._client = client

    async def remote_announce_v2(self, announcements: set[Any]) -> None:
        for triple in announcements:
            try:
                self._client.receive(triple)
            except FormatError as error:  # the others of the set still count
                self._client.complain("it passed on a bad announcement: %s", error)
        await trio.lowlevel.checkpoint()


def supersedes(new: Announcement, held: Announcement) -> bool:
    """Whether `new` replaces what the same introducer said of the same server before."""
    if new.raw == held.raw:
        return False
    return held.seqnum is None or (new.seqnum is not None and new.seqnum > held.seqnum)


def cache_path(private: Path, petname: str) -> Path | None:
    """Where Tahoe keeps what was heard from this introducer; None for a name that cannot be part of a file's."""
    if "/" in petname or "\0" in petname or len(petname.encode()) > 200:
        return None
    return private / f"introducer_{petname}_cache.yaml"


def read_cache(path: Path) -> list[Announcement]:
    """The announcements in a cache file; none if it is missing or damaged. Those that do not parse are left out."""
    try:
        with path.open("rb") as file:
            text = file.read(CACHE_BYTES_MAX)
        entries = yaml.load(text, Loader=_LOADER)
    except FileNotFoundError:
        return []
    except (OSError, yaml.YAMLError, RecursionError, ValueError):
        log.warning("the announcement cache %s cannot be read", path.name)
        return []
    announcements = []
    for entry in entries[:ANNOUNCEMENTS_MAX] if isinstance(entries, list) else []:
        try:
            announcements.append(from_mapping(str(entry["key_s"]), entry["ann"]))
        except (FormatError, KeyError, TypeError):
            continue
    return announcements


def write_cache(path: Path, announcements: Iterable[Announcement]) -> None:
    """Replace the cache file, if that changes anything. Raises OSError."""
    ordered = sorted(announcements, key=lambda each: each.server_id)
    entries = [{"ann": dict(each.raw), "key_s": each.server_id} for each in ordered]
    contents = yaml.dump(entries, Dumper=_DUMPER, default_flow_style=False, allow_unicode=True).encode()
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        if file.read(CACHE_BYTES_MAX) == contents:
            return
    replace_file(path, contents)


async def _cancel_after(event: trio.Event, scope: trio.CancelScope) -> None:
    await event.wait()
    scope.cancel()
