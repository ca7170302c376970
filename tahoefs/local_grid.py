"""`local:DIR`, the embedded grid: an introducer and ten storage servers as one child process, shared by its mounts.

    DIR/local-grid.lock     marks DIR as ours; locked by whoever makes or starts something in it
    DIR/introducer, DIR/server0 … server9, DIR/client     node directories; the ports are in them
    DIR/root.cap            the root directory's cap, mode 0600, made at first use
    DIR/grid.sock           the child's socket: a mount keeps a connection, and the child ends with the last one
    DIR/running.lock        locked by the child while it lives, so that there is never a second one; holds its pid
    DIR/grid.log            the child's log

    mount                                   child (tahoefs/local_service.py)
      connect, or start it and connect  ->
                                        <-  "ready\\n"  all servers are announced
      shuts down its side when done     ->
                                        <-  closes: at once, or if it was the last mount, when it has ended

A mount whose connection ends otherwise starts the child again, with a growing delay. Nothing here is special to a
grid on one machine: the same protocols, servers and share files as anywhere.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Final, TextIO

import trio

import grid
from grid.atomic_file import create_file
from grid.server_directory import ServerDirectory, create_introducer_directory, create_storage_directory
from tahoefs.sdnotify import VARIABLE as NOTIFY_VARIABLE

log = logging.getLogger(__name__)

SERVERS: Final = 10
SHARES: Final = (3, 7, 10)
RESERVED_SPACE: Final = "100M"
START_TIMEOUT_S: Final = 120.0  # the child's start, and another mount's that has the lock
STOP_TIMEOUT_S: Final = 60.0
ROOT_TIMEOUT_S: Final = 60.0
RESTART_DELAY_S: Final = 1.0  # doubled after each failure
RESTART_DELAY_MAX_S: Final = 30.0
LOCK_POLL_S: Final = 0.05
ANSWER_BYTES_MAX: Final = 64 << 10

LOCK: Final = "local-grid.lock"
RUNNING: Final = "running.lock"
SOCKET: Final = "grid.sock"
ROOT_CAP: Final = "root.cap"
LOG: Final = "grid.log"
READY: Final = b"ready\n"


class LocalGridError(Exception):
    """The embedded grid cannot be made or started; the text says why."""


def client_directory(directory: Path) -> Path:
    """The node directory to use with the grid in `directory`."""
    return directory / "client"


def server_directories(directory: Path) -> list[Path]:
    return [directory / f"server{number}" for number in range(SERVERS)]


def prepare(directory: Path) -> None:
    """Make the node directories that are missing. Raises LocalGridError, NodeDirectoryError."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not (directory / LOCK).exists() and any(directory.iterdir()):
            raise LocalGridError(f"{directory} holds something else; a local grid needs a new or empty directory")
        with (directory / LOCK).open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            _make_missing(directory)
    except OSError as error:
        raise LocalGridError(f"cannot make a grid in {directory}: {error.strerror}") from error


def _make_missing(directory: Path) -> None:
    introducer, client = directory / "introducer", client_directory(directory)
    missing = [path for path in (introducer, *server_directories(directory), client) if not _is_made(path)]
    for path, port in zip(missing, free_ports(len(missing)), strict=True):
        if path.exists():
            shutil.rmtree(path)  # half made, and so never used
        place = {"port": f"tcp:{port}:interface=127.0.0.1", "location": f"tcp:127.0.0.1:{port}"}
        if path == introducer:
            create_introducer_directory(path, nickname="local introducer", **place)
            continue
        furl = introducer_furl(directory)
        if path == client:
            grid.create_client_directory(path, introducers=[furl], nickname="local", shares=SHARES)
        else:
            create_storage_directory(
                path, introducers=[furl], nickname=path.name, reserved_space=RESERVED_SPACE, **place
            )


def _is_made(path: Path) -> bool:
    return (path / "tahoe.cfg").exists()


def introducer_furl(directory: Path) -> str:
    """Raises NodeDirectoryError."""
    return ServerDirectory.open(directory / "introducer").furl_file.read_text().strip()


def free_ports(count: int) -> list[int]:
    """TCP ports nobody on this machine listens on now; asked for together, so that they differ."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


@contextlib.contextmanager
def short_path(path: Path) -> Iterator[str]:
    """A socket's path by way of its directory's descriptor: paths over 107 bytes do not fit an address."""
    descriptor = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{descriptor}/{path.name}"
    finally:
        os.close(descriptor)


@contextlib.asynccontextmanager
async def locked(path: Path, timeout_s: float) -> AsyncIterator[TextIO]:
    """Hold an exclusive lock on a file, which is open for writing.

    Raises LocalGridError when another process does not let go of it.
    """
    with path.open("a") as file:
        deadline_s = trio.current_time() + timeout_s
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if trio.current_time() > deadline_s:
                    raise LocalGridError(f"{path}: locked by another process for {timeout_s:g} s") from None
            await trio.sleep(LOCK_POLL_S)
        yield file


# --- being attached -------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def attached(directory: Path) -> AsyncIterator[None]:
    """The grid in `directory`, which is prepared, runs for as long as this lasts. Raises LocalGridError."""
    keeper = _Keeper(directory)
    async with trio.open_nursery() as nursery:
        await nursery.start(keeper.run)
        try:
            yield
        finally:
            nursery.cancel_scope.cancel()
            with trio.move_on_after(STOP_TIMEOUT_S, shield=True):
                await keeper.detach()


async def root_cap(directory: Path, client: grid.GridClient) -> str:
    """The root directory's write cap; made when there is none. Raises GridUnreachableError, NotEnoughServersError."""
    file = directory / ROOT_CAP
    async with locked(directory / LOCK, START_TIMEOUT_S):
        if not file.exists():
            await client.need_servers(SERVERS)
            with trio.fail_after(ROOT_TIMEOUT_S):
                root = await client.create_empty_dirnode()
            create_file(file, f"{root.get_uri()}\n".encode())
    return file.read_text().strip()


class _Keeper:
    """Keeps one connection to the child, and so the child."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._stream: trio.SocketStream | None = None

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        delay_s = RESTART_DELAY_S
        self._stream = await self._attach()
        task_status.started()
        while True:
            if self._stream is not None:
                await _wait_closed(self._stream)
                await self._stream.aclose()
                self._stream = None
                log.warning("the local grid's process ended; starting it again")
            await trio.sleep(delay_s)
            try:
                self._stream = await self._attach()
            except (LocalGridError, OSError) as error:
                log.error("%s", error)
                delay_s = min(2 * delay_s, RESTART_DELAY_MAX_S)
            else:
                delay_s = RESTART_DELAY_S

    async def detach(self) -> None:
        """Say that we are done; the last one to say so waits for the child's end."""
        if self._stream is not None:
            with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                await self._stream.send_eof()
                await _wait_closed(self._stream)
            await self._stream.aclose()

    async def _attach(self) -> trio.SocketStream:
        if (stream := await self._connect()) is not None:
            return stream
        async with locked(self._directory / LOCK, START_TIMEOUT_S):
            if (stream := await self._connect()) is not None:  # who had the lock started it
                return stream
            await self._start_child()
            if (stream := await self._connect()) is not None:
                return stream
        raise LocalGridError(f"the local grid ended at once; see {self._directory / LOG}")

    async def _connect(self) -> trio.SocketStream | None:
        """None when nobody is there, or about to leave."""
        end = trio.socket.socket(socket.AF_UNIX)
        try:
            with short_path(self._directory / SOCKET) as path:
                await end.connect(path)
            stream = trio.SocketStream(end)
            with trio.fail_after(START_TIMEOUT_S):
                received = b""
                while len(received) < len(READY):
                    data = await stream.receive_some(len(READY) - len(received))
                    if not data:
                        break
                    received += data
            if received == READY:
                return stream
        except trio.TooSlowError:
            end.close()
            raise LocalGridError(f"the local grid in {self._directory} does not answer") from None
        except (OSError, trio.BrokenResourceError) as error:
            if isinstance(error, OSError) and error.errno not in (errno.ENOENT, errno.ECONNREFUSED, errno.ECONNRESET):
                end.close()
                raise LocalGridError(f"cannot reach the grid in {self._directory}: {error.strerror}") from None
        except BaseException:
            end.close()
            raise
        end.close()
        return None

    async def _start_child(self) -> None:
        """Returns when it says it is ready; it goes on by itself, whatever becomes of us."""
        environment = {name: value for name, value in os.environ.items() if name != NOTIFY_VARIABLE}
        process = await trio.lowlevel.open_process(
            [sys.executable, "-P", "-m", "tahoefs.local_service", str(self._directory)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env=environment,
        )
        assert process.stdout is not None
        line = bytearray()
        async with process.stdout as output:
            with trio.move_on_after(START_TIMEOUT_S):
                while not line.endswith(b"\n") and len(line) < ANSWER_BYTES_MAX:
                    data = await output.receive_some(ANSWER_BYTES_MAX)
                    if not data:
                        break
                    line += data
            await process.wait()  # it has long forked
        try:
            answer = json.loads(line or b"{}")
        except ValueError:
            answer = {}
        if "ready" not in answer:
            reason = answer.get("error") or f"it did not start; see {self._directory / LOG}"
            raise LocalGridError(f"the local grid in {self._directory}: {reason}")


async def _wait_closed(stream: trio.SocketStream) -> None:
    with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        while await stream.receive_some(len(READY)):
            pass
