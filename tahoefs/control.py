"""The daemon's end of the control socket: one request a connection, answered in lines of JSON.

The protocol is described in `control_client.py`. The socket is 0600 in a directory that is 0700: who can connect is
the mounting user or root. Every request has a bounded size and must arrive at once; there is a bounded number
of connections. A connection that is closed by its client cancels what it asked for.
"""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Final

import trio

from tahoefs.errnos import exit_code_of
from tahoefs.failures import leaf_error

log = logging.getLogger(__name__)

REQUEST_BYTES_MAX: Final = 256 << 10  # a literal directory's cap can be long, and so can metadata
REQUEST_TIMEOUT_S: Final = 10.0
SEND_TIMEOUT_S: Final = 10.0
CONNECTIONS_MAX: Final = 32

Progress = Callable[[dict[str, Any]], Awaitable[None]]
Command = Callable[[dict[str, Any], Progress], Awaitable[Any]]


async def serve_control(
    path: Path, commands: Mapping[str, Command], *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Answer on the Unix socket `path` until cancelled."""
    listener = trio.socket.socket(socket.AF_UNIX)
    directory = await trio.to_thread.run_sync(_open_directory, path.parent)
    try:
        await listener.bind(f"/proc/self/fd/{directory}/{path.name}")  # long paths do not fit an address
        await trio.Path(path).chmod(0o600)
        listener.listen(CONNECTIONS_MAX)
        limit = trio.CapacityLimiter(CONNECTIONS_MAX)

        async def handle(stream: trio.SocketStream) -> None:
            async with limit, stream:
                await _answer(stream, commands)

        task_status.started()
        await trio.serve_listeners(handle, [trio.SocketListener(listener)])
    finally:
        os.close(directory)
        listener.close()


def _open_directory(path: Path) -> int:
    return os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)


async def _answer(stream: trio.SocketStream, commands: Mapping[str, Command]) -> None:
    async def send(answer: dict[str, Any]) -> None:
        with trio.fail_after(SEND_TIMEOUT_S):
            await stream.send_all(json.dumps(answer).encode() + b"\n")

    async def progress(state: dict[str, Any]) -> None:
        await send({"progress": state})

    try:
        request = await _request(stream)
        command = commands.get(request.get("command", ""))
        if command is None:
            await send({"error": "unknown command", "exit_code": 2})
            return
        try:
            result = await command(request, progress)
        except (trio.BrokenResourceError, trio.TooSlowError):
            raise
        except Exception as raised:  # noqa: BLE001 the asker must hear of it, whatever it is; the daemon lives on
            error = leaf_error(raised)
            log.info("control command failed: %s", error)
            await send({"error": str(error) or type(error).__name__, "exit_code": exit_code_of(error)})
        else:
            await send({"result": result})
    except (trio.BrokenResourceError, trio.TooSlowError, ValueError) as error:
        log.debug("control connection dropped: %s", error)


async def _request(stream: trio.SocketStream) -> dict[str, Any]:
    """Raises ValueError when it is no JSON object in one line, TooSlowError when it does not come."""
    received = bytearray()
    with trio.fail_after(REQUEST_TIMEOUT_S):
        while not received.endswith(b"\n"):
            data = await stream.receive_some(REQUEST_BYTES_MAX)
            received += data
            if not data or len(received) > REQUEST_BYTES_MAX:
                raise ValueError("request incomplete or too large")
    request = json.loads(received)
    if not isinstance(request, dict):
        raise ValueError("request is no object")
    return request
