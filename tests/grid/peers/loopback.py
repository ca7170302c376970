"""Real tubs on loopback behind which a small introducer and small storage servers answer, and fail when told to."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, ClassVar

import trio

from grid.crypto import SigningKey, make_tub_identity
from grid.formats.announcement import Announcement, from_mapping, sign_announcement
from grid.transports.tub import RemoteReference, Tub
from grid.wire.banana import Pieces
from grid.wire.references import Referenceable
from grid.wire.remote_interfaces import (
    RIBucketReader,
    RIBucketWriter,
    RIIntroducerPublisherAndSubscriberService_v2,
    RIStorageServer,
)
from grid.wire.schemas import RemoteInterface

SPACE = 10**12


class Listener:
    """One of our tubs, listening. `drop()` cuts every connection, `stop()` refuses new ones too."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._scope = trio.CancelScope()
        self._connections: set[trio.CancelScope] = set()
        self.identity = make_tub_identity()
        self.port = 0
        self.accepted = 0
        self.tub: Tub

    async def start(self) -> None:
        listeners = await trio.open_tcp_listeners(self.port, host="127.0.0.1")
        self.port = listeners[0].socket.getsockname()[1]
        self.tub = Tub(self.identity, location=f"tcp:127.0.0.1:{self.port}")
        await self._nursery.start(self._run, listeners)

    async def _run(self, listeners: list[trio.SocketListener], task_status: trio.TaskStatus[None]) -> None:
        with trio.CancelScope() as self._scope:
            async with trio.open_nursery() as nursery:
                await nursery.start(self.tub.run)
                nursery.start_soon(trio.serve_listeners, self._accept, listeners)
                task_status.started()

    async def _accept(self, stream: trio.SocketStream) -> None:
        self.accepted += 1
        with trio.CancelScope() as scope:
            self._connections.add(scope)
            try:
                await self.tub.accept(stream)
            finally:
                self._connections.discard(scope)

    def drop(self) -> None:
        for scope in self._connections:
            scope.cancel()

    def stop(self) -> None:
        self._scope.cancel()


class Relay:
    """Passes bytes on to a port. `freeze()` stops that without closing anything, as a lost network does."""

    def __init__(self, nursery: trio.Nursery, port: int) -> None:
        self._nursery = nursery
        self._target = port
        self._scopes: set[trio.CancelScope] = set()
        self.port = 0
        self.sent = 0  # bytes from those who dialled

    async def start(self) -> None:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.port = listeners[0].socket.getsockname()[1]
        await self._nursery.start(trio.serve_listeners, self._accept, listeners)

    async def _accept(self, inner: trio.SocketStream) -> None:
        try:
            outer = await trio.open_tcp_stream("127.0.0.1", self._target)
        except OSError:
            await inner.aclose()
            return
        async with inner, outer:
            with trio.CancelScope() as scope:
                self._scopes.add(scope)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._pump, inner, outer, True)
                    nursery.start_soon(self._pump, outer, inner, False)
            if scope.cancelled_caught:
                await trio.sleep_forever()  # both streams stay open

    async def _pump(self, source: trio.SocketStream, target: trio.SocketStream, counted: bool) -> None:
        try:
            async for piece in source:
                self.sent += len(piece) * counted
                await target.send_all(piece)
            await target.send_eof()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return  # one of the two ends is gone

    def freeze(self) -> None:
        for scope in self._scopes:
            scope.cancel()


class Share(Referenceable):
    """One immutable share being written."""

    remote_interface: ClassVar[RemoteInterface | None] = RIBucketWriter

    def __init__(self, service: StorageService, storage_index: bytes, number: int, size: int) -> None:
        self.service, self.storage_index, self.number = service, storage_index, number
        self.data = bytearray(size)
        self.writes = 0
        self.state = "open"

    async def remote_write(self, offset: int, data: bytes | Pieces) -> None:
        self.writes += 1
        await self.service.awake.wait()
        if self.service.full:
            raise OSError("no space")
        self.data[offset : offset + len(data)] = bytes(data)

    async def remote_close(self) -> None:
        await self.service.awake.wait()
        self.state = "closed"
        self.service.shares.setdefault(self.storage_index, {})[self.number] = bytes(self.data)

    async def remote_abort(self) -> None:
        self.state = "aborted" if self.state == "open" else self.state
        self.service.aborted.set()


class Reader(Referenceable):
    remote_interface: ClassVar[RemoteInterface | None] = RIBucketReader

    def __init__(self, service: StorageService, data: bytes) -> None:
        self.service, self.data = service, data
        self.reports: list[bytes] = []

    async def remote_read(self, offset: int, length: int) -> bytes:
        await self.service.awake.wait()
        return self.data[offset : offset + length + self.service.excess]

    async def remote_advise_corrupt_share(self, reason: bytes) -> None:
        self.service.reports.append(reason)


class StorageService(Referenceable):
    """Answers unless `awake` is a fresh Event; `full` makes writes fail, `excess` bytes too many are read."""

    remote_interface: ClassVar[RemoteInterface | None] = RIStorageServer

    def __init__(self) -> None:
        self.awake = trio.Event()
        self.awake.set()
        self.aborted = trio.Event()
        self.full = False
        self.excess = 0
        self.shares: dict[bytes, dict[int, bytes]] = {}
        self.writers: list[Share] = []
        self.slots: dict[bytes, dict[int, bytes]] = {}
        self.calls: list[tuple[Any, ...]] = []
        self.reports: list[bytes] = []

    def hang(self) -> None:
        self.awake = trio.Event()

    async def remote_get_version(self) -> dict[bytes, Any]:
        await self.awake.wait()
        return {
            b"http://allmydata.org/tahoe/protocols/storage/v1": {
                b"maximum-immutable-share-size": SPACE,
                b"available-space": SPACE,
            },
            b"application-version": b"test/1",
        }

    async def remote_allocate_buckets(
        self, storage_index: bytes, renew: bytes, cancel: bytes, numbers: set[int], size: int, canary: object
    ) -> tuple[set[int], dict[int, Share]]:
        self.calls.append((storage_index, renew, cancel, canary))
        await self.awake.wait()
        held = set(self.shares.get(storage_index, {}))
        writers = {number: Share(self, storage_index, number, size) for number in numbers - held}
        self.writers += writers.values()
        return held, writers

    async def remote_get_buckets(self, storage_index: bytes) -> dict[int, Reader]:
        await self.awake.wait()
        return {number: Reader(self, data) for number, data in self.shares.get(storage_index, {}).items()}

    async def remote_add_lease(self, storage_index: bytes, renew: bytes, cancel: bytes) -> None:
        self.calls.append((storage_index, renew, cancel))

    async def remote_slot_readv(
        self, storage_index: bytes, numbers: list[int], vectors: list[tuple[int, int]]
    ) -> dict[int, list[bytes]]:
        await self.awake.wait()
        return {
            number: [data[offset : offset + length + self.excess] for offset, length in vectors]
            for number, data in self.slots.get(storage_index, {}).items()
            if not numbers or number in numbers
        }

    async def remote_slot_testv_and_readv_and_writev(
        self, storage_index: bytes, secrets: tuple[bytes, ...], writes: dict[int, Any], reads: list[tuple[int, int]]
    ) -> tuple[bool, dict[int, list[bytes]]]:
        self.calls.append((storage_index, secrets, writes))
        before = await self.remote_slot_readv(storage_index, [], reads)
        slot = self.slots.setdefault(storage_index, {})
        for number, (tests, _, _) in writes.items():
            held = slot.get(number, b"")
            if any(held[offset : offset + length] != specimen for offset, length, _, specimen in tests):
                return False, before
        for number, (_, data, new_length) in writes.items():
            for offset, piece in data:
                held = slot.get(number, b"").ljust(offset, b"\0")
                slot[number] = held[:offset] + piece + held[offset + len(piece) :]
            if new_length is not None:
                slot[number] = slot[number][:new_length]
        return True, before

    async def remote_advise_corrupt_share(self, kind: bytes, storage_index: bytes, number: int, reason: bytes) -> None:
        self.calls.append((kind, storage_index, number))
        self.reports.append(reason)


class IntroducerService(Referenceable):
    """Remembers what it is given, and tells subscribers. As the real one, it answers them only after they heard it."""

    remote_interface: ClassVar[RemoteInterface | None] = RIIntroducerPublisherAndSubscriberService_v2

    def __init__(self) -> None:
        self.announcements: list[object] = []
        self.subscribers: list[RemoteReference] = []
        self.infos: list[dict[bytes, Any]] = []
        self.version: dict[bytes, Any] = {b"http://allmydata.org/tahoe/protocols/introducer/v2": {}}

    async def remote_get_version(self) -> dict[bytes, Any]:
        return self.version

    async def remote_subscribe_v2(self, subscriber: RemoteReference, service: bytes, info: dict[bytes, Any]) -> None:
        assert service == b"storage"
        self.infos.append(info)
        self.subscribers.append(subscriber)
        if self.announcements:
            await subscriber.call("announce_v2", set(self.announcements), timeout_s=5)

    async def announce(self, *announcements: object) -> None:
        self.announcements += announcements
        for subscriber in self.subscribers:
            await subscriber.call("announce_v2", set(announcements), timeout_s=5)


class Storage:
    """A storage server's tub and service, and what it announces."""

    def __init__(self, nursery: trio.Nursery, name: str) -> None:
        self.listener = Listener(nursery)
        self.service = StorageService()
        self.key = SigningKey.generate()
        self.name = name
        self.furl = ""

    async def start(self) -> None:
        await self.listener.start()
        self.furl = self.listener.tub.register(self.service, "swissnum")

    def fields(self, **changes: object) -> dict[str, Any]:
        return {
            "service-name": "storage",
            "nickname": self.name,
            "anonymous-storage-FURL": self.furl,
            "seqnum": 1,
            **changes,
        }

    def signed(self, **changes: object) -> object:
        return sign_announcement(self.fields(**changes), self.key)

    @property
    def server_id(self) -> str:
        return self.announcement.server_id

    @property
    def announcement(self) -> Announcement:
        from grid.formats.base32 import b2a

        return from_mapping(f"v0-{b2a(self.key.public_bytes)}", self.fields())


@asynccontextmanager
async def storage(name: str = "server") -> AsyncIterator[Storage]:
    async with trio.open_nursery() as nursery:
        server = Storage(nursery, name)
        await server.start()
        yield server
        nursery.cancel_scope.cancel()


async def until(condition: Any, timeout_s: float = 10.0) -> None:
    """Wait until `condition()` holds: a busy machine may take its time."""
    with trio.fail_after(timeout_s):
        while not condition():  # noqa: ASYNC110  what is waited for is in another protocol stack
            await trio.sleep(0.005)
