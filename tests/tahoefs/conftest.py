"""What tests of mounting share: a place to make calls in, on a mount and on a local file system."""

from __future__ import annotations

import itertools
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tahoefs.mounts import MemoryMount, memory_mount, why_not

HELPER = Path("/sbin/mount.tahoefs")
_place_numbers = itertools.count()


@pytest.fixture
def helper_installed() -> Iterator[None]:
    """mount(8) looks in /sbin alone."""
    if os.getuid() != 0:
        pytest.skip("only root can install /sbin/mount.tahoefs")
    program = Path(sys.executable).with_name("mount.tahoefs")
    if not program.exists():
        pytest.skip("mount.tahoefs is not installed beside this Python")
    if HELPER.exists():
        yield
        return
    HELPER.unlink(missing_ok=True)  # a link to nowhere
    HELPER.symlink_to(program)
    try:
        yield
    finally:
        HELPER.unlink()


def local_filesystem() -> str:
    """The type of the file system that `tmp_path` is on, which serves as the control."""
    here = Path(tempfile.gettempdir()).resolve()
    found = {}
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, where, kind, *_ = line.split()
        found[where] = kind
    return next(found[str(path)] for path in (here, *here.parents) if str(path) in found)


@pytest.fixture(scope="session")
def posix_mount(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MemoryMount]:
    """The real workspace over storage servers in memory, open to all users."""
    if (reason := why_not()) is not None:
        pytest.skip(f"cannot mount: {reason}")
    with memory_mount(tmp_path_factory.mktemp("posix") / "mnt", "--real", "-o", "allow_other") as mounted:
        yield mounted
        mounted.stop()
        assert (mounted.counts["faults"], mounted.counts["timeouts"], mounted.counts["handles"]) == (0, 0, 0)


@pytest.fixture(params=[local_filesystem(), pytest.param("mount", marks=pytest.mark.mount)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """An empty directory open to all: on a local file system, the control, then on a mount. Both must do the same."""
    path = tmp_path / "place"
    if request.param == "mount":
        mounted: MemoryMount = request.getfixturevalue("posix_mount")
        path = mounted.path / f"place{next(_place_numbers)}"
    path.mkdir()
    path.chmod(0o755)
    yield path
    os.chdir("/")
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def furnished(place: Path) -> Path:
    """With: file, dir/inner/, empty/, link -> file, dangling -> nowhere, loop -> loop, fifo."""
    (place / "file").write_bytes(b"data")
    (place / "dir" / "inner").mkdir(parents=True)
    (place / "empty").mkdir()
    (place / "link").symlink_to("file")
    (place / "dangling").symlink_to("nowhere")
    (place / "loop").symlink_to("loop")
    os.mkfifo(place / "fifo")
    return place
