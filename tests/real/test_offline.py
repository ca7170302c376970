"""Without the grid: what was seen is listed and read at its usual speed, all else fails at once, and it comes back."""

from __future__ import annotations

import errno
import subprocess
import time
from pathlib import Path

import pytest

from tests.real.mounting import Mount, Mounter, tahoefs
from tests.real.sample_tree import content
from tests.real.tahoe_grid import TahoeGrid, wait_until

pytestmark = [pytest.mark.interop, pytest.mark.mount]

FAIL_S = 1.0  # promised, once it is known that the grid is offline
MARKER = b"a line that must not be found on the disk\n"


def state(mount: Mount) -> str:
    return str(mount.status()["state"])


def fails_at_once(path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(OSError, match="Input/output error") as failure:
        path.read_bytes()
    assert failure.value.errno == errno.EIO
    assert time.monotonic() - started < FAIL_S


def test_the_grid_goes_and_comes_back(real_grid: TahoeGrid, root_cap: str, mounted: Mounter, node_dir: Path) -> None:
    """Written here, read here, by this mount or an earlier one: all of it can be read without any server."""
    tree = {"a/small": content(5000, 51), "a/b/large": content(1_500_000, 52), "text": MARKER * 50, "tiny": b"tiny"}
    real_grid.put_at(root_cap, "unread", content(200_530, 53))
    seen = {"read": content(200_000, 54), "mutable": content(3000, 55)}
    real_grid.put_at(root_cap, "read", seen["read"])
    real_grid.put_at(root_cap, "mutable", seen["mutable"], "SDMF")
    with mounted(root_cap) as mount:
        for name, data in tree.items():
            (mount.path / name).parent.mkdir(parents=True, exist_ok=True)
            (mount.path / name).write_bytes(data)
        mount.sync()
        assert {name: (mount.path / name).read_bytes() for name in seen} == seen
    tree |= seen
    with mounted(root_cap, "poll=0.5") as mount:
        with real_grid.without(range(10)):
            wait_until(lambda: state(mount) == "offline", "the mount to notice", 30)
            fails_at_once(mount.path / "unread")
            read_all(mount, tree)
            (mount.path / "written").write_bytes(b"while it was away" * 1000)
            with mounted(root_cap, drain=False) as another:
                wait_until(lambda: state(another) == "offline", "the new mount to notice", 30)
                read_all(another, tree)
                fails_at_once(another.path / "unread")
                tahoefs("umount", another.path)
        wait_until(lambda: state(mount) == "online", "the mount to come back", 90)
        assert (mount.path / "unread").read_bytes() == content(200_530, 53)
        mount.wait_servers(10)
        mount.sync()
    assert real_grid.get(root_cap, "written") == b"while it was away" * 1000
    nothing_readable(node_dir / "tahoefs")


def read_all(mount: Mount, tree: dict[str, bytes]) -> None:
    started = time.monotonic()
    listing = subprocess.run(["ls", "-lR", mount.path], check=True, capture_output=True).stdout.decode()
    assert all(Path(name).name in listing for name in tree)
    for name, data in tree.items():
        assert (mount.path / name).read_bytes() == data, name
    assert time.monotonic() - started < 5  # no deadline was waited for


def nothing_readable(path: Path) -> None:
    """Neither contents nor caps in what is kept on the disk."""
    files = [each for each in path.rglob("*") if each.is_file()]
    assert any(each.suffix == ".pack" for each in files)
    for each in files:
        data = each.read_bytes()
        assert MARKER.strip() not in data, each
        assert b"URI:" not in data, each


def test_servers_that_hang_are_gone_too(real_grid: TahoeGrid, root_cap: str, mounted: Mounter) -> None:
    """SIGSTOP: every connection stays up. A reader waits once, until it is clear that nobody answers."""
    for number in range(3):
        real_grid.put_at(root_cap, f"unread{number}", content(100_600, 60 + number))
    real_grid.put_at(root_cap, "read", content(100_000, 64))
    with mounted(root_cap, "poll=0.5") as mount:
        assert (mount.path / "read").read_bytes() == content(100_000, 64)
        with real_grid.hung(range(10)):
            with pytest.raises(OSError, match="Input/output error"):
                (mount.path / "unread0").read_bytes()
            assert state(mount) == "offline"
            fails_at_once(mount.path / "unread1")
            read_all(mount, {"read": content(100_000, 64)})
        wait_until(lambda: state(mount) == "online", "the mount to come back", 90)
        assert (mount.path / "unread2").read_bytes() == content(100_600, 62)
