"""One real grid a test session, and real mounts on it made with the command line, as a user would.

Tests here skip, by name and with the reason, where there is no /dev/fuse or where Tahoe-LAFS cannot be installed.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tahoefs.control_client import ControlError
from tahoefs.mountpoint import FUSE_TYPE, filesystem_at, unmount
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
def mounted(node_dir: Path, tmp_path: Path) -> Mounter:
    """`with mounted(cap, "ro") as mount:` mounts by the command line and unmounts at the end, sending everything."""
    return mounter(node_dir, tmp_path)


def mounter(node_dir: Path, tmp_path: Path) -> Mounter:
    """The same for any node directory; a mount's own `node` goes before it. Skips where nothing can be mounted."""
    if (reason := can_mount()) is not None:
        pytest.skip(reason)
    count = 0

    @contextlib.contextmanager
    def mount(cap: str, *options: str, drain: bool = True, node: Path = node_dir) -> Iterator[Mount]:
        nonlocal count
        count += 1
        where = tmp_path / f"mnt{count}"
        where.mkdir()
        arguments = [each for option in options for each in ("-o", option)]
        tahoefs("mount", "-", where, "-d", node, *arguments, stdin=cap)
        yield Mount(where)
        if drain:
            tahoefs("umount", where)

    return mount


@pytest.fixture(autouse=True)
def _nothing_left_mounted(tmp_path: Path) -> Iterator[None]:
    """A test that failed leaves mounts and daemons behind: they must not disturb the next."""
    yield
    for where in tmp_path.iterdir() if filesystem_under(tmp_path) else ():
        if filesystem_at(where) == FUSE_TYPE:
            with contextlib.suppress(ControlError, ProcessLookupError, AssertionError):
                os.kill(Mount(where).pid, signal.SIGKILL)
            unmount(where, lazy=True)


def filesystem_under(path: Path) -> bool:
    return f" {path}/" in Path("/proc/self/mountinfo").read_text()


@pytest.fixture
def root_cap(real_grid: TahoeGrid) -> str:
    """A new, empty directory made by the real client."""
    return real_grid.mkdir()
