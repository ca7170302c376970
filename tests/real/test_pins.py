"""What is pinned is there without the grid: all of it, as it is now, whatever else was read, killed or not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tahoefs.mountpoint import unmount
from tests.real.mounting import Mount, Mounter, tahoefs
from tests.real.sample_tree import content
from tests.real.tahoe_grid import TahoeGrid, wait_until

pytestmark = [pytest.mark.interop, pytest.mark.mount]

OPTIONS = ("cache_size=4M", "poll=0.5")
TREE = {
    "tiny": b"t",
    "small": content(5000, 71),
    "a/b/large": content(700_000, 72),
    "a/b/c/deep": content(20_000, 73),
    "a/unicode ü": content(3000, 74),
}


def pinned(mount: Mount, path: str = "/tree") -> dict[str, Any]:
    """As `tahoefs status --json` tells."""
    status = json.loads(tahoefs("status", mount.path, "--json").stdout)
    found: dict[str, Any] = next(pin for pin in status["pinned"] if pin["path"] == path)
    return found


def make(grid: TahoeGrid, root_cap: str, tree: dict[str, bytes]) -> None:
    for name, data in tree.items():
        grid.put_at(root_cap, f"tree/{name}", data)


def reads_all(mount: Mount, tree: dict[str, bytes]) -> None:
    listing = subprocess.run(["ls", "-lR", mount.path / "tree"], check=True, capture_output=True).stdout.decode()
    assert all(Path(name).name in listing for name in tree)
    assert {name: (mount.path / "tree" / name).read_bytes() for name in tree} == tree
    here = [path for path in (mount.path / "tree").rglob("*") if path.is_file()]
    assert len(here) == len(tree)


def test_pinned_changed_and_under_pressure(
    real_grid: TahoeGrid, root_cap: str, mounted: Mounter, tmp_path: Path
) -> None:
    tree = dict(TREE)
    make(real_grid, root_cap, tree)
    mutable = real_grid.put_at(root_cap, "tree/a/mutable", content(4000, 75), "SDMF")
    node = real_grid.new_client(tmp_path / "node", "pins")
    with mounted(root_cap, *OPTIONS, node=node) as mount:
        tahoefs("pin", mount.path / "tree")
        size = sum(map(len, tree.values())) + 4000
        complete = {"path": "/tree", "state": "complete", "files": 6, "files_held": 6, "message": None}
        assert pinned(mount) == complete | {"bytes": size, "bytes_held": size}
        assert "/tree  complete, 6 files" in tahoefs("status", mount.path).stdout

        tree["a/b/c/new"] = content(30_000, 77)  # by another writer; ours; and in place
        real_grid.put_at(root_cap, "tree/a/b/c/new", tree["a/b/c/new"])
        tree["small"] = content(6000, 78)
        (mount.path / "tree" / "small").write_bytes(tree["small"])
        mount.sync()
        real_grid.put_into(mutable, 0, content(4500, 79))
        tree["a/mutable"] = content(4500, 79)
        whole = sum(map(len, tree.values()))
        wait_until(lambda: pinned(mount)["bytes_held"] == whole and pinned(mount)["state"] == "complete", "the changes")

        for number in range(5):  # more than the cache has room for
            (mount.path / f"more{number}").write_bytes(content(1_000_000, 80 + number))
            mount.sync()
        packs = sum(path.stat().st_size for path in (node / "tahoefs" / "cache").rglob("*.pack"))
        assert packs <= 4 << 20
        refused = tahoefs("pin", mount.path, check=False)
        assert refused.returncode == 1 and "does not fit" in refused.stderr and "cache_size=" in refused.stderr
    with real_grid.without(range(10)), mounted(root_cap, *OPTIONS, drain=False, node=node) as mount:
        wait_until(lambda: mount.status()["state"] == "offline", "the mount to notice", 30)
        reads_all(mount, tree)
        with pytest.raises(OSError, match="Input/output error"):
            (mount.path / "more0").read_bytes()
        assert pinned(mount)["state"] == "complete"
        offline = tahoefs("pin", mount.path / "more0", check=False)
        assert offline.returncode == 3 and "it stays pinned" in offline.stderr
        tahoefs("unpin", mount.path / "more0")
        tahoefs("umount", mount.path)


def kill_amid(where: Path, files: int) -> None:
    """Kill the daemon there once it holds so many files of what is pinned."""
    mount = Mount(where)
    wait_until(lambda: pinned(mount)["files_held"] >= files, "some files to be held")
    os.kill(mount.pid, signal.SIGKILL)
    wait_until(lambda: not Path(f"/proc/{mount.pid}").exists(), "the daemon to be gone")
    unmount(where, lazy=True)


def test_killed_in_the_middle_it_goes_on(real_grid: TahoeGrid, root_cap: str, mounted: Mounter, tmp_path: Path) -> None:
    tree = {f"folder{number % 3}/file{number}": content(40_000 + number, number) for number in range(24)}
    make(real_grid, root_cap, tree)
    node = real_grid.new_client(tmp_path / "node", "pins")
    with mounted(root_cap, *OPTIONS, drain=False, node=node) as mount:
        tahoefs("pin", mount.path / "tree", "--no-wait")
        for wanted in (3, 12):
            kill_amid(mount.path, wanted)
            tahoefs("mount", "-", mount.path, "-d", node, *[f"-o{each}" for each in OPTIONS], stdin=root_cap)
        tahoefs("pin", mount.path / "tree")
        kill_amid(mount.path, len(tree))
    with real_grid.without(range(10)), mounted(root_cap, *OPTIONS, drain=False, node=node) as mount:
        wait_until(lambda: mount.status()["state"] == "offline", "the mount to notice", 30)
        reads_all(mount, tree)
        tahoefs("umount", mount.path)
