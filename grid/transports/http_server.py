"""HTTP/1.1 from the server's side: one connection, its requests one after the other, until it ends.

    await serve_http(stream, handler)        handler: async (Request) -> Response

h11 reads what clients say, one parser a request; bodies of a known length go past it, and so do heads that are as
plain as those of storage clients, see `grid/wire/http_head.py`. What we say has one form, and is
written here: a status line, `date`, the handler's headers, a length.

Deadlines for slow clients: a request's head may take HEAD_TIMEOUT_S, which is also how long a connection may be
idle; each piece of a body may take PIECE_TIMEOUT_S, and the whole of it only as long as a client of
SLOWEST_BYTES_PER_S would need; likewise for what we send. A body nobody wanted is read up to
DRAIN_BYTES_MAX, so that the client gets to the answer, or the connection is closed.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from email.utils import formatdate
from functools import lru_cache
from http import HTTPStatus
from typing import Final, TypeAlias

import h11
import trio
from attrs import field, frozen

from grid.transports.tls_stream import TLSStream
from grid.wire.http_head import HEAD_BYTES_MAX, read_head

log = logging.getLogger(__name__)

HEAD_TIMEOUT_S: Final = 60.0
PIECE_TIMEOUT_S: Final = 60.0
SLOWEST_BYTES_PER_S: Final = 4 << 10  # slower clients are let go
DRAIN_BYTES_MAX: Final = 4 << 20

Buffer = bytes | bytearray | memoryview
Headers = Sequence[tuple[bytes, bytes]]

_BROKEN = (trio.BrokenResourceError, trio.ClosedResourceError)
_STATUS_LINES: Final = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus}


class ClientGoneError(Exception):
    """The client closed, broke the protocol, or was too slow: there is nobody to answer. The text says which."""


class BodyTooLargeError(Exception):
    """A request's body is larger than its endpoint takes."""


@frozen
class Response:
    """`body` is in memory, or comes in pieces of `length` bytes together. The framing is not the handler's."""

    status: int
    headers: Headers = ()
    body: Sequence[Buffer] | AsyncIterator[Buffer] = field(default=(), repr=False)
    length: int | None = None  # needed for a body in pieces


class Request:
    """`headers` have names in lower case. The body is read by whoever wants it, once."""

    def __init__(
        self,
        method: bytes,
        target: bytes,
        headers: Sequence[tuple[bytes, bytes]],
        length: int | None,
        connection: _ServerConnection,
        *,
        keeps_connection: bool = True,
    ) -> None:
        self.method = method
        self.target = target
        self.headers: Headers = headers
        self.length = length  # of the body, as announced; None when it comes in chunks
        self.keeps_connection = keeps_connection  # whether the client may send another request after this one
        self._by_name = dict(reversed(headers))  # of several the first
        self._connection = connection

    def header(self, name: bytes) -> bytes | None:
        return self._by_name.get(name)

    async def receive_pieces(self) -> Sequence[Buffer]:
        """What has come of the body, in order, at least one piece; none at its end. Raises ClientGoneError."""
        return await self._connection.receive_pieces()

    async def read_body(self, bytes_max: int) -> bytes:
        """All of it. Raises BodyTooLargeError, ClientGoneError."""
        if (self.length or 0) > bytes_max:
            raise BodyTooLargeError
        pieces: list[Buffer] = []
        left = bytes_max
        while some := await self.receive_pieces():
            pieces += some
            left -= sum(map(len, some))
            if left < 0:
                raise BodyTooLargeError
        return b"".join(pieces)


Handler: TypeAlias = Callable[[Request], Awaitable[Response]]


class Drain:
    """A way to end many connections politely: the idle ones at once, the others after the answer they wait for."""

    def __init__(self) -> None:
        self._begun = False
        self._scopes: set[trio.CancelScope] = set()

    def begin(self) -> None:
        self._begun = True
        for scope in self._scopes:
            scope.cancel()

    def ends(self, scope: trio.CancelScope) -> None:
        """Cancel this scope when draining begins, unless spared before."""
        self._scopes.add(scope)
        if self._begun:
            scope.cancel()

    def spares(self, scope: trio.CancelScope) -> None:
        self._scopes.discard(scope)

    @contextmanager
    def ending(self) -> Iterator[None]:
        """What is in this block is cancelled when draining begins."""
        with trio.CancelScope() as scope:
            self.ends(scope)
            try:
                yield
            finally:
                self.spares(scope)

    def has_ended(self, scope: trio.CancelScope) -> bool:
        """Whether it was this, and not its deadline, that cancelled a scope."""
        return self._begun and scope.cancelled_caught


async def serve_http(
    stream: TLSStream, handler: Handler, *, welcomed: Callable[[], object] = lambda: None, drain: Drain | None = None
) -> None:
    """Serve one connection until it ends. `welcomed` is called after every request that was not refused.

    The stream is the caller's to close. Raises ClientGoneError when it did not end well.
    """
    drain = drain or Drain()
    with trio.CancelScope() as scope:
        connection = _ServerConnection(stream, scope)
        while True:
            request = None
            # A scope of its own: a request that came just as draining began is answered all the same.
            with trio.CancelScope(deadline=trio.current_time() + HEAD_TIMEOUT_S) as idle:
                drain.ends(idle)
                try:
                    request = await connection.next_request()
                finally:
                    drain.spares(idle)
            if request is None:
                if idle.cancelled_caught and not drain.has_ended(idle):
                    raise ClientGoneError("too slow")
                return
            if not await connection.answer(request, handler, welcomed):
                return
    raise ClientGoneError("too slow")


class _ServerConnection:
    def __init__(self, stream: TLSStream, scope: trio.CancelScope) -> None:
        """`scope` is around the whole connection: it is cancelled when the client keeps us waiting too long."""
        self._stream = stream
        self._scope = scope  # has a deadline whenever we wait for the client in a request
        self._h11 = _new_h11()
        self._pieces: deque[bytes] = deque()  # received, and not looked at yet
        self._body_missing: int | None = None  # bytes, of a body that h11 never sees
        self._patience_s = 0.0  # how long the client may still keep us waiting for its body
        self._answered = False  # the request under way

    async def next_request(self) -> Request | None:
        """None when the client is finished. The caller sets the deadline."""
        self._h11, self._body_missing, self._answered = _new_h11(), None, False
        try:
            if not self._pieces:
                await self._receive()
            if (request := self._plain_request()) is not None:
                return request
            self._feed()
            event = await self._next_event()
        except ClientGoneError:
            if self._h11.their_state is h11.IDLE and not self._h11.trailing_data[0]:
                return None  # it was idle, and so is free to go
            raise
        if not isinstance(event, h11.Request):
            return None
        request = self._request_of(event)
        if request.length is not None:
            # nothing to parse: such a body goes past h11, which would copy every byte twice
            self._body_missing = request.length
            self._take_back()
        return request

    def _plain_request(self) -> Request | None:
        """One that came at once and needs no h11."""
        head = read_head(self._pieces[0]) if self._pieces else None
        if head is None:
            return None
        piece = self._pieces.popleft()
        if len(piece) > head.size:
            self._pieces.appendleft(piece[head.size :])
        self._patience_s, self._body_missing = PIECE_TIMEOUT_S, head.length
        return Request(head.method, head.target, head.headers, head.length, self)

    def _request_of(self, head: h11.Request) -> Request:
        self._patience_s = PIECE_TIMEOUT_S
        headers = [(name.lower(), value) for name, value in head.headers.raw_items()]
        lengths = [value for name, value in headers if name == b"content-length"]  # h11 has seen that it is a number
        chunked = any(name == b"transfer-encoding" for name, _ in headers)
        closes = any(name == b"connection" and b"close" in value.lower() for name, value in headers)
        return Request(
            bytes(head.method),
            bytes(head.target),
            headers,
            None if chunked else int(lengths[0] if lengths else 0),
            self,
            keeps_connection=head.http_version >= b"1.1" and not closes,
        )

    def _take_back(self) -> None:
        """What h11 was given and did not need is the body's, or the next request's."""
        early, _ = self._h11.trailing_data
        if early:
            self._pieces.appendleft(early)

    async def answer(self, request: Request, handler: Handler, welcomed: Callable[[], object]) -> bool:
        """Whether another request may come."""
        try:
            response = await handler(request)
        except (ClientGoneError, trio.Cancelled):
            raise
        except Exception:  # a bug in one request must not end the server
            log.exception("%s failed", request.method.decode("latin-1"))
            response = Response(500)
        await self.respond(request, response)
        if response.status < 400:
            welcomed()
        return await self._finish() and request.keeps_connection

    async def receive_pieces(self) -> Sequence[Buffer]:
        if self._h11.they_are_waiting_for_100_continue:
            await self._send([self._h11.send(h11.InformationalResponse(status_code=100, headers=[])) or b""])
        began = trio.current_time()
        self._scope.deadline = began + self._patience_s
        pieces = await self._more_of_body()
        self._scope.deadline = math.inf
        paid_s = sum(map(len, pieces)) / SLOWEST_BYTES_PER_S
        waited_s = trio.current_time() - began
        self._patience_s = min(self._patience_s - waited_s + paid_s, PIECE_TIMEOUT_S)
        return pieces

    async def _more_of_body(self) -> Sequence[Buffer]:
        if self._body_missing is None:
            return await self._more_of_chunks()
        if not self._body_missing:
            return ()
        if not self._pieces:
            await self._receive(self._body_missing)
            if not self._pieces:
                raise ClientGoneError("connection closed in a request")
        taken: list[bytes] = []
        missing = self._body_missing
        while self._pieces and missing:
            piece = self._pieces.popleft()
            if len(piece) > missing:
                self._pieces.appendleft(piece[missing:])
                piece = piece[:missing]
            missing -= len(piece)
            taken.append(piece)
        self._body_missing = missing
        return taken

    async def _more_of_chunks(self) -> Sequence[Buffer]:
        while isinstance(event := await self._next_event(), h11.Data):
            if event.data:
                return (event.data,)
        if not isinstance(event, h11.EndOfMessage):
            raise ClientGoneError("connection closed in a request")
        self._body_missing = 0
        self._take_back()
        return ()

    async def _next_event(self) -> h11.Event | type[h11.PAUSED]:
        try:
            while (event := self._h11.next_event()) is h11.NEED_DATA:
                if not self._pieces:
                    await self._receive()
                self._feed()
        except h11.RemoteProtocolError as error:
            await self._refuse(error.error_status_hint)
            raise ClientGoneError(f"not the HTTP we know: {error}") from None
        return event  # type: ignore[return-value]

    def _feed(self) -> None:
        """Give h11 one piece, or the end if there is none."""
        self._h11.receive_data(self._pieces.popleft() if self._pieces else b"")

    async def _receive(self, wanted: int = 1) -> None:
        """Nothing comes at the end. Raises ClientGoneError."""
        try:
            self._pieces += await self._stream.receive_pieces(wanted)
        except _BROKEN:
            raise ClientGoneError("connection lost") from None

    async def _refuse(self, status: int) -> None:
        if not self._answered:
            self._answered = True
            with suppress(ClientGoneError):
                await self._send([_head(status, (), 0, keep=False)])

    # --- answering --------------------------------------------------------------------------------------------------

    async def respond(self, request: Request, response: Response) -> None:
        """Raises ClientGoneError."""
        self._answered = True
        body = response.body
        if isinstance(body, Sequence):
            length = sum(map(len, body))
        else:
            assert response.length is not None, "a body in pieces of unknown length"
            length = response.length
        head = _head(
            response.status,
            response.headers,
            None if response.status == HTTPStatus.NO_CONTENT else length,
            keep=request.keeps_connection,
        )
        if request.method == b"HEAD":
            await self._send([head])
        elif isinstance(body, Sequence):
            await self._send([head, *body])
        else:
            await self._send([head])
            async for buffer in body:
                length -= len(buffer)
                await self._send([buffer])
            if length:  # pieces ended early: what they came from failed meanwhile
                raise ClientGoneError("the answer could not be completed")

    async def _send(self, buffers: Sequence[Buffer]) -> None:
        size = sum(map(len, buffers))
        self._scope.deadline = trio.current_time() + PIECE_TIMEOUT_S + size / SLOWEST_BYTES_PER_S
        try:
            await self._stream.send_buffers(buffers)
        except _BROKEN:
            raise ClientGoneError("connection lost") from None
        self._scope.deadline = math.inf

    async def _finish(self) -> bool:
        """After a response: whether another request can be read. Reads what is left of a body, if it is not much."""
        left = DRAIN_BYTES_MAX
        while self._body_missing != 0 and not self._h11.they_are_waiting_for_100_continue:
            left -= sum(map(len, await self.receive_pieces()))
            if left < 0:
                return False
        return self._body_missing == 0


def _new_h11() -> h11.Connection:
    return h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_BYTES_MAX)


def _head(status: int, headers: Headers, length: int | None, *, keep: bool) -> bytes:
    """Status line and headers, which are of our own making: there is nothing to be checked in them."""
    lines = [_STATUS_LINES[status], _date_line(int(time.time()))]
    lines += [b"%b: %b\r\n" % header for header in headers]
    if length is not None:
        lines.append(b"content-length: %d\r\n" % length)
    if not keep:
        lines.append(b"connection: close\r\n")
    lines.append(b"\r\n")
    return b"".join(lines)


@lru_cache(maxsize=1)
def _date_line(second: int) -> bytes:
    return b"date: %b\r\n" % formatdate(second, usegmt=True).encode("ascii")
