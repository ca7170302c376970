"""HTTP over TLS, both sides against each other and against peers that do it wrong. No network: streams in memory."""

from __future__ import annotations

from contextlib import suppress

import pytest
import trio
import trio.testing

from grid.crypto import make_tub_identity, spki_hash_of_certificate
from grid.errors import ConnectionLostError, NegotiationError, PeerError, RemoteProtocolError
from grid.transports import http_server
from grid.transports.http import Answer, HTTPConnection, StaleConnectionError
from grid.transports.http_server import BodyTooLargeError, ClientGoneError, Drain, Request, Response, serve_http
from grid.transports.tls import ServerTLS, dial_pinned
from grid.transports.tls_stream import TLSStream

IDENTITY = make_tub_identity()
SPKI_HASH = spki_hash_of_certificate(IDENTITY.certificate_der)
TLS = ServerTLS(IDENTITY)


async def tls_pair(*, byte_by_byte: bool = False) -> tuple[TLSStream, TLSStream]:
    """(client's end, server's end)."""
    ours, theirs = trio.testing.memory_stream_pair()
    streams: list[TLSStream] = []

    async def accept() -> None:
        streams.append(await TLS.accept(_OneByte(theirs) if byte_by_byte else theirs))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(accept)
        client = await dial_pinned(_OneByte(ours) if byte_by_byte else ours, SPKI_HASH)
    return client, streams[0]


class _OneByte(trio.abc.Stream):
    """Delivers one byte at a time."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        return await self._stream.receive_some(1)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        await self._stream.aclose()


async def echo(request: Request) -> Response:
    body = await request.read_body(1 << 20)
    return Response(200, ((b"x-length", b"%d" % len(body)),), (request.method, request.target, body))


class Served:
    """A served connection: `client` is its other end, `ended` how the server saw it end."""

    def __init__(self, client: TLSStream, drain: Drain) -> None:
        self.client = client
        self.drain = drain
        self.http = HTTPConnection(client, b"host")
        self.ended: Exception | None = None
        self.over = trio.Event()
        self.welcomes = 0

    async def run(self, server: TLSStream, handler: http_server.Handler) -> None:
        def welcomed() -> None:
            self.welcomes += 1

        try:
            await serve_http(server, handler, welcomed=welcomed, drain=self.drain)
        except ClientGoneError as error:
            self.ended = error
        finally:
            await server.aclose()
            self.over.set()

    async def get(self, target: bytes = b"/") -> Answer:
        return await self.http.request(b"GET", target, (), answer_bytes_max=1 << 24)


async def served(nursery: trio.Nursery, handler: http_server.Handler = echo, **options: bool) -> Served:
    client, server = await tls_pair(**options)
    result = Served(client, Drain())
    nursery.start_soon(result.run, server, handler)
    return result


@pytest.mark.parametrize("byte_by_byte", [False, True])
async def test_requests_one_after_the_other(nursery: trio.Nursery, byte_by_byte: bool) -> None:
    peer = await served(nursery, byte_by_byte=byte_by_byte)
    size = 3_000 if byte_by_byte else 300_000
    for number in range(3):
        body = (bytes([number]) * size, memoryview(b"tail"))
        answer = await peer.http.request(b"PUT", b"/%d" % number, ((b"a", b"b"),), body, answer_bytes_max=1 << 20)
        assert answer.body == b"PUT/%d" % number + bytes([number]) * size + b"tail"
        assert (answer.status, answer.header(b"x-length")) == (200, b"%d" % (size + 4))
        assert peer.http.reusable
    assert peer.welcomes == 3
    await peer.http.aclose()
    await peer.over.wait()
    assert peer.ended is None


async def test_the_pinned_key_is_all_that_counts() -> None:
    ours, theirs = trio.testing.memory_stream_pair()

    heard: list[bytes] = []

    async def accept() -> None:
        with suppress(trio.BrokenResourceError):  # the client may be gone before our part of the handshake ends
            stream = await TLS.accept(theirs)
            heard.append(await stream.receive_some())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(accept)
        with pytest.raises(NegotiationError):
            await dial_pinned(ours, bytes(32))
        await ours.aclose()
    assert not any(heard)  # not one byte of HTTP


# --- the client against strange servers ---------------------------------------------------------------------


async def answer_of(raw: bytes, *, close: bool = False, most: int = 1000) -> Answer:
    client, server = await tls_pair()
    connection = HTTPConnection(client, b"host")

    async def speak() -> None:
        await server.receive_some()
        await server.send_all(raw)
        if close:
            await server.aclose()

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(speak)
            try:
                return await connection.request(b"GET", b"/", (), answer_bytes_max=most)
            except PeerError as error:
                failure = error
    raise failure


async def test_chunked_and_informational_answers() -> None:
    head = b"HTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 206 X\r\nTransfer-Encoding: chunked\r\nA: b\r\n\r\n"
    answer = await answer_of(head + b"3\r\nabc\r\n1;x=y\r\nd\r\n0\r\n\r\n")
    assert (answer.status, answer.body, answer.header(b"a")) == (206, b"abcd", b"b")


@pytest.mark.parametrize(
    "raw",
    [
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"\x16\x03\x01" + bytes(100),
        b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 20_000,
        b"HTTP/1.1 200 OK\r\ncontent-length: 2000\r\n\r\n" + bytes(2000),
        b"HTTP/1.1 500 No\r\ncontent-length: 20000\r\n\r\n" + bytes(20_000),
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip\r\n\r\n",
    ],
)
async def test_an_answer_that_is_too_long_or_no_answer(raw: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        await answer_of(raw)


@pytest.mark.parametrize("raw", [b"", b"HTTP/1.1 200", b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nshort"])
async def test_a_connection_that_ends_too_early(raw: bytes) -> None:
    with pytest.raises((ConnectionLostError, RemoteProtocolError)) as failure:
        await answer_of(raw, close=True)
    assert not isinstance(failure.value, StaleConnectionError)


async def test_a_kept_connection_that_was_closed_is_told_apart(nursery: trio.Nursery) -> None:
    peer = await served(nursery)
    await peer.get()
    peer.drain.begin()
    await peer.over.wait()
    with pytest.raises(StaleConnectionError):
        await peer.get()


async def test_a_cancelled_request_leaves_no_usable_connection(nursery: trio.Nursery) -> None:
    async def never(request: Request) -> Response:
        await trio.sleep_forever()
        raise AssertionError

    peer = await served(nursery, never)
    with trio.move_on_after(0.01):
        await peer.get()
    assert not peer.http.reusable


async def test_a_refusal_of_a_long_body_is_heard(nursery: trio.Nursery) -> None:
    """The server answers and closes without reading: the answer counts, not the broken pipe."""

    async def refuse(request: Request) -> Response:
        return Response(413)

    peer = await served(nursery, refuse)
    body = [bytes(1 << 20)] * 16
    answer = await peer.http.request(b"PUT", b"/", (), body, answer_bytes_max=1000)
    assert answer.status == 413
    await peer.over.wait()


# --- the server against strange clients ---------------------------------------------------------------------


async def test_a_body_in_chunks_and_one_nobody_reads(nursery: trio.Nursery) -> None:
    async def handler(request: Request) -> Response:
        return Response(404) if request.target == b"/unread" else await echo(request)

    peer = await served(nursery, handler)
    await peer.client.send_all(
        b"POST /unread HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\n\r\nabcde"
        b"POST /read HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n2\r\nab\r\n1\r\nc\r\n0\r\n\r\n"
    )
    received = b""
    while not received.endswith(b"POST/readabc"):
        data = await peer.client.receive_some()
        assert data
        received += data
    assert received.startswith(b"HTTP/1.1 404 ")
    assert peer.welcomes == 1  # the refused one does not count


@pytest.mark.parametrize("read", [True, False])
async def test_what_follows_a_body_is_the_next_request(nursery: trio.Nursery, read: bool) -> None:
    """All in one go: bodies are taken out by their length, whoever reads them, and end where they end."""

    async def look(request: Request) -> Response:
        body = await request.read_body(1 << 20) if read else b""
        return Response(200, (), (request.target, b" ", body, b"|"))

    peer = await served(nursery, look)
    bodies = [b"", b"GET / HTTP", b"a\r\nb", bytes(60_000)]
    requests = b"".join(
        b"PUT /%d HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % (number, len(body)) + body
        for number, body in enumerate(bodies)
    )
    await peer.client.send_all(requests + b"GET /last HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
    answers = b""
    while piece := await peer.client.receive_some():
        answers += piece
    said = [part.rpartition(b"\r\n\r\n")[2] for part in answers.split(b"|")[:-1]]
    assert said == [b"/%d " % number + (body if read else b"") for number, body in enumerate(bodies)] + [b"/last "]
    await peer.over.wait()
    assert peer.ended is None


@pytest.mark.parametrize(
    ("start", "status", "headers", "stays"),
    [
        (b"GET / HTTP/1.1", 200, {b"content-length: 5"}, True),
        (b"HEAD / HTTP/1.1", 200, {b"content-length: 5"}, True),
        (b"GET / HTTP/1.1", 204, set(), True),
        (b"GET / HTTP/1.0", 200, {b"content-length: 5", b"connection: close"}, False),
        (b"GET / HTTP/1.1\r\nConnection: x, Close", 200, {b"content-length: 5", b"connection: close"}, False),
    ],
)
async def test_what_an_answer_begins_with(
    nursery: trio.Nursery, start: bytes, status: int, headers: set[bytes], stays: bool
) -> None:
    async def handler(request: Request) -> Response:
        return Response(status, ((b"a", b"b"),), (b"hello",) if status == 200 else ())

    peer = await served(nursery, handler)
    await peer.client.send_all(start + b"\r\nhost: x\r\n\r\n")
    head, _, body = (await peer.client.receive_some()).partition(b"\r\n\r\n")
    line, *rest = head.split(b"\r\n")
    assert line.startswith(b"HTTP/1.1 %d " % status)
    assert body == (b"hello" if status == 200 and not start.startswith(b"HEAD") else b"")
    assert {header for header in rest if not header.startswith(b"date: ")} == headers | {b"a: b"}
    assert len(rest) == len(headers) + 2
    if stays:
        await peer.client.send_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        assert await peer.client.receive_some()
    else:
        await peer.over.wait()
        assert peer.ended is None


async def test_expect_continue(nursery: trio.Nursery) -> None:
    peer = await served(nursery)
    await peer.client.send_all(b"PUT / HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 3\r\n\r\n")
    assert (await peer.client.receive_some()).startswith(b"HTTP/1.1 100 ")
    await peer.client.send_all(b"abc")
    assert (await peer.client.receive_some()).endswith(b"PUT/abc")


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"NONSENSE\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\n\r\n", b"400"),  # no host
        (b"GET / HTTP/1.1\r\nhost: x\r\n" + b"a: b\r\n" * 10_000, b"431"),
        (b"GET / HTTP/1.1\r\nhost: x\r\ncontent-length: x\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n", b"400"),
    ],
)
async def test_what_is_no_request_is_refused_and_closed(nursery: trio.Nursery, raw: bytes, status: bytes) -> None:
    peer = await served(nursery)
    await peer.client.send_all(raw)
    assert (await peer.client.receive_some()).startswith(b"HTTP/1.1 " + status)
    await peer.over.wait()
    assert peer.ended is not None and peer.welcomes == 0


async def test_a_bug_in_a_handler_is_a_500_and_not_the_end(
    nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    async def handler(request: Request) -> Response:
        if request.target == b"/bug":
            raise KeyError("bug")
        return await echo(request)

    peer = await served(nursery, handler)
    assert (await peer.get(b"/bug")).status == 500
    assert "bug" in caplog.text
    assert (await peer.get()).status == 200


async def test_too_large_a_body(nursery: trio.Nursery) -> None:
    async def handler(request: Request) -> Response:
        try:
            return Response(200, (), (await request.read_body(10),))
        except BodyTooLargeError:
            return Response(413)

    peer = await served(nursery, handler)
    for body, status in ((b"x" * 10, 200), (b"x" * 11, 413)):
        assert (await peer.http.request(b"PUT", b"/", (), (body,), answer_bytes_max=99)).status == status
    chunks = b"".join(b"6\r\nabcdef\r\n" for _ in range(2)) + b"0\r\n\r\n"
    await peer.client.send_all(b"PUT / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n" + chunks)
    assert (await peer.client.receive_some()).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize("start", [b"", b"GET / HT", b"PUT / HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n"])
async def test_a_client_that_falls_silent_is_let_go(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock, start: bytes
) -> None:
    peer = await served(nursery)
    began = trio.current_time()
    if start:
        await peer.client.send_all(start)
    await peer.over.wait()
    assert trio.current_time() - began == pytest.approx(60)


async def test_a_client_that_trickles_is_let_go(nursery: trio.Nursery, autojump_clock: trio.testing.MockClock) -> None:
    """A byte a second keeps neither a head nor a body alive for long; a slow line that brings data does."""
    for start, piece, survives in (
        (b"GET /", b"a", False),
        (b"PUT / HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n", b"a", False),
        (b"PUT / HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n", bytes(8192), True),
    ):
        peer = await served(nursery)
        await peer.client.send_all(start)
        with trio.move_on_after(110):
            while not peer.over.is_set():
                await trio.sleep(1)
                try:
                    await peer.client.send_all(piece)
                except trio.BrokenResourceError:
                    break
        assert not peer.over.is_set() if survives else peer.ended is not None


async def test_draining_ends_the_idle_and_lets_the_busy_finish(nursery: trio.Nursery) -> None:
    gate = trio.Event()

    async def slow(request: Request) -> Response:
        await gate.wait()
        return Response(200, (), (b"done",))

    idle, busy = await served(nursery), await served(nursery, slow)
    await idle.get()
    idle.drain.begin()
    await idle.over.wait()
    answers: list[Answer] = []

    async def ask() -> None:
        answers.append(await busy.get())

    async with trio.open_nursery() as asking:
        asking.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked()
        busy.drain.begin()
        gate.set()
    assert answers[0].body == b"done"
    await busy.over.wait()
    assert busy.ended is None


async def test_an_answer_in_pieces_that_ends_too_early_is_seen(nursery: trio.Nursery) -> None:
    class Pieces:
        def __init__(self) -> None:
            self._left = 2

        def __aiter__(self) -> Pieces:
            return self

        async def __anext__(self) -> bytes:
            if not self._left:
                raise StopAsyncIteration
            self._left -= 1
            return b"x" * 10

    async def handler(request: Request) -> Response:
        return Response(200, (), Pieces(), int(request.target[1:]))

    peer = await served(nursery, handler)
    assert (await peer.get(b"/20")).body == b"x" * 20
    with pytest.raises((ConnectionLostError, RemoteProtocolError)):
        await peer.get(b"/30")
