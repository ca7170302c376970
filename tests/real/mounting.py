"""Our command line run as a user runs it, and the mounts that it makes."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tahoefs.control_client import ask
from tahoefs.mount_config import MountConfig, log_file
from tahoefs.registry import find_socket
from tests.real.tahoe_grid import wait_until

COMMAND_TIMEOUT_S = 240


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

    def status(self) -> dict[str, Any]:
        socket = find_socket(self.path)
        assert socket is not None
        answer: dict[str, Any] = ask(socket, {"command": "status"}, timeout_s=30)
        return answer

    def sync(self, timeout_s: float = 120) -> None:
        tahoefs("sync", self.path, "--timeout", str(timeout_s))

    def wait_servers(self, count: int) -> None:
        wait_until(lambda: self.status()["servers"]["connected"] == count, f"the mount to reach {count} servers")

    def log(self, node_dir: Path) -> str:
        return log_file(MountConfig(str(node_dir), "", (), "", str(self.path))).read_text()


Mounter = Callable[..., contextlib.AbstractContextManager[Mount]]
