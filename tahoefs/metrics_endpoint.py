"""A page for Prometheus to scrape, on loopback: `http://127.0.0.1:PORT/metrics`. HTTP/1.1, one request a connection.

Everybody on this machine can read it: there is nothing secret in statistics. Requests are small and come soon, or are
dropped.
"""

from __future__ import annotations

import logging
from typing import Final, NoReturn

import trio

from grid.stats import Registry
from tahoefs.exposition import CONTENT_TYPE, prometheus_text

log = logging.getLogger(__name__)

HOST: Final = "127.0.0.1"
REQUEST_BYTES_MAX: Final = 16 << 10
REQUEST_TIMEOUT_S: Final = 10.0  # for the request, and for the answer to be taken
CONNECTIONS_MAX: Final = 8
RECEIVE_BYTES: Final = 4096


class MetricsPortError(Exception):
    """The port cannot be listened on. The text names it."""

    exit_code = 1


async def serve_metrics(
    port: int, registry: Registry, *, task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED
) -> NoReturn:
    """Until cancelled; reports the port, which the system chooses for 0. Raises MetricsPortError."""
    try:
        listeners = await trio.open_tcp_listeners(port, host=HOST)
    except OSError as error:
        raise MetricsPortError(f"cannot serve metrics on port {port}: {error.strerror or error}") from error
    limit = trio.CapacityLimiter(CONNECTIONS_MAX)

    async def handle(stream: trio.SocketStream) -> None:
        async with limit, stream:
            try:
                with trio.fail_after(REQUEST_TIMEOUT_S):
                    await stream.send_all(_answer(await _request_line(stream), registry))
            except (trio.TooSlowError, trio.BrokenResourceError, ValueError) as error:
                log.debug("metrics request dropped: %s", error)

    task_status.started(listeners[0].socket.getsockname()[1])
    await trio.serve_listeners(handle, listeners)


async def _request_line(stream: trio.SocketStream) -> bytes:
    """Of a request whose head came whole. Raises ValueError."""
    received = bytearray()
    while b"\r\n\r\n" not in received:
        data = await stream.receive_some(RECEIVE_BYTES)
        received += data
        if not data or len(received) > REQUEST_BYTES_MAX:
            raise ValueError("request incomplete or too large")
    return bytes(received.partition(b"\r\n")[0])


def _answer(request_line: bytes, registry: Registry) -> bytes:
    method, _, rest = request_line.partition(b" ")
    target = rest.partition(b" ")[0].partition(b"?")[0]
    if method not in (b"GET", b"HEAD"):
        status, body = "405 Method Not Allowed", b"GET only\n"
    elif target not in (b"/metrics", b"/"):
        status, body = "404 Not Found", b"see /metrics\n"
    else:
        status, body = "200 OK", prometheus_text(registry).encode()
    head = (
        f"HTTP/1.1 {status}\r\ncontent-type: {CONTENT_TYPE}\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
    )
    return head.encode() + (b"" if method == b"HEAD" else body)
