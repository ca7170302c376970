"""What the real client writes appears in the mount: right sizes, equal bytes, for every kind of cap."""

from __future__ import annotations

import filecmp
import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from tests.real.mounting import Mounter
from tests.real.sample_tree import content, many_files, sample_files, write_tree
from tests.real.tahoe_grid import TahoeGrid

pytestmark = [pytest.mark.interop, pytest.mark.mount]

FUTURE_CAP = "lafs://from_the_future"
MUTABLE_SIZE = 300_000  # three MDMF segments of 128 KiB


@pytest.fixture
def their_tree(real_grid: TahoeGrid, root_cap: str) -> dict[str, bytes]:
    """The sample tree, put there by the real client, with every other kind of cap beside it."""
    files = sample_files()
    for name, data in files.items():
        real_grid.put_at(root_cap, name, data)
    for name, file_format in (("sdmf", "SDMF"), ("mdmf", "MDMF")):
        files[name] = content(MUTABLE_SIZE, len(files))
        real_grid.put_at(root_cap, name, files[name], file_format)
    files["empty-sdmf"] = b""
    real_grid.put_at(root_cap, "empty-sdmf", b"", "SDMF")
    many = real_grid.mkdir()
    real_grid.set_children(
        many, {name: ["filenode", {"ro_uri": real_grid.put(data)}] for name, data in many_files().items()}
    )
    real_grid.link(root_cap, "many", many)
    files |= {f"many/{name}": data for name, data in many_files().items()}
    return files


def test_every_kind_is_listed_and_read(
    real_grid: TahoeGrid, root_cap: str, their_tree: dict[str, bytes], mounted: Mounter, tmp_path: Path
) -> None:
    """Sizes as `ls -l` shows them, and an empty `diff -r` after `cp -r` out of the mount."""
    expected, copied = tmp_path / "expected", tmp_path / "copied"
    write_tree(expected, their_tree)
    with mounted(root_cap) as mount:
        for name, data in their_tree.items():
            assert (mount.path / name).stat().st_size == len(data), name
        subprocess.run(["cp", "-r", mount.path, copied], check=True)
    difference = subprocess.run(["diff", "-r", expected, copied], capture_output=True, text=True, check=False)
    assert (difference.returncode, difference.stdout) == (0, "")


def test_immutable_directories(real_grid: TahoeGrid, root_cap: str, mounted: Mounter) -> None:
    """DIR2-CHK and DIR2-LIT directories: readable, without write bits, and changes are refused."""
    small, large = content(20, 1), content(500, 2)
    literal = real_grid.mkdir_immutable({"f": ["filenode", {"ro_uri": real_grid.put(b"")}]})
    frozen = real_grid.mkdir_immutable(
        {f"file{i}": ["filenode", {"ro_uri": real_grid.put(data)}] for i, data in enumerate((small, large))}
    )
    assert literal.startswith("URI:DIR2-LIT:") and frozen.startswith("URI:DIR2-CHK:")
    real_grid.link(root_cap, "literal", literal)
    real_grid.link(root_cap, "frozen", frozen)
    with mounted(root_cap) as mount:
        assert os.listdir(mount.path / "literal") == ["f"]
        assert (mount.path / "frozen" / "file0").read_bytes() == small
        assert (mount.path / "frozen" / "file1").read_bytes() == large
        assert stat.S_IMODE((mount.path / "frozen").stat().st_mode) & 0o222 == 0
        with pytest.raises(PermissionError):
            (mount.path / "frozen" / "new").write_bytes(b"x")
        with pytest.raises(PermissionError):
            (mount.path / "frozen" / "file0").unlink()


def test_read_only_subdirectory(real_grid: TahoeGrid, root_cap: str, mounted: Mounter) -> None:
    inner = real_grid.mkdir()
    real_grid.put_at(inner, "file", b"seen through a read cap, long enough not to be a literal")
    read_cap = real_grid.json(inner)[1]["ro_uri"]
    real_grid.link(root_cap, "readonly", read_cap)
    with mounted(root_cap) as mount:
        folder = mount.path / "readonly"
        assert (folder / "file").read_bytes().startswith(b"seen through")
        assert stat.S_IMODE(folder.stat().st_mode) & 0o222 == 0
        with pytest.raises(PermissionError):
            (folder / "file").unlink()


def test_future_cap_is_shown_and_refused(real_grid: TahoeGrid, root_cap: str, mounted: Mounter) -> None:
    """An unknown cap is listed, cannot be opened, and survives a rename and a change beside it."""
    real_grid.set_children(root_cap, {"future": ["unknown", {"ro_uri": FUTURE_CAP}]})
    with mounted(root_cap) as mount:
        assert os.listdir(mount.path) == ["future"]
        with pytest.raises(PermissionError):
            (mount.path / "future").read_bytes()
        (mount.path / "future").rename(mount.path / "renamed")
        (mount.path / "beside").write_bytes(b"x")
    kind, info = real_grid.json(root_cap, "renamed")
    assert kind == "unknown" and info["ro_uri"] == f"ro.{FUTURE_CAP}"


def test_sub_path_and_read_only_mounts(real_grid: TahoeGrid, root_cap: str, mounted: Mounter) -> None:
    real_grid.put_at(root_cap, "a/b/file", b"deep")
    with mounted(f"{root_cap}/a/b") as mount:
        assert (mount.path / "file").read_bytes() == b"deep"
        (mount.path / "more").write_bytes(b"written below the mounted path")
    assert real_grid.get(root_cap, "a/b/more") == b"written below the mounted path"
    read_cap = real_grid.json(root_cap)[1]["ro_uri"]
    for cap, options in ((read_cap, ()), (root_cap, ("ro",))):
        with mounted(cap, *options) as mount:
            assert (mount.path / "a" / "b" / "file").read_bytes() == b"deep"
            with pytest.raises(OSError, match="Read-only file system"):
                (mount.path / "new").write_bytes(b"x")


def test_changes_made_elsewhere_appear(real_grid: TahoeGrid, root_cap: str, mounted: Mounter) -> None:
    from tests.real.tahoe_grid import wait_until

    with mounted(root_cap, "poll=1") as mount:
        assert os.listdir(mount.path) == []
        real_grid.put_at(root_cap, "later", b"made by another client")
        wait_until(lambda: "later" in os.listdir(mount.path), "the other client's file", 30)
        assert (mount.path / "later").read_bytes() == b"made by another client"


def test_metadata_of_backup_is_honoured(real_grid: TahoeGrid, root_cap: str, mounted: Mounter) -> None:
    """`tahoe backup` keeps a top-level mtime; a change by us beside it leaves it alone."""
    cap = real_grid.put(b"a file with a time of its own, from long ago, kept on the link")
    frozen = real_grid.mkdir_immutable({"old": ["filenode", {"ro_uri": cap, "metadata": {"mtime": 1_000_000_000.5}}]})
    real_grid.link(root_cap, "backup", frozen)
    with mounted(root_cap) as mount:
        assert (mount.path / "backup" / "old").stat().st_mtime == 1_000_000_000.5


def test_copy_in_place_of_a_removed_tree(real_grid: TahoeGrid, root_cap: str, mounted: Mounter, tmp_path: Path) -> None:
    """Copy out with the standard library too (it uses other calls than `cp`)."""
    real_grid.put_at(root_cap, "x/y", content(5000, 9))
    with mounted(root_cap) as mount:
        shutil.copytree(mount.path / "x", tmp_path / "x")
        assert filecmp.cmp(mount.path / "x" / "y", tmp_path / "x" / "y", shallow=False)
