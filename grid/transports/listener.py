"""One TCP port for both protocols of a storage server, told apart by how a connection begins.

    GET /id/          Foolscap, in the clear at first
    anything else     TLS with HTTP in it (a TLS handshake begins with 16 03)

Who has not sent eight bytes after FIRST_BYTES_TIMEOUT_S is let go. Connections that have not yet shown that they belong
here (by a Foolscap negotiation, or by a request that was not refused) are strangers: when there are too many of
them the oldest makes room for the newest, so that no crowd of half-open connections can keep others out.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from socket import MSG_PEEK, SO_RCVLOWAT, SOL_SOCKET
from typing import Final

import trio

from grid.transports.http_server import ClientGoneError, Drain, Handler, serve_http
from grid.transports.tls import ServerTLS
from grid.transports.tub import Tub

log = logging.getLogger(__name__)

FOOLSCAP_START: Final = b"GET /id/"
FIRST_BYTES_TIMEOUT_S: Final = 30.0
FIRST_READ_BYTES: Final = 4096
HANDSHAKE_TIMEOUT_S: Final = 30.0
CONNECTIONS_MAX: Final = 2000
STRANGERS_MAX: Final = 500
BACKLOG: Final = 512

_BROKEN = (trio.BrokenResourceError, trio.ClosedResourceError)


class CombinedPort:
    """Serves the connections of one port. `tub` None: no Foolscap; `handler` and `tls` None: no HTTP."""

    def __init__(self, *, tub: Tub | None, handler: Handler | None = None, tls: ServerTLS | None = None) -> None:
        self._tub = tub
        self._handler = handler
        self._tls = tls
        self._drain = Drain()
        self._connections = 0
        self._strangers: dict[trio.CancelScope, None] = {}  # in order of their arrival
        self._listening: trio.CancelScope | None = None

    @property
    def connections(self) -> int:
        return self._connections

    async def run(self, host: str, port: int, *, task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED) -> None:
        """Listen until cancelled, or until drain() was called and the last HTTP request under way is answered.

        Reports the port, which is chosen by the system if 0 was given. The tub is run by its owner.
        """
        listeners = await trio.open_tcp_listeners(port, host=host, backlog=BACKLOG)
        async with trio.open_nursery() as connections:
            with trio.CancelScope() as self._listening:
                task_status.started(listeners[0].socket.getsockname()[1])
                await trio.serve_listeners(self.accept, listeners, handler_nursery=connections)

    def drain(self) -> None:
        """No new connections; idle ones end; requests under way are answered. Foolscap connections end at once."""
        if self._listening is not None:
            self._listening.cancel()
        self._drain.begin()

    async def accept(self, transport: trio.abc.Stream) -> None:
        """One connection, its whole life. Raises nothing but Cancelled."""
        if self._connections >= CONNECTIONS_MAX:
            log.warning("more than %d connections: one refused", CONNECTIONS_MAX)
            await trio.aclose_forcefully(transport)
            return
        self._connections += 1
        try:
            with trio.CancelScope() as scope:
                self._strangers[scope] = None
                if len(self._strangers) > STRANGERS_MAX:
                    oldest = next(iter(self._strangers))
                    del self._strangers[oldest]
                    oldest.cancel()
                    log.info("a connection that was not used yet made room for others")
                await self._serve(transport, lambda: self._strangers.pop(scope, None))
        except (ClientGoneError, *_BROKEN, trio.TooSlowError) as error:
            log.info("connection ended: %s", error or "too slow")
        except Exception:  # a bug that one connection sets off must not end the others
            log.exception("connection failed")
        finally:
            self._strangers.pop(scope, None)
            self._connections -= 1
            with trio.CancelScope(shield=True):
                await trio.aclose_forcefully(transport)

    async def _serve(self, transport: trio.abc.Stream, welcomed: Callable[[], object]) -> None:
        with trio.fail_after(FIRST_BYTES_TIMEOUT_S):
            start, received = await _first_bytes(transport)
        if start.startswith(FOOLSCAP_START) and self._tub is not None:
            with self._drain.ending():
                await self._tub.accept(transport, received, welcomed=welcomed)
        elif self._tls is not None and self._handler is not None:
            await self._serve_http(transport, received, welcomed)

    async def _serve_http(self, transport: trio.abc.Stream, received: bytes, welcomed: Callable[[], object]) -> None:
        assert self._tls is not None and self._handler is not None
        with trio.fail_after(HANDSHAKE_TIMEOUT_S):
            stream = await self._tls.accept(transport, received)
        try:
            await serve_http(stream, self._handler, welcomed=welcomed, drain=self._drain)
        finally:
            with suppress(*_BROKEN):
                await stream.aclose()


async def _first_bytes(transport: trio.abc.Stream) -> tuple[bytes, bytes]:
    """Enough to tell the protocols apart; what of it was taken from the transport. Raises ClientGoneError.

    Of a socket nothing is taken: TLS may have the socket itself then.
    """
    if isinstance(transport, trio.SocketStream):
        start, received = await _peek(transport.socket, len(FOOLSCAP_START)), b""
    else:
        start = received = await _receive_at_least(transport, len(FOOLSCAP_START))
    if len(start) < len(FOOLSCAP_START):
        raise ClientGoneError("closed before it said anything")
    return start, received


async def _peek(socket: trio.socket.SocketType, count: int) -> bytes:
    """What will be received next; fewer at the end. Raises ClientGoneError."""
    try:
        socket.setsockopt(SOL_SOCKET, SO_RCVLOWAT, count)
        await trio.lowlevel.wait_readable(socket)
        socket.setsockopt(SOL_SOCKET, SO_RCVLOWAT, 1)
        return await socket.recv(count, MSG_PEEK)
    except OSError:
        raise ClientGoneError("connection lost") from None


async def _receive_at_least(transport: trio.abc.Stream, count: int) -> bytes:
    """Fewer at the end."""
    received = b""
    while len(received) < count and (data := await transport.receive_some(FIRST_READ_BYTES)):
        received += data
    return received
