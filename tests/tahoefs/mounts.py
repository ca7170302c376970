"""Real mounts of the VFS over the twin in memory, each in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from attrs import define, field

from tahoefs.mountpoint import filesystem_at, unmount

REPOSITORY = Path(__file__).parents[2]
STOP_TIMEOUT_S = 20


def why_not() -> str | None:
    """Why nothing can be mounted here, or None."""
    if not Path("/dev/fuse").exists():
        return "/dev/fuse is missing"
    if os.getuid() != 0 and shutil.which("fusermount3") is None:
        return "neither root nor fusermount3"
    return None


def needs_fuse(test: Any) -> Any:
    reason = why_not()
    return pytest.mark.mount(pytest.mark.skipif(reason is not None, reason=f"cannot mount: {reason}")(test))


@define
class MemoryMount:
    path: Path
    process: subprocess.Popen[str]
    counts: dict[str, Any] = field(factory=dict)  # told at its end
    log: str = ""

    def stop(self) -> None:
        """End it as a service manager would."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        self.join()

    def remount(self) -> None:
        """Unmount, have everything sent, and mount again what the grid then has (`--real` only)."""
        self.process.send_signal(signal.SIGHUP)
        assert self.process.stdout is not None
        if self.process.stdout.readline() != "ready\n":
            self.join()
            raise RuntimeError(f"the mount did not come up again: {self.log}")

    def join(self) -> None:
        try:
            out, self.log = self.process.communicate(timeout=STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        if out.strip():
            self.counts = json.loads(out)


@contextlib.contextmanager
def memory_mount(path: Path, *arguments: str) -> Iterator[MemoryMount]:
    path.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "tests.tahoefs.memory_mount", str(path), *arguments]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    mount = MemoryMount(path, process)
    try:
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            mount.join()
            raise RuntimeError(f"the mount did not come up: {mount.log}")
        yield mount
    finally:
        try:
            if not mount.log:
                mount.stop()
        finally:
            if filesystem_at(path) is not None:
                unmount(path, lazy=True)
