"""Connections to one HTTP server: kept open and used again, several at a time, none opened before it is needed.

A request takes a free connection or opens one, up to CONNECTIONS_MAX, so that independent requests need not wait
for each other's round trips; more than that wait in line. What a server closed for being idle is replaced
without anybody noticing.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final, NoReturn, TypeVar

import trio

from grid.errors import ConnectionLostError, PeerError, PeerTimeoutError
from grid.peers import deadlines
from grid.peers.pulse import Pulse
from grid.transports.http import Answer, Buffer, Headers, HTTPConnection, StaleConnectionError, dial_http
from grid.wire.gbs import CBOR_TYPE, Nurl, authorization

CONNECTIONS_MAX: Final = 8  # to one server; 1.20's own clients use ten
IDLE_S: Final = 45.0  # then we close it: servers do so after 60 s, and might while our request is on its way
DIAL_TIMEOUT_S: Final = 30.0  # TCP and TLS

T = TypeVar("T")


@contextmanager
def limit(timeout_s: float, what: str) -> Iterator[None]:
    """Raises PeerTimeoutError."""
    with trio.move_on_after(timeout_s) as scope:
        yield
    if scope.cancelled_caught:
        raise PeerTimeoutError(f"no answer to {what} within {timeout_s:.0f} s")


async def dial(nurl: Nurl) -> HTTPConnection:
    """Raises PeerError."""
    with limit(DIAL_TIMEOUT_S, "dialling"):
        return await dial_http(nurl.host, nurl.port, spki_hash=nurl.spki_hash)
    raise AssertionError("unreachable")


class ConnectionPool:
    def __init__(self, nurl: Nurl, pulse: Pulse) -> None:
        self._nurl = nurl
        self._pulse = pulse
        self._headers = common_headers(nurl)
        self._slots = trio.Semaphore(CONNECTIONS_MAX)
        self._idle: list[HTTPConnection] = []  # used last comes last
        self._closed = False

    async def request(
        self,
        method: bytes,
        path: bytes,
        headers: Headers = (),
        body: Sequence[Buffer] = (),
        *,
        answer_bytes_max: int,
        timeout_s: float,
        moved_bytes: int = 0,
        light: bool = False,
        what: str,
    ) -> Answer:
        """One request and its answer, whatever its status. The deadline counts from now.

        A request may reach the server twice when an idle connection breaks just then. Raises PeerError.
        """
        if self._closed:
            raise ConnectionLostError("not connected")
        with limit(deadlines.with_data(timeout_s, moved_bytes), what):
            async with self._slots:
                while True:
                    connection = await self._take()
                    try:
                        with self._pulse.call(moved_bytes, light=light):
                            return await connection.request(
                                method, path, (*self._headers, *headers), body, answer_bytes_max=answer_bytes_max
                            )
                    except StaleConnectionError:
                        continue  # each time round there is one idle connection less
                    finally:
                        await self._give_back(connection)
        raise AssertionError("unreachable")

    async def _take(self) -> HTTPConnection:
        while self._idle:
            connection = self._idle.pop()
            if not connection.is_stale():
                return connection
            await connection.aclose()
        with self._pulse.dialling():
            return await dial(self._nurl)
        raise AssertionError("unreachable")

    async def _give_back(self, connection: HTTPConnection) -> None:
        if connection.reusable and not self._closed:
            self._idle.append(connection)
        else:
            await connection.aclose()

    async def close_idle(self) -> NoReturn:
        """Close what has been idle for long, until cancelled."""
        while True:
            await trio.sleep(IDLE_S / 3)
            oldest = trio.current_time() - IDLE_S
            for connection in [each for each in self._idle if each.idle_since < oldest]:
                self._idle.remove(connection)
                await connection.aclose()

    def close(self) -> None:
        """Everything is closed, or is when the request it serves now ends."""
        self._closed = True
        for connection in self._idle:
            connection.close_forcefully()
        self._idle.clear()


def common_headers(nurl: Nurl) -> Headers:
    # no `Accept-Encoding`: shares are ciphertext, there is nothing to compress
    return ((b"authorization", authorization(nurl.swissnum)), (b"accept", CBOR_TYPE))


async def all_of(calls: Sequence[Callable[[], Awaitable[T]]]) -> list[T]:
    """Run them at the same time and return their results in order; the first PeerError ends them all."""
    if len(calls) == 1:
        return [await calls[0]()]
    results: dict[int, T] = {}
    failure: PeerError | None = None

    async def run(number: int, call: Callable[[], Awaitable[T]]) -> None:
        nonlocal failure
        try:
            results[number] = await call()
        except PeerError as error:
            failure = failure or error
            nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        for number, call in enumerate(calls):
            nursery.start_soon(run, number, call)
    if failure is not None:
        raise failure
    return [results[number] for number in range(len(calls))]
