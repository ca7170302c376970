"""Real mounts, through the kernel: what only shows there."""

from __future__ import annotations

import errno
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tahoefs.fuse import fuse_arguments
from tahoefs.mountpoint import filesystem_at, unmount
from tahoefs.options import MountOptions
from tests.tahoefs.mounts import MemoryMount, memory_mount, needs_fuse


@pytest.fixture(scope="module")
def mount(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MemoryMount]:
    with memory_mount(tmp_path_factory.mktemp("fuse") / "mnt", "-o", "timeout=2") as mounted:
        yield mounted


@pytest.fixture
def here(mount: MemoryMount, request: pytest.FixtureRequest) -> Path:
    path = mount.path / request.node.name[:80]
    path.mkdir()
    return path


def test_the_label_reaches_the_mount_table_whatever_is_in_it() -> None:
    arguments = fuse_arguments(MountOptions(), "tahoe:a,b\\c", read_only=True)
    assert arguments == {"fsname=tahoe:a\\,b\\\\c", "subtype=tahoefs", "ro", "default_permissions"}
    assert "default_permissions" not in fuse_arguments(MountOptions(uid=5), "x", read_only=False)


@needs_fuse
def test_mounted_as_tahoefs_with_its_label(mount: MemoryMount) -> None:
    assert filesystem_at(mount.path) == "fuse.tahoefs"
    assert any(
        line.startswith(f"memory:test,label {mount.path} ") for line in Path("/proc/mounts").read_text().splitlines()
    )


@needs_fuse
def test_a_bug_in_a_handler_costs_one_call_and_is_logged_and_counted(tmp_path: Path) -> None:
    with memory_mount(tmp_path / "mnt") as mounted:
        for _ in range(2):
            with pytest.raises(OSError, match="Input/output error"):
                (mounted.path / "fault-here").stat()
        assert (mounted.path / "literal.txt").read_text() == "literal\n"
        mounted.stop()
    assert mounted.counts["faults"] == 2
    assert "ValueError: a bug, made for a test" in mounted.log


@needs_fuse
def test_a_call_that_is_never_answered_ends_at_its_deadline_and_holds_nobody_else_up(mount: MemoryMount) -> None:
    (mount.path / "deep").mkdir()
    outcome: list[int | None] = []

    def ask() -> None:
        try:
            (mount.path / "deep" / "hang-here").stat()
        except OSError as error:
            outcome.append(error.errno)

    asker = threading.Thread(target=ask)
    asker.start()
    assert (mount.path / "literal.txt").read_text() == "literal\n"
    asker.join(20)
    assert outcome == [errno.EIO]


@needs_fuse
def test_what_path_and_fs_limits_say(mount: MemoryMount) -> None:
    assert os.pathconf(mount.path, "PC_NAME_MAX") == 255
    space = os.statvfs(mount.path)
    assert space.f_namemax == 255 and space.f_bavail > 0 and space.f_favail > 0
    assert (mount.path / "literal.txt").stat().st_blocks == 1


@needs_fuse
def test_write_anywhere_append_and_sparse(here: Path) -> None:
    path = here / "file"
    with path.open("wb") as file:
        file.seek(1_000_000)
        file.write(b"end")
        file.flush()
        assert path.stat().st_size == 1_000_003, "seen while still open"
        file.seek(10)
        file.write(b"begin")
    with path.open("ab") as file:
        file.write(b"!")
    data = path.read_bytes()
    assert (len(data), data[10:15], data[-4:], data[15:1_000_000].count(0)) == (1_000_004, b"begin", b"end!", 999_985)
    os.truncate(path, 12)
    assert path.read_bytes() == bytes(10) + b"be"
    os.truncate(path, 1 << 45)
    assert path.stat().st_size == 1 << 45
    with pytest.raises(OSError, match="File too large"):
        os.truncate(path, 1 << 60)


@needs_fuse
def test_ordinary_programs(here: Path) -> None:
    source = Path(__file__).parents[2] / "grid"
    script = f"""
        set -eu
        cp -a {source} copy && diff -r {source} copy
        tar cf tree.tar copy && mkdir out && tar xf tree.tar -C out && diff -r copy out/copy
        mv copy moved && rm -r moved && ! test -e moved
        ln -s tree.tar link && test "$(readlink link)" = tree.tar && cmp link tree.tar
        mkfifo fifo && (echo through > fifo &) && test "$(cat fifo)" = through
        touch -d '2001-02-03 04:05:06.123456789 UTC' old && test "$(stat -c %y old)" = "$(TZ= stat -c %y old)"
        test "$(TZ=UTC stat -c %y old)" = '2001-02-03 04:05:06.123456789 +0000'
        echo one > a && echo two > b && mv --exchange a b 2>/dev/null || true
        find . -type f | xargs cat | wc -c
    """
    done = subprocess.run(["bash", "-c", script], cwd=here, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


@needs_fuse
def test_kernel_forgets_and_nothing_is_left_open(tmp_path: Path) -> None:
    with memory_mount(tmp_path / "mnt") as mounted:
        for number in range(50):
            (mounted.path / f"{number}").write_bytes(b"x")
        for number in range(50):
            (mounted.path / f"{number}").unlink()
        mounted.stop()
    assert mounted.counts["handles"] == 0
    assert mounted.counts["inodes"] < 10
    assert mounted.counts["faults"] == 0


@needs_fuse
def test_ended_by_a_signal_it_unmounts_and_stores_what_is_open(tmp_path: Path) -> None:
    with memory_mount(tmp_path / "mnt") as mounted:
        descriptor = os.open(mounted.path / "open", os.O_WRONLY | os.O_CREAT)
        os.write(descriptor, b"data")
        mounted.stop()
        assert filesystem_at(mounted.path) is None
        with pytest.raises(OSError):
            os.close(descriptor)
    assert mounted.counts["calls"]["store"] == 1
    assert mounted.process.returncode == 0


@needs_fuse
def test_ended_by_umount(tmp_path: Path) -> None:
    with memory_mount(tmp_path / "mnt") as mounted:
        (mounted.path / "file").write_bytes(b"data")
        unmount(mounted.path)
        mounted.join()
    assert (mounted.process.returncode, mounted.counts["handles"]) == (0, 0)


@needs_fuse
def test_a_read_only_root_is_a_read_only_file_system(tmp_path: Path) -> None:
    with memory_mount(tmp_path / "mnt", "--ro-root") as mounted:
        assert (mounted.path / "literal.txt").read_text() == "literal\n"
        for attempt in (
            lambda: (mounted.path / "new").touch(),
            lambda: (mounted.path / "literal.txt").unlink(),
            lambda: (mounted.path / "literal.txt").chmod(0o600),
            lambda: os.truncate(mounted.path / "literal.txt", 0),
        ):
            with pytest.raises(OSError) as caught:
                attempt()
            assert caught.value.errno == errno.EROFS
        assert not os.access(mounted.path, os.W_OK)
