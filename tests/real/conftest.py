"""One real grid a test session, and real mounts on it made with the command line, as a user would.

Tests here skip, by name and with the reason, where there is no /dev/fuse or where Tahoe-LAFS cannot be installed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tahoefs.control_client import ControlError, ask
from tahoefs.mountpoint import FUSE_TYPE, filesystem_at
from tahoefs.registry import find_socket
from tests.real.tahoe_grid import TahoeGrid, TahoeNotAvailable, wait_until

COMMAND_TIMEOUT_S = 240


@pytest.fixture(scope="session")
def real_grid(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TahoeGrid]:
    """Ten servers, 3-of-10, happy 7. Tests that stop servers bring them back."""
    try:
        grid = TahoeGrid(tmp_path_factory.mktemp("tahoe-grid"))
    except TahoeNotAvailable as reason:
        pytest.skip(str(reason))
    try:
        yield grid.start()
    finally:
        grid.stop()


@pytest.fixture(scope="session")
def node_dir(real_grid: TahoeGrid) -> Path:
    """The real client's own node directory, used unchanged beside the running client."""
    return real_grid.client.path


def tahoefs(*arguments: str | Path, check: bool = True, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run one command of ours and return what it said."""
    done = subprocess.run(
        [sys.executable, "-m", "tahoefs.cli", *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=COMMAND_TIMEOUT_S,
        check=False,
    )
    if check and done.returncode != 0:
        raise AssertionError(f"tahoefs {arguments[0]} ended with {done.returncode}: {done.stdout}{done.stderr}")
    return done


def can_mount() -> str | None:
    """Why mounting is not possible here, or None."""
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "no /dev/fuse to mount with"
    if os.getuid() != 0 and shutil.which("fusermount3") is None:
        return "neither root nor fusermount3"
    return None


class Mount:
    """A real mount: `path` is the folder, `pid` the daemon's process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.pid: int = self.status()["pid"]

    def status(self) -> dict:  # type: ignore[type-arg]
        socket = find_socket(self.path)
        assert socket is not None
        answer: dict = ask(socket, {"command": "status"}, timeout_s=30)  # type: ignore[type-arg]
        return answer

    def sync(self, timeout_s: float = 120) -> None:
        tahoefs("sync", self.path, "--timeout", str(timeout_s))

    def wait_servers(self, count: int) -> None:
        wait_until(lambda: self.status()["servers"]["connected"] == count, f"the mount to reach {count} servers")

    def log(self, node_dir: Path) -> str:
        from tahoefs.mount_config import MountConfig, log_file

        return log_file(MountConfig(str(node_dir), "", (), "", str(self.path))).read_text()


Mounter = Callable[..., contextlib.AbstractContextManager[Mount]]


@pytest.fixture
def mounted(node_dir: Path, tmp_path: Path) -> Iterator[Mounter]:
    """`with mounted(cap, "ro") as mount:` mounts by the command line and unmounts at the end, sending everything."""
    if (reason := can_mount()) is not None:
        pytest.skip(reason)
    pids: list[int] = []
    count = 0

    @contextlib.contextmanager
    def mount(cap: str, *options: str, drain: bool = True) -> Iterator[Mount]:
        nonlocal count
        count += 1
        where = tmp_path / f"mnt{count}"
        where.mkdir()
        arguments = [each for option in options for each in ("-o", option)]
        tahoefs("mount", "-", where, "-d", node_dir, *arguments, stdin=cap)
        one = Mount(where)
        pids.append(one.pid)
        try:
            yield one
        finally:
            if drain:
                tahoefs("umount", where)
            elif filesystem_at(where) == FUSE_TYPE:
                subprocess.run(["umount", "-l", where], check=True)

    yield mount
    for pid in pids:  # a test that failed, or that did not drain, leaves a daemon
        with contextlib.suppress(ProcessLookupError, ControlError):
            os.kill(pid, signal.SIGKILL)
    for number in range(1, count + 1):
        if filesystem_at(tmp_path / f"mnt{number}") == FUSE_TYPE:
            subprocess.run(["umount", "-l", tmp_path / f"mnt{number}"], check=False)


@pytest.fixture
def root_cap(real_grid: TahoeGrid) -> str:
    """A new, empty directory made by the real client."""
    return real_grid.mkdir()
