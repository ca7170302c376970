"""The HTTP client against our own server: being connected, uploads that go wrong, and what is left behind."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

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
from grid.interfaces import IBucketWriter, LeaseSecrets, SlotSecrets, SlotWrite
from grid.peers import deadlines, gbs_buckets, http_pool, pulse, reconnect
from grid.peers.broker import StorageBroker
from grid.peers.foolscap_storage import FoolscapStorageServer
from grid.peers.gbs_storage import GBSStorageServer
from grid.peers.reconnect import Reconnector
from grid.server.gbs import GBSStorage
from grid.server.uploads import Upload
from grid.transports.http_server import Request, Response
from grid.wire import gbs
from tests.grid.peers.loopback import until
from tests.grid.server.gbs_peer import Peer, gbs_peer

SI = bytes(range(16))
LEASE = LeaseSecrets(b"r" * 32, b"c" * 32)
SECRETS = SlotSecrets(b"w" * 32, LEASE)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes seconds in earnest takes hundredths here."""
    monkeypatch.setattr(reconnect, "INITIAL_DELAY_S", 0.02)
    monkeypatch.setattr(pulse, "SUSPECT_AFTER_S", 0.2)


@asynccontextmanager
async def client_of(announcement: Any) -> AsyncIterator[GBSStorageServer]:
    server = GBSStorageServer(announcement)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.run, Reconnector(), trio.CapacityLimiter(8))
        await until(lambda: server.connected)
        yield server
        nursery.cancel_scope.cancel()


@contextmanager
def handling(monkeypatch: pytest.MonkeyPatch, instead: Any) -> Iterator[None]:
    """`instead(request)` answers what it wants to; None leaves the request to the server."""
    real = GBSStorage.__call__

    async def handler(self: GBSStorage, request: Request) -> Response:
        response: Response | None = await instead(request)
        return await real(self, request) if response is None else response

    with monkeypatch.context() as patched:
        patched.setattr(GBSStorage, "__call__", handler)
        yield


async def writer_of(server: GBSStorageServer, size: int) -> IBucketWriter:
    _, writers = await server.allocate_buckets(SI, LEASE, frozenset({0}), size)
    return writers[0]


def upload_of(peer: Peer) -> Upload | None:
    return peer.service.find_upload(SI, 0)


# --- being connected ----------------------------------------------------------------------------------------


async def test_what_is_known_of_a_connected_server(tmp_path: Path) -> None:
    async with gbs_peer(tmp_path, listen=True) as peer, client_of(peer.announcement()) as server:
        assert server.connected and server.responsive and server.settled
        assert server.nickname == "ours" and server.name == "a" * 8
        assert server.latency_s is None or server.latency_s > 0
        assert server.maximum_immutable_share_size == server.available_space
        assert peer.nurl.swissnum not in repr(server) + repr(server.announcement)


async def test_it_takes_a_furl_and_a_nurl(tmp_path: Path) -> None:
    async with gbs_peer(tmp_path, listen=True) as peer:
        for raw in (
            {"anonymous-storage-NURLs": [str(peer.nurl)]},
            {"anonymous-storage-FURL": peer.furl},
            {"anonymous-storage-FURL": peer.furl, "anonymous-storage-NURLs": ["nonsense"]},
        ):
            with pytest.raises(FormatError):
                GBSStorageServer(from_mapping("v0-x", raw))


async def test_of_several_places_the_one_that_answers(tmp_path: Path) -> None:
    """One refuses the connection, one has another key, one wants another swissnum."""
    async with gbs_peer(tmp_path, listen=True) as peer:
        good = peer.nurl
        bad = [
            gbs.Nurl(good.spki_hash, "127.0.0.1", 1, good.swissnum),
            gbs.Nurl(bytes(32), good.host, good.port, good.swissnum),
            gbs.Nurl(good.spki_hash, good.host, good.port, "other"),
        ]
        raw = {"anonymous-storage-FURL": peer.furl, "anonymous-storage-NURLs": [str(nurl) for nurl in (*bad, good)]}
        async with client_of(from_mapping("v0-x", raw)) as server:
            assert await server.get_buckets(SI) == {}


async def test_another_key_is_never_talked_to(tmp_path: Path) -> None:
    async with gbs_peer(tmp_path, listen=True) as peer:
        wrong = gbs.Nurl(bytes(32), "127.0.0.1", peer.port, peer.nurl.swissnum)
        raw = {"anonymous-storage-FURL": peer.furl, "anonymous-storage-NURLs": [str(wrong)]}
        server = GBSStorageServer(from_mapping("v0-x", raw))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.run, Reconnector(), trio.CapacityLimiter(8))
            await until(lambda: server.settled)
            assert not server.connected and "NegotiationError" in (server.last_failure or "")
            with pytest.raises(ConnectionLostError):
                await server.get_version()
            nursery.cancel_scope.cancel()


async def test_a_server_that_goes_is_noticed_without_asking(tmp_path: Path) -> None:
    async with gbs_peer(tmp_path, listen=True) as peer, client_of(peer.announcement()) as server:
        peer.combined.drain()
        await until(lambda: not server.connected)
        with pytest.raises(ConnectionLostError):
            await server.get_buckets(SI)


async def test_connections_the_server_closed_are_replaced_unnoticed(tmp_path: Path) -> None:
    async with gbs_peer(tmp_path, listen=True) as peer, client_of(peer.announcement()) as server:
        for _ in range(3):
            assert await server.get_buckets(SI) == {}
            peer.combined._drain.begin()
            peer.combined._drain._begun = False  # the connections there are end, new ones are served
            await trio.lowlevel.checkpoint()
        assert await server.get_buckets(SI) == {}
        await until(lambda: server.connected)


async def test_a_hung_server_becomes_suspect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deadlines, "GET_BUCKETS_TIMEOUT_S", 0.5)
    awake = trio.Event()

    async def hang(request: Request) -> None:
        await awake.wait()

    async with gbs_peer(tmp_path, listen=True) as peer, client_of(peer.announcement()) as server:
        with handling(monkeypatch, hang), pytest.raises(PeerTimeoutError):
            await server.get_buckets(SI)
        assert server.connected and not server.responsive
        awake.set()
        await until(lambda: server.responsive)


# --- uploads ------------------------------------------------------------------------------------------------


async def test_writers_wait_when_the_window_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gbs_buckets, "WINDOW_BYTES", 10_000)
    gate = trio.Event()
    waiting = 0

    async def hold(request: Request) -> None:
        nonlocal waiting
        if request.method == b"PATCH":
            waiting += 1
            await gate.wait()

    async with gbs_peer(tmp_path, listen=True) as peer, client_of(peer.announcement()) as server:
        with handling(monkeypatch, hold):
            writer = await writer_of(server, 100_000)
            written = 0

            async def write_all() -> None:
                nonlocal written
                for number in range(20):
                    await writer.write(number * 5000, bytes([number]) * 5000)
                    written += 1
                await writer.close()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(write_all)
                await until(lambda: waiting == 2)
                assert written == 1  # the second waits for room
                gate.set()
        data = await (await server.get_buckets(SI))[0].read(0, 100_000)
        assert data == b"".join(bytes([number]) * 5000 for number in range(20))


async def test_a_lost_201_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The share was published, and the answer did not arrive: the write repeated gets 404, and all is well."""
    lost = False

    async with gbs_peer(tmp_path, listen=True) as peer, client_of(peer.announcement()) as server:
        writer = await writer_of(server, 4)

        async def publish_behind_our_back(request: Request) -> None:
            nonlocal lost
            if request.method == b"PATCH" and not lost:
                lost = True
                upload = upload_of(peer)
                assert upload is not None
                await upload.write(0, b"data")
                await upload.close()

        with handling(monkeypatch, publish_behind_our_back):
            await writer.write(0, b"data")
            await writer.close()
        assert lost
        assert await (await server.get_buckets(SI))[0].read(0, 9) == b"data"


@pytest.mark.parametrize("status", [401, 404, 409, 500, 302])
async def test_a_failed_write_shows_by_the_close(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    async def fail(request: Request) -> Response | None:
        return Response(status) if request.method == b"PATCH" else None

    async with gbs_peer(tmp_path, listen=True) as peer, client_of(peer.announcement()) as server:
        with handling(monkeypatch, fail):
            writer = await writer_of(server, 10)
            with pytest.raises(RemoteFailure):
                await writer.write(0, b"0123456789")
                await writer.close()
        await until(lambda: upload_of(peer) is None)  # given back without being told to
        assert await server.get_buckets(SI) == {}


async def test_a_server_that_never_finishes_a_share_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def pretend(request: Request) -> Response | None:
        return Response(200) if request.method == b"PATCH" else None

    async with gbs_peer(tmp_path, listen=True) as peer, client_of(peer.announcement()) as server:
        with handling(monkeypatch, pretend):
            writer = await writer_of(server, 10)
            await writer.write(0, b"0123456789")
            with pytest.raises(RemoteProtocolError):
                await writer.close()


async def test_abort_ends_what_is_on_its_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def hang(request: Request) -> None:
        if request.method == b"PATCH":
            await trio.sleep_forever()

    async with gbs_peer(tmp_path, listen=True) as peer, client_of(peer.announcement()) as server:
        with handling(monkeypatch, hang):
            writer = await writer_of(server, 10)
            await writer.write(0, b"0123456789")
            await writer.abort()
            assert upload_of(peer) is None
            with pytest.raises(PeerError):
                await writer.close()


async def test_an_allocation_nobody_waits_for_is_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with gbs_peer(tmp_path, listen=True) as peer, client_of(peer.announcement()) as server:
        real = peer.service.allocate_buckets

        async def slow(*args: Any, **options: Any) -> Any:
            answer = await real(*args, **options)
            with trio.CancelScope(shield=True):
                scope.cancel()
                await trio.sleep(0.05)
            return answer

        monkeypatch.setattr(peer.service, "allocate_buckets", slow)
        with trio.CancelScope() as scope:
            await writer_of(server, 10)
        assert scope.cancelled_caught
        await until(lambda: peer.service.uploads_in_progress == 0)


async def test_leaving_the_grid_gives_back_what_is_unfinished(tmp_path: Path) -> None:
    """Closing a connection aborts nothing over HTTP: whoever leaves has to say so."""
    async with gbs_peer(tmp_path, listen=True) as peer:
        async with client_of(peer.announcement()) as server:
            writer = await writer_of(server, 10)
            await writer.write(0, b"half")
            assert upload_of(peer) is not None
        assert peer.service.uploads_in_progress == 0


async def test_an_upload_of_ours_that_was_left_behind_is_taken_over(tmp_path: Path) -> None:
    """A client that was killed gave nothing back. A stranger's upload of the same share stays."""
    async with gbs_peer(tmp_path, listen=True) as peer, client_of(peer.announcement()) as killed:
        writer = await writer_of(killed, 10)
        await writer.write(0, b"half")
        async with client_of(peer.announcement()) as again:
            stranger = LeaseSecrets(b"R" * 32, b"C" * 32)
            assert await again.allocate_buckets(SI, stranger, frozenset({0}), 10) == (frozenset(), {})
            writer = await writer_of(again, 10)
            assert await again.allocate_buckets(SI, LEASE, frozenset({0}), 10) == (frozenset(), {}), "it is in use"
            await writer.write(0, b"0123456789")
            await writer.close()
            assert await again.get_buckets(SI)


# --- answers that are not right -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "response",
    [
        Response(206, ((b"content-range", b"bytes 1-10/*"),), (bytes(10),)),  # another range
        Response(206, ((b"content-range", b"bytes 0-8/*"),), (bytes(10),)),
        Response(206, (), (bytes(10),)),
        Response(206, ((b"content-range", b"bytes 0-99/*"),), (bytes(100),)),  # more than was asked for
        Response(200, (), (bytes(10),)),
        Response(500),
    ],
)
async def test_reads_answered_wrongly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, response: Response) -> None:
    async def wrong(request: Request) -> Response | None:
        return response if request.header(b"range") is not None else None

    async with gbs_peer(tmp_path, listen=True) as peer, client_of(peer.announcement()) as server:
        writer = await writer_of(server, 10)
        await writer.write(0, bytes(10))
        await writer.close()
        reader = (await server.get_buckets(SI))[0]
        with handling(monkeypatch, wrong), pytest.raises(PeerError):
            await reader.read(0, 10)
        assert await reader.read(0, 10) == bytes(10)


@pytest.mark.parametrize("body", [b"", b"\x80", b"\xd9\x01\x02\x81\x20", b"\x9b" + b"\xff" * 8, bytes(100_000)])
@pytest.mark.parametrize("content_type", [b"application/cbor", b"text/html"])
async def test_messages_that_are_nonsense(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: bytes, content_type: bytes
) -> None:
    async def nonsense(request: Request) -> Response | None:
        return Response(200, ((b"content-type", content_type),), (body,))

    async with gbs_peer(tmp_path, listen=True) as peer, client_of(peer.announcement()) as server:
        with handling(monkeypatch, nonsense):
            for call in (
                lambda: server.get_buckets(SI),
                lambda: server.allocate_buckets(SI, LEASE, frozenset({1}), 10),
                lambda: server.slot_testv_and_readv_and_writev(SI, SECRETS, {0: SlotWrite([], [])}, []),
                lambda: server.get_version(),
            ):
                with pytest.raises(PeerError):
                    await call()


async def test_ranges_far_apart_read_the_first_one_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a checkstring read with them tells whether they are of the version it is of."""
    asked: list[bytes] = []

    async def note(request: Request) -> None:
        asked.append(request.header(b"range") or b"")

    async with gbs_peer(tmp_path, listen=True) as peer, client_of(peer.announcement()) as server:
        data = bytes(range(256)) * 2000
        await server.slot_testv_and_readv_and_writev(SI, SECRETS, {0: SlotWrite([], [(0, data)])}, [])
        with handling(monkeypatch, note):
            found = await server.slot_readv(SI, [0], [(0, 41), (500_000, 10), (300_000, 10)])
            assert found == {0: [data[:41], data[500_000:500_010], data[300_000:300_010]]}
            assert len(asked) == 3 and asked[-1] == b"bytes=0-40"
            asked.clear()
            await server.slot_readv(SI, [0], [(0, 41), (100, 10), (60_000, 10)])
            assert asked == [b"bytes=0-60009"]  # close enough to be one read


# --- chosen by the broker -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("announce_http", "force_foolscap", "expected"),
    [(True, False, GBSStorageServer), (True, True, FoolscapStorageServer), (False, False, FoolscapStorageServer)],
)
async def test_the_broker_takes_http_where_it_is_announced(
    tmp_path: Path, announce_http: bool, force_foolscap: bool, expected: type
) -> None:
    async with gbs_peer(tmp_path, listen=True) as peer, trio.open_nursery() as nursery:
        broker = StorageBroker(introducers={}, static_servers={}, keepalive_s=240, force_foolscap=force_foolscap)
        broker.add_announcement(peer.announcement(http=announce_http))
        await nursery.start(broker.run)
        assert await broker.wait_for_servers(1, 10) == 1
        (server,) = broker.get_permuted_servers(SI)
        assert type(server) is expected
        assert await server.get_buckets(SI) == {}
        # announced again as it is, it stays; announced elsewhere, it is another
        broker.add_announcement(peer.announcement(http=announce_http))
        assert broker.get_known_servers() == [server]
        broker.add_announcement(peer.announcement(http=not announce_http))
        assert (broker.get_known_servers() == [server]) is force_foolscap
        nursery.cancel_scope.cancel()


async def test_nurls_of_no_use_leave_foolscap(tmp_path: Path) -> None:
    broker = StorageBroker(introducers={}, static_servers={}, keepalive_s=240)
    tor = f"pb+tor://{'A' * 43}@abc.onion:1/s#v=1"
    furl = "pb://" + "a" * 32 + "@tcp:127.0.0.1:1/s"
    raw = {"anonymous-storage-FURL": furl, "anonymous-storage-NURLs": [tor, "nonsense"]}
    broker.add_announcement(from_mapping("v0-x", raw))
    assert [type(server) for server in broker.get_known_servers()] == [FoolscapStorageServer]


async def test_an_allocation_that_fails_as_the_server_is_lost() -> None:
    """The nursery of the connection is closed by then: nothing may be started in it."""
    async with trio.open_nursery() as nursery:
        uploads = gbs_buckets.Uploads(
            http_pool.ConnectionPool(gbs.Nurl(bytes(32), "127.0.0.1", 1, "x"), pulse.Pulse()), nursery
        )
        uploads.refuse()
    assert uploads.give_back(bytes(16), 0, b"secret").is_set()
    with pytest.raises(ConnectionLostError):
        uploads.post(uploads.writer(bytes(16), 0, b"secret", 10), 0, b"data")


async def test_a_server_that_hangs_is_silent_to_who_opens_another_connection() -> None:
    """The kernel takes the connection, nobody says a word in it."""
    listener = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listener[0].socket.getsockname()[1]
    beat = pulse.Pulse()
    pool = http_pool.ConnectionPool(gbs.Nurl(bytes(32), "127.0.0.1", port, "x"), beat)
    async with trio.open_nursery() as nursery, listener[0]:
        call = partial(pool.request, b"GET", b"/", answer_bytes_max=1, timeout_s=60, what="a call")
        nursery.start_soon(call)
        await until(lambda: not beat.responsive)
        nursery.cancel_scope.cancel()
