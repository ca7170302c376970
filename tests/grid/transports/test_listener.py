"""One port for both protocols: telling them apart, and crowds of connections that are no use."""

from __future__ import annotations

import os
import socket
import struct
from contextlib import suppress

import pytest
import trio
import trio.testing

from grid.crypto import make_tub_identity, spki_hash_of_certificate
from grid.errors import PeerError
from grid.transports import listener
from grid.transports.http import HTTPConnection, dial_http
from grid.transports.http_server import Request, Response
from grid.transports.listener import CombinedPort
from grid.transports.tls import ServerTLS, dial_pinned
from grid.transports.tub import Referenceable, Tub

HOST = "127.0.0.1"
IDENTITY = make_tub_identity()
SPKI_HASH = spki_hash_of_certificate(IDENTITY.certificate_der)


async def hello(request: Request) -> Response:
    return Response(200 if request.target == b"/" else 404, (), (b"hello",))


class Peer:
    def __init__(self, nursery: trio.Nursery) -> None:
        self.nursery = nursery
        self.tub = Tub(IDENTITY, location="tcp:127.0.0.1:1")
        self.combined = CombinedPort(tub=self.tub, handler=hello, tls=ServerTLS(IDENTITY))

    def reach(self) -> trio.abc.Stream:
        ours, theirs = trio.testing.memory_stream_pair()
        self.nursery.start_soon(self.combined.accept, theirs)
        return ours

    async def http(self) -> HTTPConnection:
        return HTTPConnection(await dial_pinned(self.reach(), SPKI_HASH), b"x")


@pytest.fixture
def peer(nursery: trio.Nursery) -> Peer:
    return Peer(nursery)


async def ended(stream: trio.abc.Stream) -> bool:
    """Wait for the end of it; whether nothing came before."""
    with suppress(trio.BrokenResourceError):
        return await stream.receive_some() == b""
    return True


async def test_both_protocols_on_one_port(peer: Peer) -> None:
    await peer.nursery.start(peer.tub.run)
    port: int = await peer.nursery.start(peer.combined.run, HOST, 0)
    furl = peer.tub.register(Referenceable()).replace(":1/", f":{port}/")
    connection = await dial_http(HOST, port, spki_hash=SPKI_HASH)
    assert (await connection.request(b"GET", b"/", (), answer_bytes_max=99)).body == b"hello"
    client = Tub(make_tub_identity())
    await peer.nursery.start(client.run)
    reference = await client.get_reference(furl, timeout_s=10)
    assert not reference.is_lost and peer.combined.connections == 2
    await connection.aclose()


async def test_the_first_bytes_may_come_one_by_one(peer: Peer) -> None:
    stream = peer.reach()
    for byte in b"GET /id/":
        await stream.send_all(bytes((byte,)))
    await stream.send_all(b"nonsense HTTP/1.1\r\n\r\n")
    assert (await stream.receive_some()).startswith(b"HTTP/1.1 500 ")  # the tub's own words


@pytest.mark.parametrize(
    ("start", "rest", "answer"),
    [
        (b"GET /id/", b"nonsense HTTP/1.1\r\n\r\n", b"HTTP/1.1 500 "),  # the tub's own words
        (b"\x16\x03\x01\x00", b"\x05hello", b"\x15\x03"),  # an alert of TLS
    ],
)
async def test_they_may_come_one_by_one_over_tcp(peer: Peer, start: bytes, rest: bytes, answer: bytes) -> None:
    port: int = await peer.nursery.start(peer.combined.run, HOST, 0)
    async with await trio.open_tcp_stream(HOST, port) as stream:
        for byte in start:
            await stream.send_all(bytes((byte,)))
            await trio.testing.wait_all_tasks_blocked()
        assert peer.combined.connections == 1
        await stream.send_all(rest)
        with trio.fail_after(20):
            assert (await stream.receive_some()).startswith(answer)


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("start", [b"", b"GET", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc", b"GET /id/", b"SSH-2.0-x\r\n"])
async def test_who_breaks_off_leaves_nothing_open(peer: Peer, start: bytes, reset: bool) -> None:
    """Also in the middle of a handshake: no connection, and no descriptor."""
    port: int = await peer.nursery.start(peer.combined.run, HOST, 0)
    connection = await dial_http(HOST, port, spki_hash=SPKI_HASH)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        stream = await trio.open_tcp_stream(HOST, port)
        await stream.send_all(start)
        await trio.testing.wait_all_tasks_blocked()
        if reset:
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await trio.aclose_forcefully(stream)
    with trio.fail_after(30):
        while peer.combined.connections > 1 or len(os.listdir("/proc/self/fd")) > before:
            await trio.testing.wait_all_tasks_blocked(0.01)
    assert (await connection.request(b"GET", b"/", (), answer_bytes_max=99)).status == 200
    await connection.aclose()


async def test_an_http_connection_leaves_no_descriptor(peer: Peer) -> None:
    port: int = await peer.nursery.start(peer.combined.run, HOST, 0)
    before = len(os.listdir("/proc/self/fd"))
    for polite in (True, False):
        connection = await dial_http(HOST, port, spki_hash=SPKI_HASH)
        assert (await connection.request(b"GET", b"/", (), answer_bytes_max=99)).status == 200
        if polite:
            await connection.aclose()
        else:
            await trio.aclose_forcefully(connection)
    with trio.fail_after(30):
        while peer.combined.connections or len(os.listdir("/proc/self/fd")) > before:
            await trio.testing.wait_all_tasks_blocked(0.01)


@pytest.mark.parametrize(
    "start", [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x00\x05hello", b"SSH-2.0-x\r\n", bytes(100)]
)
async def test_what_is_neither_protocol_is_dropped(peer: Peer, start: bytes) -> None:
    stream = peer.reach()
    await stream.send_all(start)
    await stream.receive_some()  # an alert of TLS, if anything
    assert await ended(stream)


@pytest.mark.parametrize(
    ("start", "patience_s"), [(b"", 30), (b"GET /id", 30), (b"\x16\x03\x01\x02\x00\x01\x00\x01", 30)]
)
async def test_the_silent_are_let_go(
    peer: Peer, autojump_clock: trio.testing.MockClock, start: bytes, patience_s: float
) -> None:
    stream = peer.reach()
    if start:
        await stream.send_all(start)
    assert await ended(stream)
    assert trio.current_time() == pytest.approx(patience_s)
    await trio.testing.wait_all_tasks_blocked()
    assert peer.combined.connections == 0


async def test_a_crowd_of_strangers_keeps_nobody_out(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest stranger makes room; who has shown to belong here stays, and newcomers get in."""
    monkeypatch.setattr(listener, "STRANGERS_MAX", 20)
    known = await peer.http()
    assert (await known.request(b"GET", b"/", (), answer_bytes_max=99)).status == 200
    refused = await peer.http()
    assert (await refused.request(b"GET", b"/no", (), answer_bytes_max=99)).status == 404
    crowd = []
    for _ in range(300):
        crowd.append(peer.reach())
        await trio.testing.wait_all_tasks_blocked()
    assert peer.combined.connections == 21
    assert await ended(crowd[0])
    assert (await known.request(b"GET", b"/", (), answer_bytes_max=99)).status == 200
    with pytest.raises(PeerError):
        await refused.request(b"GET", b"/", (), answer_bytes_max=99)
    newcomer = await peer.http()
    assert (await newcomer.request(b"GET", b"/", (), answer_bytes_max=99)).status == 200


async def test_there_is_a_limit_for_all(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "CONNECTIONS_MAX", 3)
    streams = [peer.reach() for _ in range(4)]
    await trio.testing.wait_all_tasks_blocked()
    assert peer.combined.connections == 3
    for stream in streams:
        await stream.aclose()
    await trio.testing.wait_all_tasks_blocked()
    assert peer.combined.connections == 0


async def test_drained_it_stops_by_itself(nursery: trio.Nursery) -> None:
    peer = Peer(nursery)
    port = 0
    stopped = trio.Event()

    async def run(task_status: trio.TaskStatus[int]) -> None:
        await peer.combined.run(HOST, 0, task_status=task_status)
        stopped.set()

    port = await nursery.start(run)
    connection = await dial_http(HOST, port, spki_hash=SPKI_HASH)
    assert (await connection.request(b"GET", b"/", (), answer_bytes_max=99)).status == 200
    peer.combined.drain()
    await stopped.wait()
    await connection.aclose()
    with pytest.raises(OSError):
        await trio.open_tcp_stream(HOST, port)
