"""TLS over real sockets, where the kernel is told how much to gather before it wakes us."""

from __future__ import annotations

import os
import random
import socket
import struct
from collections.abc import Awaitable, Callable
from functools import partial

import pytest
import trio
import trio.testing

from grid.crypto import make_tub_identity, spki_hash_of_certificate
from grid.transports.tls import ServerTLS, TubTLS, dial_pinned
from grid.transports.tls_stream import GATHER_BYTES, TLSStream

IDENTITY = make_tub_identity()


Pair = Callable[[], Awaitable[tuple[TLSStream, TLSStream]]]


@pytest.fixture(params=["HTTP", "tub"])
def socket_pair(request: pytest.FixtureRequest) -> Pair:
    return partial(make_pair, tubs=request.param == "tub")


async def make_pair(*, tubs: bool) -> tuple[TLSStream, TLSStream]:
    """(client's end, server's end), over TCP on loopback."""
    accepting = TubTLS(IDENTITY) if tubs else ServerTLS(IDENTITY)
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    streams: list[TLSStream] = []

    async def accept() -> None:
        streams.append(await accepting.accept(await listener.accept()))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(accept)
        transport = await trio.open_tcp_stream("127.0.0.1", listener.socket.getsockname()[1])
        if tubs:
            client = await TubTLS(make_tub_identity()).dial(transport)
        else:
            client = await dial_pinned(transport, spki_hash_of_certificate(IDENTITY.certificate_der))
    await listener.aclose()
    return client, streams[0]


@pytest.mark.parametrize("size", [1, 40_000, GATHER_BYTES, GATHER_BYTES + 1, 3_000_000])
async def test_what_is_announced_arrives_to_its_last_byte(socket_pair: Pair, size: int) -> None:
    """Sent in pieces of any size, nothing following: no reader waits for more than will come."""
    client, server = await socket_pair()
    rng = random.Random(size)
    data = rng.randbytes(size)

    async def send() -> None:
        position = 0
        while position < size:
            step = rng.choice((1, 100, 16_000, 16_385, 70_000, 400_000))
            await client.send_all(data[position : position + step])
            position += step

    received = b""
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            while len(received) < size:
                received += b"".join(await server.receive_pieces(size - len(received)))
    assert received == data
    await client.send_all(b"and now a single byte is enough")
    with trio.fail_after(30):
        assert await server.receive_some() == b"and now a single byte is enough"
        await client.aclose()
        assert await server.receive_pieces(1_000_000) == []
    await server.aclose()


async def test_closing_wakes_who_waits_for_much(socket_pair: Pair) -> None:
    client, server = await socket_pair()

    async def wait() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await server.receive_pieces(1_000_000)

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            await trio.aclose_forcefully(server)
    await client.aclose()


async def test_a_slow_peer_is_heard_though_much_is_waited_for(socket_pair: Pair) -> None:
    """Of what was announced only a part comes, then a little more: neither stays with the kernel."""
    client, server = await socket_pair()
    for part in (bytes(200_000), b"a little more"):
        received = 0
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(client.send_all, part)
                while received < len(part):
                    received += sum(map(len, await server.receive_pieces(5_000_000)))
        assert received == len(part)
    await client.aclose()
    await server.aclose()


@pytest.mark.parametrize("back", [False, True])
async def test_a_reader_that_is_late_gets_all(
    autojump_clock: trio.testing.MockClock, socket_pair: Pair, back: bool
) -> None:
    """More than the kernel takes at once: the sender waits, and is woken."""
    client, server = reversed(await socket_pair()) if back else await socket_pair()
    data = random.Random(1).randbytes(12_000_000)
    received = bytearray()

    async def read() -> None:
        await trio.sleep(1)
        while len(received) < len(data):
            received.extend(await server.receive_some())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await client.send_buffers([data[:100], memoryview(data)[100:]])
    assert received == data
    await client.aclose()
    await server.aclose()


@pytest.mark.parametrize("goodbye", [True, False])
async def test_the_end_is_the_end(socket_pair: Pair, goodbye: bool) -> None:
    client, server = await socket_pair()
    await client.send_all(b"last words")
    if goodbye:
        await client.aclose()
    else:
        assert client.socket is not None
        client.socket.shutdown(trio.socket.SHUT_RDWR)
    received = []
    with trio.fail_after(30):
        while pieces := await server.receive_pieces():
            received += pieces
    assert b"".join(received) == b"last words"
    assert await server.receive_pieces() == []
    await server.aclose()
    await client.aclose()


async def test_a_peer_that_breaks_off_is_an_error(socket_pair: Pair) -> None:
    client, server = await socket_pair()
    assert client.socket is not None
    client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closing resets
    client.socket.close()
    with trio.fail_after(30):
        try:
            # The standard library of Python 3.11 takes a reset for an end; what HTTP says has a length of its own.
            assert await server.receive_pieces() == []
            assert server.peer_certificate_der is None, "a tub must not take it for an end"
        except trio.BrokenResourceError:
            pass
    with pytest.raises(trio.BrokenResourceError):
        await server.send_all(bytes(100_000))
    await server.aclose()


async def test_what_is_no_tls_is_an_error(socket_pair: Pair) -> None:
    client, server = await socket_pair()
    assert client.socket is not None
    await client.socket.send(b"GET / HTTP/1.1\r\n\r\n")
    with trio.fail_after(30), pytest.raises(trio.BrokenResourceError):
        await server.receive_pieces()
    await client.aclose()
    await server.aclose()


async def test_a_closed_stream_touches_no_descriptor(socket_pair: Pair) -> None:
    """Its number may be another connection's by then."""
    client, server = await socket_pair()
    assert server.socket is not None
    mine, others = socket.socketpair()
    mine.setblocking(False)
    number = server.socket.fileno()
    server.socket.close()
    os.dup2(others.fileno(), number)
    try:
        mine.send(b"for somebody else")
        with pytest.raises(trio.ClosedResourceError):
            await server.receive_pieces()
        with pytest.raises(trio.ClosedResourceError):
            await server.send_all(bytes(100_000))
        await server.aclose()
        with pytest.raises(BlockingIOError):
            mine.recv(1)
        assert others.recv(100) == b"for somebody else"
    finally:
        os.close(number)
        mine.close()
        others.close()
    await client.aclose()
