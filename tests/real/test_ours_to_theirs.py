"""What is copied into the mount, the real client finds: equal, healthy, ten shares each, under the same caps."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.real.mounting import Mounter, tahoefs
from tests.real.sample_tree import content, many_files, sample_files, write_tree
from tests.real.tahoe_grid import TahoeGrid

pytestmark = [pytest.mark.interop, pytest.mark.mount]


def their_listing(grid: TahoeGrid, cap: str) -> dict[str, object]:
    children: dict[str, object] = grid.json(cap)[1]["children"]
    return children


def test_a_tree_copied_in(real_grid: TahoeGrid, root_cap: str, mounted: Mounter, tmp_path: Path) -> None:
    """`cp -r` in; the real client reads every file, and its deep check verifies every share."""
    files = sample_files() | {f"many/{name}": data for name, data in many_files().items()}
    write_tree(tmp_path / "tree", files)
    with mounted(root_cap) as mount:
        subprocess.run(["cp", "-r", tmp_path / "tree", mount.path], check=True)
    for name, data in files.items():
        if not name.startswith("many/") or len(data) > 55:
            assert real_grid.get(root_cap, f"tree/{name}") == data, name
    assert set(their_listing(real_grid, real_grid.json(root_cap, "tree/many")[1]["rw_uri"])) == set(many_files())
    *units, totals = real_grid.deep_check(root_cap)
    checked = [each["check-results"]["results"] for each in units if each["storage-index"]]
    assert len(checked) >= 7 + 20
    assert all(each["healthy"] and each["count-shares-good"] == 10 for each in checked)
    assert all(each["count-corrupt-shares"] == 0 for each in checked)
    assert totals["type"] == "stats"


def test_the_same_content_has_the_cap_that_tahoe_gives(
    real_grid: TahoeGrid, root_cap: str, mounted: Mounter, node_dir: Path, tmp_path: Path
) -> None:
    """One convergence secret, one cap: by `tahoefs cap --of`, by the mount (twice), by the real client's put."""
    for size in (55, 56, 5_000, 1_500_000):
        local = tmp_path / f"local{size}"
        local.write_bytes(content(size, size))
        theirs = real_grid.put(local.read_bytes())
        assert tahoefs("cap", "--of", local, "-d", node_dir).stdout.strip() == theirs
        with mounted(root_cap) as mount:
            for name in ("one", "two"):
                (mount.path / name).write_bytes(local.read_bytes())
            mount.sync()
            assert os.getxattr(mount.path / "one", "user.tahoe.cap").decode() == theirs
            assert os.getxattr(mount.path / "one", "user.tahoe.state") == b"stored"
            assert b"user.tahoe.cap" not in os.listxattr(mount.path / "one")  # type: ignore[comparison-overlap]
        for name in ("one", "two"):
            assert real_grid.json(root_cap, name)[1]["ro_uri"] == theirs


def test_our_upload_of_what_is_stored_sends_nothing(real_grid: TahoeGrid, root_cap: str, mounted: Mounter) -> None:
    """The servers' share files keep their inode and modification time: nobody wrote them again."""
    data = content(3_000_000, 77)
    cap = real_grid.put(data)
    from grid.formats.base32 import b2a
    from grid.formats.caps import parse_known_cap

    storage_index = parse_known_cap(cap).storage_index
    assert storage_index is not None
    files = [file for copies in real_grid.share_files(b2a(storage_index)).values() for _, file in copies]
    before = {file: (file.stat().st_ino, file.stat().st_size) for file in files}
    with mounted(root_cap) as mount:
        (mount.path / "again").write_bytes(data)
    after = [file for copies in real_grid.share_files(b2a(storage_index)).values() for _, file in copies]
    assert {file: (file.stat().st_ino, file.stat().st_size) for file in after} == before
    assert len(before) == 10


def test_changes_arrive(real_grid: TahoeGrid, root_cap: str, mounted: Mounter) -> None:
    """mkdir, write, append, truncate, write in the middle, rename over and across, unlink, rmdir, chmod, utimens."""
    data = content(200_000, 5)
    with mounted(root_cap) as mount:
        folder = mount.path / "folder"
        folder.mkdir()
        (folder / "kept").write_bytes(data)
        with (folder / "kept").open("ab") as file:
            file.write(b"appended")
        with (folder / "kept").open("r+b") as file:
            file.seek(1000)
            file.write(b"in the middle")
        os.truncate(folder / "kept", 150_000)
        (folder / "over").write_bytes(b"to be replaced")
        (folder / "source").write_bytes(b"the replacement")
        (folder / "source").rename(folder / "over")
        (folder / "mover").write_bytes(b"moved to another directory")
        (folder / "mover").rename(mount.path / "moved")
        (folder / "gone").write_bytes(b"short-lived")
        (folder / "gone").unlink()
        (mount.path / "empty").mkdir()
        (mount.path / "empty").rmdir()
        (mount.path / "moved").chmod(0o600)
        os.utime(mount.path / "moved", ns=(1_500_000_000_123_456_789, 1_500_000_000_123_456_789))
        with pytest.raises(FileExistsError):
            os.open(mount.path / "moved", os.O_CREAT | os.O_EXCL)
        with pytest.raises(OSError, match="not empty"):
            folder.rmdir()
    expected = bytearray(data[:150_000])
    expected[1000:1013] = b"in the middle"
    assert real_grid.get(root_cap, "folder/kept") == bytes(expected)
    assert real_grid.get(root_cap, "folder/over") == b"the replacement"
    assert real_grid.get(root_cap, "moved") == b"moved to another directory"
    assert set(their_listing(real_grid, root_cap)) == {"folder", "moved"}
    assert set(their_listing(real_grid, real_grid.json(root_cap, "folder")[1]["rw_uri"])) == {"kept", "over"}
    with mounted(root_cap) as mount:
        status = (mount.path / "moved").stat()
        assert (status.st_mode & 0o777, status.st_mtime_ns) == (0o600, 1_500_000_000_123_456_789)
        assert (mount.path / "folder" / "kept").read_bytes() == bytes(expected)


def test_unlinked_while_open(real_grid: TahoeGrid, root_cap: str, mounted: Mounter) -> None:
    real_grid.put_at(root_cap, "file", b"still readable after its name is gone, and long enough")
    with mounted(root_cap) as mount:
        with (mount.path / "file").open("rb") as file:
            (mount.path / "file").unlink()
            assert os.listdir(mount.path) == []
            assert file.read().startswith(b"still readable")
            assert os.fstat(file.fileno()).st_nlink == 0
        with (mount.path / "new").open("w+b") as file:
            file.write(b"never stored anywhere")
            (mount.path / "new").unlink()
            file.seek(0)
            assert file.read() == b"never stored anywhere"
    assert their_listing(real_grid, root_cap) == {}


def test_mutable_files_are_rewritten_in_place(real_grid: TahoeGrid, root_cap: str, mounted: Mounter) -> None:
    """An existing SDMF file keeps its cap when written; its other holders see the new contents."""
    cap = real_grid.put_at(root_cap, "mutable", b"first contents", "SDMF")
    with mounted(root_cap) as mount:
        (mount.path / "mutable").write_bytes(b"second contents, longer than the first")
        assert (mount.path / "mutable").read_bytes() == b"second contents, longer than the first"
    assert real_grid.get(cap) == b"second contents, longer than the first"
    assert real_grid.json(root_cap, "mutable")[1]["rw_uri"] == cap
    assert real_grid.check(cap)["results"]["healthy"]
