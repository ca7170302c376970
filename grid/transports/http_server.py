"""HTTP/1.1 from the server's side: one connection, its requests one after the other, until it ends.

    await serve_http(stream, handler)        handler: async (Request) -> Response

Deadlines for slow clients: a request's head may take HEAD_TIMEOUT_S, which is also how long a connection may be
idle; each piece of a body may take PIECE_TIMEOUT_S, and the whole of it only as long as a client of
SLOWEST_BYTES_PER_S would need; likewise for what we send. A body nobody wanted is read up to
DRAIN_BYTES_MAX, so that the client gets to the answer, or the connection is closed.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from email.utils import formatdate
from typing import Final, TypeAlias

import h11
import trio
from attrs import field, frozen

from grid.transports.tls import TLSStream

log = logging.getLogger(__name__)

HEAD_BYTES_MAX: Final = 16 << 10
HEAD_TIMEOUT_S: Final = 60.0
PIECE_TIMEOUT_S: Final = 60.0
SLOWEST_BYTES_PER_S: Final = 4 << 10  # slower clients are let go
DRAIN_BYTES_MAX: Final = 4 << 20

Buffer = bytes | bytearray | memoryview
Headers = Sequence[tuple[bytes, bytes]]

_BROKEN = (trio.BrokenResourceError, trio.ClosedResourceError)


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

    def __init__(self, head: h11.Request, connection: _ServerConnection) -> None:
        self.method = bytes(head.method)
        self.target = bytes(head.target)
        self.headers: Headers = tuple(head.headers)
        self._connection = connection

    def header(self, name: bytes) -> bytes | None:
        return next((value for each, value in self.headers if each == name), None)

    @property
    def length(self) -> int | None:
        """As announced; None when it comes in chunks."""
        if self.header(b"transfer-encoding") is not None:
            return None
        announced = self.header(b"content-length")
        return 0 if announced is None else int(announced)  # h11 has seen to it that it is a number

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

    @contextmanager
    def ending(self) -> Iterator[None]:
        """What is in this block is cancelled when draining begins."""
        with trio.CancelScope() as scope:
            if self._begun:
                scope.cancel()
            self._scopes.add(scope)
            try:
                yield
            finally:
                self._scopes.discard(scope)


async def serve_http(
    stream: TLSStream, handler: Handler, *, welcomed: Callable[[], object] = lambda: None, drain: Drain | None = None
) -> None:
    """Serve one connection until it ends. `welcomed` is called after every request that was not refused.

    The stream is the caller's to close. Raises ClientGoneError when it did not end well.
    """
    connection = _ServerConnection(stream)
    drain = drain or Drain()
    while True:
        request = None
        with drain.ending():
            request = await connection.next_request()
        if request is None:
            return
        try:
            response = await handler(request)
        except (ClientGoneError, trio.Cancelled):
            raise
        except Exception:  # a bug in one request must not end the server
            log.exception("%s failed", request.method.decode("latin-1"))
            response = Response(500)
        await connection.respond(request, response)
        if response.status < 400:
            welcomed()
        if not await connection.finish():
            return


def _new_h11() -> h11.Connection:
    return h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_BYTES_MAX)


class _ServerConnection:
    def __init__(self, stream: TLSStream) -> None:
        self._stream = stream
        self._h11 = _new_h11()
        self._pieces: deque[bytes] = deque()  # received, and not looked at yet
        self._body_missing: int | None = None  # bytes, of a body that h11 never sees
        self._patience_s = 0.0  # how long the client may still keep us waiting for its body

    async def next_request(self) -> Request | None:
        """None when the client is finished."""
        deadline = trio.current_time() + HEAD_TIMEOUT_S
        try:
            event = await self._next_event(deadline)
        except ClientGoneError:
            if self._h11.their_state is h11.IDLE and not self._h11.trailing_data[0]:
                return None  # it was idle, and so is free to go
            raise
        if isinstance(event, h11.Request):
            self._patience_s = PIECE_TIMEOUT_S
            request = Request(event, self)
            if request.length:
                # nothing to parse: such a body goes past h11, which would copy every byte twice
                self._body_missing = request.length
                early, _ = self._h11.trailing_data
                if early:
                    self._pieces.appendleft(early)
            return request
        return None

    async def receive_pieces(self) -> Sequence[Buffer]:
        if self._h11.they_are_waiting_for_100_continue:
            await self._send([self._h11.send(h11.InformationalResponse(status_code=100, headers=[])) or b""])
        began = trio.current_time()
        pieces = await self._more_of_body(began + self._patience_s)
        paid_s = sum(map(len, pieces)) / SLOWEST_BYTES_PER_S
        waited_s = trio.current_time() - began
        self._patience_s = min(self._patience_s - waited_s + paid_s, PIECE_TIMEOUT_S)
        return pieces

    async def _more_of_body(self, deadline: float) -> Sequence[Buffer]:
        if self._body_missing is None:
            while isinstance(event := await self._next_event(deadline), h11.Data):
                if event.data:
                    return (event.data,)
            if isinstance(event, h11.EndOfMessage):
                return ()
            raise ClientGoneError("connection closed in a request")
        if not self._body_missing:
            return ()
        if not self._pieces:
            await self._receive(deadline, self._body_missing)
            if not self._pieces:
                raise ClientGoneError("connection closed in a request")
        taken: list[bytes] = []
        while self._pieces and self._body_missing:
            piece = self._pieces.popleft()
            if len(piece) > self._body_missing:
                self._pieces.appendleft(piece[self._body_missing :])
                piece = piece[: self._body_missing]
            self._body_missing -= len(piece)
            taken.append(piece)
        return taken

    async def _next_event(self, deadline: float) -> h11.Event | type[h11.PAUSED]:
        try:
            while (event := self._h11.next_event()) is h11.NEED_DATA:
                if not self._pieces:
                    await self._receive(deadline)
                self._h11.receive_data(self._pieces.popleft() if self._pieces else b"")
        except h11.RemoteProtocolError as error:
            await self._refuse(error)
            raise ClientGoneError(f"not the HTTP we know: {error}") from None
        return event  # type: ignore[return-value]

    async def _receive(self, deadline: float, wanted: int = 1) -> None:
        """Nothing comes at the end. Raises ClientGoneError."""
        try:
            with trio.fail_at(deadline):
                self._pieces += await self._stream.receive_pieces(wanted)
        except trio.TooSlowError:
            raise ClientGoneError("too slow") from None
        except _BROKEN:
            raise ClientGoneError("connection lost") from None

    async def _refuse(self, error: h11.RemoteProtocolError) -> None:
        if self._h11.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            with suppress(h11.LocalProtocolError, ClientGoneError):
                await self._send_head(error.error_status_hint, ((b"connection", b"close"),), 0)
                self._h11.send(h11.EndOfMessage())

    # --- answering --------------------------------------------------------------------------------------------------

    async def respond(self, request: Request, response: Response) -> None:
        """Raises ClientGoneError."""
        body = response.body
        if isinstance(body, Sequence):
            length = sum(len(buffer) for buffer in body)
        else:
            assert response.length is not None, "a body in pieces of unknown length"
            length = response.length
        head = self._head(response.status, response.headers, None if response.status == 204 else length)
        if request.method == b"HEAD":
            await self._send([head])
        elif isinstance(body, Sequence):
            await self._send([head, *(self._passed_on(buffer) for buffer in body if len(buffer))])
        else:
            await self._send([head])
            async for buffer in body:
                await self._send([self._passed_on(buffer)])
        try:
            self._h11.send(h11.EndOfMessage())
        except h11.LocalProtocolError:  # pieces ended early: what they came from failed meanwhile
            raise ClientGoneError("the answer could not be completed") from None

    def _passed_on(self, buffer: Buffer) -> Buffer:
        self._h11.send_with_data_passthrough(h11.Data(data=buffer))  # type: ignore[arg-type]  # it only counts
        return buffer

    def _head(self, status: int, headers: Headers, length: int | None) -> bytes:
        all_headers = [(b"date", formatdate(usegmt=True).encode("ascii")), *headers]
        if length is not None:
            all_headers.append((b"content-length", b"%d" % length))
        return self._h11.send(h11.Response(status_code=status, headers=all_headers)) or b""

    async def _send_head(self, status: int, headers: Headers, length: int) -> None:
        await self._send([self._head(status, headers, length)])

    async def _send(self, buffers: Sequence[Buffer]) -> None:
        size = sum(len(buffer) for buffer in buffers)
        try:
            with trio.fail_after(PIECE_TIMEOUT_S + size / SLOWEST_BYTES_PER_S):
                await self._stream.send_buffers(buffers)
        except trio.TooSlowError:
            raise ClientGoneError("too slow to take its answer") from None
        except _BROKEN:
            raise ClientGoneError("connection lost") from None

    @property
    def _has_body(self) -> bool:
        """Something of the request's body is to be read yet."""
        if self._body_missing is not None:
            return self._body_missing > 0
        return self._h11.their_state is h11.SEND_BODY

    async def finish(self) -> bool:
        """After a response: whether another request may come. Reads what is left of the body, if it is not much."""
        left = DRAIN_BYTES_MAX
        while self._has_body and not self._h11.they_are_waiting_for_100_continue:
            left -= sum(map(len, await self.receive_pieces()))
            if left < 0:
                return False
        if self._body_missing == 0 and self._h11.our_state is h11.DONE:
            self._h11, self._body_missing = _new_h11(), None  # the old one waits for the body for ever
            return True
        if self._h11.our_state is h11.DONE and self._h11.their_state is h11.DONE:
            self._h11.start_next_cycle()
            return True
        return False
