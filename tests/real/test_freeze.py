"""`tahoefs freeze` of a mounted tree: only directories go up, the snapshot is equal, and stays so."""

from __future__ import annotations

import filecmp
import json
import os
from pathlib import Path
from typing import Final

import pytest

from tests.real.mounting import Mounter, tahoefs
from tests.real.sample_tree import content
from tests.real.tahoe_grid import TahoeGrid

pytestmark = [pytest.mark.interop, pytest.mark.mount]

FILES: Final = 5000 if os.environ.get("TAHOEFS_SOAK") else 120
DIRECTORIES: Final = 50 if os.environ.get("TAHOEFS_SOAK") else 4
TABLE_BYTES_MAX: Final = 1000  # of an entry in a directory's table


def tree_of(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_a_snapshot_of_a_mount(real_grid: TahoeGrid, root_cap: str, mounted: Mounter, node_dir: Path) -> None:
    with mounted(root_cap) as mount:
        for number in range(FILES):
            folder = mount.path / "source" / f"d{number % DIRECTORIES}"
            folder.mkdir(parents=True, exist_ok=True)
            size = 2000 if number % 40 == 0 else 20 + number % 30  # most of them literals, so that making them is quick
            (folder / f"file {number}").write_bytes(content(size, number))
        (mount.path / "source" / "link").symlink_to("d0/file 0")
        before = tree_of(mount.path / "source")
        done = tahoefs("freeze", mount.path / "source", "--json", "-d", node_dir)
        answer = json.loads(done.stdout)
        assert (answer["directories"], answer["kept"], answer["left-out"]) == (1 + DIRECTORIES, FILES + 1, [])
        assert answer["directory-bytes"] < TABLE_BYTES_MAX * (FILES + DIRECTORIES + 1)
        cap = answer["cap"]
        assert cap.startswith("URI:DIR2-CHK:")
        (mount.path / "source" / "d0" / "file 0").write_bytes(b"changed")
        (mount.path / "source" / "d1" / "file 1").unlink()
        with mounted(cap) as frozen:
            assert tree_of(frozen.path) == before
            assert (frozen.path / "link").readlink() == Path("d0/file 0")
            with pytest.raises(OSError, match="Read-only"):
                (frozen.path / "new").touch()
            mount.sync()
            compared = filecmp.dircmp(mount.path / "source" / "d0", frozen.path / "d0")
            assert compared.diff_files == ["file 0"] and not compared.left_only + compared.right_only
    assert real_grid.json(cap, "d0")[0] == "dirnode"
    assert real_grid.get(cap, "d1/file 1") == before["d1/file 1"]


def test_mutable_files_are_copied_and_said_so(real_grid: TahoeGrid, root_cap: str, node_dir: Path) -> None:
    mutable = real_grid.put_at(root_cap, "mutable", content(500, 1), "SDMF")
    done = tahoefs("freeze", "-", "--as", "snapshot", "-d", node_dir, stdin=root_cap)
    assert done.stdout == "alias snapshot: made\n" and "copied, since it is mutable: mutable" in done.stderr
    real_grid.request("PUT", "/uri/" + mutable.replace(":", "%3A"), b"changed")
    cap = next(
        line for line in tahoefs("cap", "snapshot:", "-d", node_dir).stdout.splitlines() if "cap: URI:DIR2-" in line
    )
    assert real_grid.get(cap.partition(": ")[2].strip(), "mutable") == content(500, 1)
