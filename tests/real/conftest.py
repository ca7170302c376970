"""One real grid a test session, and real mounts on it made with the command line, as a user would.

Tests here skip, by name and with the reason, where there is no /dev/fuse or where Tahoe-LAFS cannot be installed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tahoefs.control_client import ControlError
from tahoefs.mountpoint import FUSE_TYPE, filesystem_at
from tests.real.mounting import Mount, Mounter, can_mount, tahoefs
from tests.real.tahoe_grid import TahoeGrid, TahoeNotAvailable


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
