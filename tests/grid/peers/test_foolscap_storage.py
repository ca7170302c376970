"""One storage server over real tubs on loopback: pipelined writes, faults, hanging, loss and return."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from grid.errors import (
    ConnectionLostError,
    FormatError,
    PeerError,
    PeerTimeoutError,
    RemoteFailure,
    RemoteProtocolError,
)
from grid.formats.announcement import from_mapping
from grid.interfaces import LeaseSecrets, SlotSecrets, SlotWrite, TestVector
from grid.peers import buckets, deadlines, pulse, reconnect
from grid.peers.foolscap_storage import FoolscapStorageServer
from grid.peers.reconnect import Reconnector
from tests.grid.peers.loopback import SPACE, Relay, Storage, storage, until

SI = bytes(range(16))
LEASE = LeaseSecrets(renew=b"r" * 32, cancel=b"c" * 32)
SECRETS = SlotSecrets(b"w" * 32, LEASE)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes seconds in earnest takes hundredths here."""
    monkeypatch.setattr(reconnect, "INITIAL_DELAY_S", 0.02)
    monkeypatch.setattr(pulse, "SUSPECT_AFTER_S", 0.05)


@asynccontextmanager
async def client_of(peer: Storage) -> AsyncIterator[FoolscapStorageServer]:
    server = FoolscapStorageServer(peer.announcement, keepalive_s=240)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.run, Reconnector(), trio.CapacityLimiter(8))
        await until(lambda: server.connected)
        yield server
        nursery.cancel_scope.cancel()


async def writer_of(server: FoolscapStorageServer, size: int, number: int = 0) -> buckets.FoolscapBucketWriter:
    _, writers = await server.allocate_buckets(SI, LEASE, frozenset({number}), size)
    writer = writers[number]
    assert isinstance(writer, buckets.FoolscapBucketWriter)
    return writer


async def test_what_is_known_of_a_connected_server() -> None:
    async with storage("nick") as peer, client_of(peer) as server:
        assert server.connected and server.responsive
        assert server.nickname == "nick"
        assert server.server_id.startswith("v0-") and server.name == server.server_id[3:11]
        assert len(server.tub_id) == 20
        assert (server.available_space, server.maximum_immutable_share_size) == (SPACE, SPACE)
        assert server.latency_s is not None and server.latency_s > 0
        assert (await server.get_version())[b"application-version"] == b"test/1"
        assert "swissnum" not in repr(server) + repr(server.announcement)


async def test_a_share_goes_there_and_back() -> None:
    async with storage() as peer, client_of(peer) as server:
        already, writers = await server.allocate_buckets(SI, LEASE, frozenset({1, 4}), 100)
        assert (already, set(writers)) == (frozenset(), {1, 4})
        await writers[1].write(50, b"b" * 50)
        await writers[1].write(0, memoryview(b"a" * 50))
        await writers[1].close()
        await writers[4].abort()
        await writers[4].abort()
        already, writers = await server.allocate_buckets(SI, LEASE, frozenset({1}), 100)
        assert (already, writers) == (frozenset({1}), {})
        readers = await server.get_buckets(SI)
        assert set(readers) == {1}
        assert await readers[1].read(40, 20) == b"a" * 10 + b"b" * 10
        assert await readers[1].read(90, 20) == b"b" * 10
        assert await readers[1].read(200, 20) == b""
        assert await server.get_buckets(bytes(16)) == {}
        await server.add_lease(SI, LEASE)
        await readers[1].advise_corrupt_share("it is bad")
        await server.advise_corrupt_share("immutable", SI, 1, "x" * 5000)
        assert peer.service.reports[0] == b"it is bad" and len(peer.service.reports[1]) < 1000
        # one canary for the whole connection
        assert peer.service.calls[0][3].clid == peer.service.calls[1][3].clid


async def test_a_long_read_is_cut_into_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "READ_BYTES_MAX", 10)
    async with storage() as peer, client_of(peer) as server:
        peer.service.shares[SI] = {0: bytes(range(95))}
        reader = (await server.get_buckets(SI))[0]
        assert await reader.read(3, 50) == bytes(range(3, 53))
        assert await reader.read(90, 50) == bytes(range(90, 95))
        assert await reader.read(0, 0) == b""


async def test_writes_wait_for_the_window_and_not_for_each_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "WINDOW_BYTES", 10_000)
    async with storage() as peer, client_of(peer) as server:
        writer = await writer_of(server, 100_000)
        peer.service.hang()
        written = 0

        async def write_all() -> None:
            nonlocal written
            for number in range(100):
                await writer.write(number * 1000, bytes([number]) * 1000)
                written += 1
            await writer.close()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write_all)
            await until(lambda: peer.service.writers[0].writes == 9)
            assert written == 8  # without one answer; the ninth waits for room
            peer.service.awake.set()
        assert peer.service.shares[SI][0] == b"".join(bytes([number]) * 1000 for number in range(100))


async def test_a_write_that_fails_shows_at_the_close_and_leaves_no_share() -> None:
    async with storage() as peer, client_of(peer) as server:
        writer = await writer_of(server, 10)
        peer.service.full = True
        await writer.write(0, b"x" * 10)
        with pytest.raises(RemoteFailure):
            await writer.close()
        await until(lambda: peer.service.writers[0].state == "aborted")
        assert SI not in peer.service.shares
        with pytest.raises(PeerError):
            await writer.write(0, b"x")
        await writer.abort()


async def test_nothing_is_written_after_an_abort() -> None:
    async with storage() as peer, client_of(peer) as server:
        writer = await writer_of(server, 10)
        await writer.abort()
        with pytest.raises(PeerError):
            await writer.write(0, b"x")
        with pytest.raises(PeerError):
            await writer.close()


async def test_a_lost_connection_fails_what_is_under_way() -> None:
    async with storage() as peer, client_of(peer) as server:
        writer = await writer_of(server, 10)
        peer.service.hang()
        await writer.write(0, b"x" * 10)
        errors: list[PeerError] = []

        async def close() -> None:
            with pytest.raises(ConnectionLostError) as caught:
                await writer.close()
            errors.append(caught.value)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(close)
            await until(lambda: peer.service.writers[0].writes == 1)
            peer.listener.drop()
        assert errors
        await writer.abort()  # harmless
        with pytest.raises(ConnectionLostError):
            await writer.write(0, b"x")


async def test_a_lost_server_comes_back() -> None:
    async with storage() as peer, client_of(peer) as server:
        reader_of_old = await _reader(peer, server)
        peer.listener.drop()
        await until(lambda: not server.connected)
        with pytest.raises(ConnectionLostError):
            await server.get_buckets(SI)
        with pytest.raises(ConnectionLostError):
            await reader_of_old.read(0, 1)
        await until(lambda: server.connected)
        assert await server.get_buckets(SI)
        peer.listener.stop()
        await until(lambda: not server.connected)
        await peer.listener.start()
        peer.listener.tub.register(peer.service, "swissnum")
        await until(lambda: server.connected)


async def _reader(peer: Storage, server: FoolscapStorageServer) -> buckets.FoolscapBucketReader:
    peer.service.shares[SI] = {0: b"data"}
    reader = (await server.get_buckets(SI))[0]
    assert isinstance(reader, buckets.FoolscapBucketReader)
    return reader


async def test_a_server_that_hangs_is_noticed_and_recovers() -> None:
    async with storage() as peer, client_of(peer) as server:
        peer.service.hang()
        with trio.move_on_after(0.01):
            await server.get_buckets(SI)
        await until(lambda: not server.responsive)
        assert server.connected
        peer.service.awake.set()
        await until(lambda: server.responsive)


async def test_a_connection_that_died_silently_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server still believes in the old connection; the uploads that came over it must not block new ones."""
    async with storage() as peer, trio.open_nursery() as nursery:
        relay = Relay(nursery, peer.listener.port)
        await relay.start()
        fields = peer.fields(**{"anonymous-storage-FURL": peer.furl.replace(str(peer.listener.port), str(relay.port))})
        server = FoolscapStorageServer(from_mapping("v0-x", fields), keepalive_s=240)
        nursery.start_soon(server.run, Reconnector(), trio.CapacityLimiter(8))
        await until(lambda: server.connected)
        canary = (await writer_of(server, 10), peer.service.calls[0][3])[1]
        relay.freeze()
        monkeypatch.setattr(pulse, "DEAD_AFTER_S", 0.1)
        monkeypatch.setattr(deadlines, "GET_VERSION_TIMEOUT_S", 0.5)
        with pytest.raises(PeerError):
            await server.get_buckets(SI)
        await until(lambda: server.connected)
        assert await server.get_buckets(SI) == {}
        await until(lambda: canary.is_lost)
        nursery.cancel_scope.cancel()


async def test_every_call_has_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    async with storage() as peer, client_of(peer) as server:
        reader = await _reader(peer, server)
        _, writers = await server.allocate_buckets(SI, LEASE, frozenset({1, 2}), 10)
        for name in ("ALLOCATE", "GET_BUCKETS", "GET_VERSION", "SLOT_READ", "SLOT_WRITE"):
            monkeypatch.setattr(deadlines, f"{name}_TIMEOUT_S", 0.01)
        for name in ("READ", "WRITE", "CLOSE"):
            monkeypatch.setattr(buckets, f"{name}_TIMEOUT_S", 0.01)
        peer.service.hang()
        with trio.fail_after(10):
            for call in (
                lambda: server.get_version(),
                lambda: server.get_buckets(SI),
                lambda: server.allocate_buckets(SI, LEASE, frozenset({5}), 1),
                lambda: server.slot_readv(SI, [], [(0, 1)]),
                lambda: server.slot_testv_and_readv_and_writev(SI, SECRETS, {}, []),
                lambda: reader.read(0, 1),
                lambda: writers[1].close(),
            ):
                with pytest.raises(PeerTimeoutError):
                    await call()
            await writers[2].write(0, b"x")
            with pytest.raises(PeerTimeoutError):
                await writers[2].close()


async def test_writers_nobody_waited_for_are_given_back() -> None:
    async with storage() as peer, client_of(peer) as server:
        peer.service.hang()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.allocate_buckets, SI, LEASE, frozenset({0, 1}), 10)
            await until(lambda: peer.service.calls)
            nursery.cancel_scope.cancel()
        peer.service.awake.set()
        await until(lambda: [writer.state for writer in peer.service.writers] == ["aborted", "aborted"])


async def test_slots() -> None:
    async with storage() as peer, client_of(peer) as server:
        new = {3: SlotWrite([TestVector(0, 1, b"")], [(0, b"hello")])}
        assert await server.slot_testv_and_readv_and_writev(SI, SECRETS, new, [(0, 9)]) == (True, {})
        assert await server.slot_testv_and_readv_and_writev(SI, SECRETS, new, [(0, 9)]) == (False, {3: [b"hello"]})
        assert await server.slot_readv(SI, [], [(1, 2), (4, 9)]) == {3: [b"el", b"o"]}
        assert await server.slot_readv(SI, [7], [(1, 2)]) == {}
        _, secrets, writes = peer.service.calls[0]
        assert secrets == (b"w" * 32, b"r" * 32, b"c" * 32)
        assert writes == {3: ([(0, 1, b"eq", b"")], [(0, b"hello")], None)}


async def test_a_server_that_sends_too_much_is_not_believed() -> None:
    async with storage() as peer, client_of(peer) as server:
        peer.service.slots = {SI: {0: bytes(100)}}
        peer.service.shares[SI] = {0: bytes(100)}
        peer.service.excess = 1
        reader = (await server.get_buckets(SI))[0]
        with pytest.raises(RemoteProtocolError):
            await reader.read(0, 10)
        with pytest.raises(RemoteProtocolError):
            await server.slot_readv(SI, [], [(0, 10)])


async def test_a_server_that_is_not_there() -> None:
    async with storage() as peer:
        announcement = peer.announcement
    server = FoolscapStorageServer(announcement, keepalive_s=240)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.run, Reconnector(), trio.CapacityLimiter(8))
        await until(lambda: server.settled)
        assert not server.connected and not server.responsive and server.last_failure
        assert "swissnum" not in server.last_failure
        with pytest.raises(ConnectionLostError):
            await server.get_buckets(SI)
        await server.advise_corrupt_share("mutable", SI, 0, "never raises")
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("fields", [{}, {"anonymous-storage-FURL": "pb://aaaa@tcp:127.0.0.1:1/x"}])
def test_announcements_that_lead_nowhere(fields: dict[str, str]) -> None:
    with pytest.raises(FormatError):
        FoolscapStorageServer(from_mapping("v0-x", {"service-name": "storage", **fields}), keepalive_s=240)


@pytest.mark.parametrize("number", [-1, 256, 1 << 40])
async def test_share_numbers_that_cannot_be_are_not_believed(number: int) -> None:
    async with storage() as peer, client_of(peer) as server:
        peer.service.shares[SI] = {number: b"x"}
        peer.service.slots[SI] = {number: b"x"}
        with pytest.raises(PeerError, match="0 to 255"):
            await server.get_buckets(SI)
        with pytest.raises(PeerError, match="0 to 255"):
            await server.allocate_buckets(SI, LEASE, frozenset({1}), 100)
        with pytest.raises(PeerError, match="0 to 255"):
            await server.slot_readv(SI, [], [(0, 1)])


async def test_of_what_a_server_says_of_itself_little_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {
        b"http://allmydata.org/tahoe/protocols/storage/v1": {
            b"maximum-immutable-share-size": SPACE,
            b"available-space": 1 << 8000,
            b"noise": [b"noise"] * 1000,
            **{b"%d" % number: True for number in range(1000)},
        },
        b"application-version": b"test/" + b"x" * 100_000,
        b"noise": [b"noise"] * 1000,
    }
    async with storage() as peer:

        async def get_version() -> dict[bytes, object]:
            return told

        monkeypatch.setattr(peer.service, "remote_get_version", get_version)
        async with client_of(peer) as server:
            assert (server.maximum_immutable_share_size, server.available_space) == (SPACE, 1 << 64)
            assert len(repr(server._version)) < 4000
