"""The child process of `local:DIR` (`python -m tahoefs.local_service DIR`): all of its nodes in one event loop.

Says on standard output, in one line of JSON, that all servers are announced or why not. Ends when the last mount that
was connected to its socket has left (or when nobody comes). It ignores SIGTERM: a service manager that stops everything
at once would otherwise take the servers away from mounts that are still sending.
See tahoefs/local_grid.py for the whole.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import trio

from grid.atomic_file import replace_file
from grid.node_files import introducers_text
from grid.server_directory import Endpoint, ServerDirectory
from grid.services import Serving, serve_node
from tahoefs.failures import leaf_error
from tahoefs.limits import allow_open_files
from tahoefs.local_grid import (
    LOG,
    READY,
    RUNNING,
    SOCKET,
    START_TIMEOUT_S,
    client_directory,
    free_ports,
    introducer_furl,
    locked,
    server_directories,
    short_path,
)
from tahoefs.logs import set_up_logging

log = logging.getLogger(__name__)

FIRST_MOUNT_TIMEOUT_S: Final = 60.0
PUBLISH_TIMEOUT_S: Final = 60.0
BACKLOG: Final = 64


async def serve_grid(directory: Path, ready: Callable[[], None]) -> None:
    """Run the grid in `directory`; `ready()` is called when mounts may connect. Returns when the last one has left."""
    async with locked(directory / RUNNING, START_TIMEOUT_S) as running:
        running.truncate(0)
        running.write(f"{os.getpid()}\n")
        running.flush()
        _give_free_ports(directory)
        stop = trio.Event()
        users = _Users()
        async with (
            trio.open_nursery() as connections
        ):  # outside: the last mount sees by its connection when we are done
            async with trio.open_nursery() as nodes:
                await nodes.start(serve_node, ServerDirectory.open(directory / "introducer"), stop)
                servers: list[Serving] = [
                    await nodes.start(serve_node, ServerDirectory.open(path), stop)
                    for path in server_directories(directory)
                ]
                with trio.fail_after(PUBLISH_TIMEOUT_S):
                    for server in servers:
                        await server.published.wait()
                await connections.start(users.serve, directory / SOCKET)
                log.info("ready: %d servers", len(servers))
                ready()
                await users.wait_until_gone()
                stop.set()
            connections.cancel_scope.cancel()


class _Users:
    """The mounts that are connected."""

    def __init__(self) -> None:
        self._count = 0
        self._came = trio.Event()
        self._gone = trio.Event()

    async def serve(self, path: Path, *, task_status: trio.TaskStatus[None]) -> None:
        """Listen on the socket until the last user has left, then hold its connection until cancelled."""
        listener = trio.socket.socket(socket.AF_UNIX)
        await trio.Path(path).unlink(missing_ok=True)
        with short_path(path) as short:
            await listener.bind(short)
        await trio.Path(path).chmod(0o600)
        listener.listen(BACKLOG)
        async with trio.open_nursery() as connections:
            with trio.CancelScope() as listening:
                connections.start_soon(self._stop_listening, path, listening)
                task_status.started()
                await trio.serve_listeners(self._handle, [trio.SocketListener(listener)], handler_nursery=connections)
            listener.close()

    async def _stop_listening(self, path: Path, listening: trio.CancelScope) -> None:
        await self._gone.wait()
        await trio.Path(path).unlink(missing_ok=True)
        listening.cancel()

    async def _handle(self, stream: trio.SocketStream) -> None:
        self._count += 1
        self._came.set()
        async with stream:
            with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                await stream.send_all(READY)
                while await stream.receive_some(1):
                    pass
            self._count -= 1
            log.info("a mount left; %d remain", self._count)
            if self._count == 0:
                self._gone.set()
                await trio.sleep_forever()

    async def wait_until_gone(self) -> None:
        with trio.move_on_after(FIRST_MOUNT_TIMEOUT_S):
            await self._came.wait()
        if not self._came.is_set():
            log.warning("nobody came")
            self._gone.set()
        await self._gone.wait()


# --- ports ------------------------------------------------------------------------------------------------------


def _give_free_ports(directory: Path) -> None:
    """Another program may have taken a port of ours while we were away: such a node gets a new one."""
    introducer, servers = directory / "introducer", server_directories(directory)
    taken = [path for path in (introducer, *servers) if not _can_listen(ServerDirectory.open(path).endpoints[0])]
    for path, port in zip(taken, free_ports(len(taken)), strict=True):
        log.warning("%s: its port was taken by another program; it gets port %d", path.name, port)
        text = (path / "tahoe.cfg").read_text(encoding="utf-8")
        text = re.sub(r"(?m)^tub\.port = .*$", f"tub.port = tcp:{port}:interface=127.0.0.1", text)
        text = re.sub(r"(?m)^tub\.location = .*$", f"tub.location = tcp:127.0.0.1:{port}", text)
        replace_file(path / "tahoe.cfg", text.encode(), mode=0o644)
    if introducer in taken:
        listed = introducers_text([introducer_furl(directory)])
        for path in (*servers, client_directory(directory)):
            replace_file(path / "private" / "introducers.yaml", listed)


def _can_listen(endpoint: Endpoint) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the listener will
        try:
            probe.bind((endpoint.host or "127.0.0.1", endpoint.port))
            probe.listen()
        except OSError:
            return False
    return True


def main() -> int:
    directory = Path(sys.argv[1])
    if os.fork():  # so that the mount which started us has no child to look after: others may need us longer
        os._exit(0)
    os.chdir("/")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answered = False

    def answer(message: dict[str, Any]) -> None:
        nonlocal answered
        if not answered:
            answered = True
            with contextlib.suppress(OSError):
                print(json.dumps(message), flush=True)
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.close(null)

    set_up_logging(directory / LOG, debug=False)
    allow_open_files()
    try:
        trio.run(serve_grid, directory, lambda: answer({"ready": True}))
    except BaseException as raised:
        error = leaf_error(raised)
        log.error("the grid ended: %s", error, exc_info=raised)
        answer({"error": str(error) or type(error).__name__})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
