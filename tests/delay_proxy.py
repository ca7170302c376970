"""A TCP proxy that delays what a server answers, as distance does: every byte, without limiting how many are under way.

    with DelayProxies({3457: 0.02}) as proxies:     replies of 127.0.0.1:3457 come 20 ms late through
        proxies.port(3457)                          this port
        proxies.delay_s[3457] = 0.2                 may be changed at any time

All proxies of one object run in one thread of their own.
"""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable, Mapping
from types import TracebackType
from typing import Self

import trio

Handler = Callable[[trio.SocketStream], Awaitable[None]]

HOST = "127.0.0.1"
CHUNK_BYTES = 256 << 10
CHUNKS_UNDER_WAY_MAX = 400  # a bound on memory; far above what the delays here call for
START_TIMEOUT_S = 10


class DelayProxies:
    def __init__(self, delay_s: Mapping[int, float]) -> None:
        """{port of the server: seconds}."""
        self.delay_s = dict(delay_s)
        self._ports: dict[int, int] = {}
        self._ready = threading.Event()
        self._scope = trio.CancelScope()
        self._token: trio.lowlevel.TrioToken
        self._thread = threading.Thread(target=trio.run, args=(self._run,), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(START_TIMEOUT_S)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        trio.from_thread.run_sync(self._scope.cancel, trio_token=self._token)
        self._thread.join()

    def port(self, server: int) -> int:
        return self._ports[server]

    def through(self, server: int, text: str) -> str:
        """An address with the server's port in it, such as a FURL, with the proxy's instead."""
        return text.replace(f":{server}", f":{self._ports[server]}")

    async def _run(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        with self._scope:
            async with trio.open_nursery() as nursery:
                for server in self.delay_s:
                    (listener,) = await trio.open_tcp_listeners(0, host=HOST)
                    self._ports[server] = listener.socket.getsockname()[1]
                    nursery.start_soon(trio.serve_listeners, self._handler(server), [listener])
                self._ready.set()

    def _handler(self, server: int) -> Handler:
        async def handle(client: trio.SocketStream) -> None:
            try:
                async with await trio.open_tcp_stream(HOST, server) as upstream, trio.open_nursery() as nursery:
                    nursery.start_soon(_pass_on, client, upstream)
                    await self._pass_back(server, upstream, client)
                    nursery.cancel_scope.cancel()
            except* (OSError, trio.BrokenResourceError, trio.ClosedResourceError):
                pass  # one side is gone, so the other goes

        return handle

    async def _pass_back(self, server: int, source: trio.SocketStream, sink: trio.SocketStream) -> None:
        send, receive = trio.open_memory_channel[tuple[float, bytes]](CHUNKS_UNDER_WAY_MAX)

        async def deliver() -> None:
            async for due, data in receive:
                await trio.sleep_until(due)
                await sink.send_all(data)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(deliver)
            async with send:
                while data := await source.receive_some(CHUNK_BYTES):
                    await send.send((trio.current_time() + self.delay_s[server], bytes(data)))


async def _pass_on(source: trio.SocketStream, sink: trio.SocketStream) -> None:
    while data := await source.receive_some(CHUNK_BYTES):
        await sink.send_all(data)
    await sink.send_eof()
