"""Our storage server over real tubs on loopback, asked by our own client."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from grid.crypto import make_tub_identity
from grid.errors import RemoteFailure
from grid.formats.announcement import from_mapping
from grid.interfaces import LeaseSecrets, SlotSecrets, SlotWrite, TestVector
from grid.peers.foolscap_storage import FoolscapStorageServer
from grid.peers.reconnect import Reconnector
from grid.server.foolscap import FoolscapStorage
from grid.server.storage import StorageService
from grid.transports.tub import RemoteReference, Tub
from grid.wire.references import Referenceable
from tests.grid.peers.loopback import Listener, until
from tests.grid.server.stores import LEASES, SECRETS, SI, WRITE_ENABLER, Clock, files_in, serve

OTHER = b"o" * 16


class Served:
    """A storage service behind a tub, and what reaches it."""

    def __init__(self, service: StorageService, clock: Clock, listener: Listener, furl: str) -> None:
        self.service, self.clock, self.listener, self.furl = service, clock, listener, furl


@asynccontextmanager
async def server(directory: Path) -> AsyncIterator[Served]:
    clock = Clock()
    async with serve(directory, clock=clock) as service, trio.open_nursery() as nursery:
        listener = Listener(nursery)
        await listener.start()
        front = FoolscapStorage(service)
        await nursery.start(front.run)
        yield Served(service, clock, listener, listener.tub.register(front, "swissnum"))
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def client_of(served: Served) -> AsyncIterator[FoolscapStorageServer]:
    announcement = from_mapping("v0-" + "a" * 52, {"nickname": "x", "anonymous-storage-FURL": served.furl})
    client = FoolscapStorageServer(announcement, keepalive_s=240)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.run, Reconnector(), trio.CapacityLimiter(8))
        await until(lambda: client.connected)
        yield client
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def reference_to(served: Served) -> AsyncIterator[RemoteReference]:
    """The bare remote object, for what our client would never send."""
    tub = Tub(make_tub_identity())
    async with trio.open_nursery() as nursery:
        await nursery.start(tub.run)
        yield await tub.get_reference(served.furl)
        nursery.cancel_scope.cancel()


async def test_shares_go_there_and_back(tmp_path: Path) -> None:
    async with server(tmp_path) as served, client_of(served) as client:
        version = await client.get_version()
        assert version[b"application-version"] == b"tahoe-lafs/1.20.0"
        assert client.available_space and client.maximum_immutable_share_size == client.available_space
        data = bytes(range(256)) * 8000  # in threads, too
        already, writers = await client.allocate_buckets(SI, LEASES[0], frozenset({0, 9}), len(data))
        assert (already, set(writers)) == (frozenset(), {0, 9})
        for offset in range(0, len(data), 600_000):
            await writers[0].write(offset, data[offset : offset + 600_000])
        await writers[0].close()
        await writers[9].write(0, b"never closed")
        await writers[9].abort()
        readers = await client.get_buckets(SI)
        assert set(readers) == {0}
        assert await readers[0].read(0, len(data) + 5) == data
        assert await readers[0].read(1000, 3) == data[1000:1003]
        assert await client.get_buckets(OTHER) == {}
        await client.add_lease(SI, LEASES[1])
        await client.add_lease(OTHER, LEASES[1])
        already, writers = await client.allocate_buckets(SI, LEASES[0], frozenset({0}), 1)
        assert (already, writers) == (frozenset({0}), {})
        await readers[0].advise_corrupt_share("looks bad")
        served.clock.now += 1
        await client.advise_corrupt_share("immutable", SI, 0, "looks worse")
        assert len(files_in(tmp_path / "corruption-advisories")) == 2


async def test_slots(tmp_path: Path) -> None:
    async with server(tmp_path) as served, client_of(served) as client:
        absent = [TestVector(0, 1, b"")]
        writes = {3: SlotWrite(absent, [(0, b"first"), (5, b" version")])}
        assert await client.slot_testv_and_readv_and_writev(SI, SECRETS, writes, [(0, 50)]) == (True, {})
        passed, before = await client.slot_testv_and_readv_and_writev(SI, SECRETS, writes, [(0, 5), (6, 99)])
        assert (passed, before) == (False, {3: [b"first", b"version"]})
        assert await client.slot_readv(SI, [], [(0, 5)]) == {3: [b"first"]}
        assert await client.slot_readv(SI, [4], [(0, 5)]) == {}
        assert await client.slot_readv(OTHER, [], [(0, 5)]) == {}
        wrong = SlotSecrets(b"?" * 32, LEASES[0])
        with pytest.raises(RemoteFailure, match="The write enabler was recorded by nodeid 'aaaq") as caught:
            await client.slot_testv_and_readv_and_writev(SI, wrong, {}, [])
        assert caught.value.type_name == "allmydata.interfaces.BadWriteEnablerError"
        delete = {3: SlotWrite([], [], 0)}
        assert (await client.slot_testv_and_readv_and_writev(SI, SECRETS, delete, []))[0]
        assert files_in(tmp_path / "shares") == set()


async def test_errors_have_the_names_clients_know(tmp_path: Path) -> None:
    async with server(tmp_path) as served, reference_to(served) as remote:

        async def failure(target: RemoteReference, method: str, *args: object) -> tuple[str, str]:
            with pytest.raises(RemoteFailure) as caught:
                await target.call(method, *args, timeout_s=10)
            return caught.value.type_name, caught.value.message

        lease = LEASES[0].renew, LEASES[0].cancel
        _, writers = await remote.call("allocate_buckets", SI, *lease, {0}, 10, Referenceable(), timeout_s=10)
        await writers[0].call("write", 0, b"12345", timeout_s=10)
        kind, _ = await failure(writers[0], "write", 0, b"xx")
        assert kind == "allmydata.interfaces.ConflictingWriteError"
        kind, text = await failure(writers[0], "write", 8, b"xxx")
        assert kind.endswith("DataTooLargeError") and text == "(10, 8, 3)"
        await writers[0].call("close", timeout_s=10)
        assert await failure(writers[0], "close") == ("builtins.AssertionError", "precondition")
        await writers[0].call("abort", timeout_s=10)
        readers = await remote.call("get_buckets", SI, timeout_s=10)
        assert await readers[0].call("read", 0, 10, timeout_s=10) == b"12345" + bytes(5)
        assert (await failure(readers[0], "read", -1, 10))[0] == "builtins.AssertionError"
        kind, _ = await failure(remote, "slot_readv", SI, [], [(0, 1)])
        assert kind == "allmydata.storage.common.UnknownMutableContainerVersionError"
        secrets = WRITE_ENABLER, *lease
        not_equality = {0: ([(0, 1, b"ge", b"")], [], None)}
        call = "slot_testv_and_readv_and_writev"
        assert await failure(remote, call, OTHER, secrets, not_equality, []) == ("builtins.AssertionError", "")
        await remote.call(call, OTHER, secrets, {0: ([(0, 1, b"eq", b"")], [(0, b"x")], None)}, [], timeout_s=10)
        for method, args in (
            ("get_buckets", (OTHER,)),
            ("allocate_buckets", (OTHER, *lease, {1}, 10, Referenceable())),
        ):
            kind, _ = await failure(remote, method, *args)
            assert kind == "allmydata.storage.common.UnknownImmutableContainerVersionError"
        assert (await failure(remote, "renew_lease", SI, lease[0]))[0].endswith("Violation")
        assert (await failure(remote, "cancel_lease", SI, lease[1]))[0].endswith("Violation")
        assert (await failure(remote, "get_buckets", b"short"))[0] == "builtins.AssertionError"
        # and it still serves
        assert b"application-version" in await remote.call("get_version", timeout_s=10)


async def test_uploads_end_with_their_connection(tmp_path: Path) -> None:
    async with server(tmp_path) as served, client_of(served) as stays:
        async with client_of(served) as leaves:
            _, lost = await leaves.allocate_buckets(SI, LEASES[0], frozenset({0, 1, 2}), 10)
            await lost[0].write(0, b"0123456789")
            await lost[0].close()
            await lost[1].write(0, b"01234")
            _, kept = await stays.allocate_buckets(SI, LEASES[1], frozenset({1, 3}), 10)
            assert set(kept) == {3}
            await until(lambda: len(files_in(tmp_path / "shares/incoming")) == 1)
        await until(lambda: served.service.uploads_in_progress == 1)
        assert not files_in(tmp_path / "shares/incoming")
        await kept[3].write(0, b"9876543210")
        await kept[3].close()
        already, again = await stays.allocate_buckets(SI, LEASES[1], frozenset({1, 2}), 10)
        assert (already, set(again)) == ({0, 3}, {1, 2})


async def test_a_connection_does_not_hoard_finished_uploads(tmp_path: Path) -> None:
    async with server(tmp_path) as served, client_of(served) as client:
        for number in range(300):
            storage_index = number.to_bytes(16, "big")
            _, writers = await client.allocate_buckets(storage_index, LEASES[0], frozenset({0}), 1)
            await writers[0].write(0, b"x")
            await writers[0].close()
        front = served.listener.tub.object_by_name("swissnum")
        assert isinstance(front, FoolscapStorage)
        (tied,) = front._uploads.values()
        assert len(tied) <= 110


async def test_two_clients_race_for_one_slot(tmp_path: Path) -> None:
    async with server(tmp_path) as served, client_of(served) as one, client_of(served) as two:
        outcomes: list[bool] = []

        async def create(client: FoolscapStorageServer, text: bytes) -> None:
            secrets = SlotSecrets(WRITE_ENABLER, LeaseSecrets(text * 32, text * 32))
            write = SlotWrite([TestVector(0, 1, b"")], [(0, text * 1_000_000)])
            passed, _ = await client.slot_testv_and_readv_and_writev(SI, secrets, {0: write}, [])
            outcomes.append(passed)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(create, one, b"1")
            nursery.start_soon(create, two, b"2")
        assert sorted(outcomes) == [False, True]
        ((found,),) = (await one.slot_readv(SI, [], [(0, 2_000_000)])).values()
        assert found in (b"1" * 1_000_000, b"2" * 1_000_000)
