"""HTTP/1.1 over TLS, from the client's side: one connection, one request at a time.

    connection = await dial_http(host, port, spki_hash=…)
    answer = await connection.request(b"GET", b"/storage/v1/version", headers, answer_bytes_max=16384)

h11 knows the protocol; here its bytes meet a stream. Bodies are sent from where they are, without copying.
The server's side is in `grid/transports/http_server.py`. The caller sets all deadlines; a request that is
cancelled, or fails, leaves a connection that is of no more use.
"""

from __future__ import annotations

import select
from collections.abc import Sequence
from typing import Final

import h11
import trio
from attrs import field, frozen

from grid.errors import ConnectionLostError, RemoteProtocolError
from grid.transports.tls import dial_pinned
from grid.transports.tls_stream import TLSStream

HEAD_BYTES_MAX: Final = 32 << 10  # status line and headers of an answer
ERROR_BYTES_MAX: Final = 10_000  # body of an answer that is not a success; nobody reads it
LATE_ANSWER_TIMEOUT_S: Final = 2.0  # for the answer of a server that stopped reading our request

Buffer = bytes | bytearray | memoryview
Headers = Sequence[tuple[bytes, bytes]]

_BROKEN = (trio.BrokenResourceError, trio.ClosedResourceError)


class StaleConnectionError(ConnectionLostError):
    """A connection that had been used before was closed before it brought a single byte of the answer.

    The server probably closed it for being idle, and did not see the request; it may have, though.
    """


@frozen
class Answer:
    status: int
    headers: Headers = field(repr=False)  # names in lower case
    body: bytes = field(repr=False)

    def header(self, name: bytes) -> bytes | None:
        return next((value for each, value in self.headers if each == name), None)


class HTTPConnection:
    """One connection to one server, as client."""

    def __init__(self, stream: TLSStream, authority: bytes) -> None:
        """`authority` goes into the Host header."""
        self._stream = stream
        self._authority = authority
        self._h11 = h11.Connection(h11.CLIENT, max_incomplete_event_size=HEAD_BYTES_MAX)
        self._requests = 0
        self._heard = False  # anything of the present answer
        self.idle_since = trio.current_time()

    @property
    def reusable(self) -> bool:
        """No request is under way, and the last one ended well."""
        return self._h11.our_state is h11.IDLE and self._h11.their_state is h11.IDLE

    async def request(
        self, method: bytes, target: bytes, headers: Headers, body: Sequence[Buffer] = (), *, answer_bytes_max: int
    ) -> Answer:
        """Send a request and return the whole answer, whatever its status.

        `answer_bytes_max` bounds the body of a successful answer. Raises ConnectionLostError, RemoteProtocolError.
        """
        self._heard = False
        self._requests += 1
        length = sum(len(buffer) for buffer in body)
        all_headers = [(b"host", self._authority), *headers]
        if length or method not in (b"GET", b"HEAD"):
            all_headers.append((b"content-length", b"%d" % length))
        try:
            await self._send(h11.Request(method=method, target=target, headers=all_headers), body)
            answer = await self._receive(answer_bytes_max)
            if self._h11.our_state is h11.DONE and self._h11.their_state is h11.DONE:
                self._h11.start_next_cycle()
                self.idle_since = trio.current_time()
            return answer
        except h11.RemoteProtocolError as error:
            if not self._heard and self._requests > 1:
                raise StaleConnectionError("an idle connection was closed by the server") from None
            if self._h11.trailing_data[1] and not self._heard:
                raise ConnectionLostError("connection closed before the answer") from None
            raise RemoteProtocolError(f"not the HTTP we know: {error}") from None
        except _BROKEN:
            if not self._heard and self._requests > 1:
                raise StaleConnectionError("an idle connection was lost") from None
            raise ConnectionLostError("connection lost") from None

    async def _send(self, request: h11.Request, body: Sequence[Buffer]) -> None:
        head = self._h11.send(request)
        buffers: list[Buffer] = [] if head is None else [head]
        for buffer in body:
            # h11 counts the bytes and hands the same object back, so that it need not be copied
            buffers += self._h11.send_with_data_passthrough(h11.Data(data=buffer)) or ()  # type: ignore[arg-type]
        self._h11.send(h11.EndOfMessage())
        try:
            await self._stream.send_buffers(buffers)
        except _BROKEN:
            # a server may refuse a long body, and close, without reading it: see whether it said why
            with trio.move_on_after(LATE_ANSWER_TIMEOUT_S):
                await self._fill()
            if not self._heard:
                raise

    async def _receive(self, answer_bytes_max: int) -> Answer:
        while True:
            event = await self._next_event()
            if isinstance(event, h11.Response):
                break
            if not isinstance(event, h11.InformationalResponse):
                raise h11.RemoteProtocolError("connection closed")
        most = answer_bytes_max if event.status_code < 300 else ERROR_BYTES_MAX
        pieces: list[bytes] = []
        while True:
            part = await self._next_event()
            if isinstance(part, h11.EndOfMessage):
                break
            if not isinstance(part, h11.Data):
                raise h11.RemoteProtocolError("connection closed in an answer")
            pieces.append(part.data)
            most -= len(part.data)
            if most < 0:
                raise RemoteProtocolError("the server's answer is longer than it can be")
        return Answer(event.status_code, tuple(event.headers), b"".join(pieces))

    async def _next_event(self) -> h11.Event | type[h11.PAUSED]:
        while (event := self._h11.next_event()) is h11.NEED_DATA:
            await self._fill()
        return event  # type: ignore[return-value]

    async def _fill(self) -> None:
        data = b"".join(await self._stream.receive_pieces())
        self._heard = self._heard or bool(data)
        self._h11.receive_data(data)

    def is_stale(self) -> bool:
        """Whether an idle connection has something to read, which can only be its end."""
        socket = self._stream.socket
        if socket is None:
            return False
        poll = select.poll()
        poll.register(socket.fileno(), select.POLLIN | select.POLLHUP)
        return bool(poll.poll(0))

    async def wait_closed(self) -> None:
        """While idle: return when the server closes, or says anything."""
        try:
            await self._fill()
        except _BROKEN:
            return

    async def aclose(self) -> None:
        await self._stream.aclose()

    def close_forcefully(self) -> None:
        """Without a goodbye."""
        if (socket := self._stream.socket) is not None:
            socket.close()


async def dial_http(host: str, port: int, *, spki_hash: bytes) -> HTTPConnection:
    """Raises ConnectionLostError, or NegotiationError when the server does not hold the announced key."""
    try:
        transport = await trio.open_tcp_stream(host, port)
    except OSError as error:
        raise ConnectionLostError(f"cannot connect to {host}:{port}: {error.strerror or error}") from None
    try:
        stream = await dial_pinned(transport, spki_hash)
    except _BROKEN:
        await trio.aclose_forcefully(transport)
        raise ConnectionLostError("connection broke in the TLS handshake") from None
    except BaseException:
        await trio.aclose_forcefully(transport)
        raise
    authority = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return HTTPConnection(stream, authority.encode("ascii", "replace"))
