"""Where unsent files are kept: a disk that is full, a limit that is reached, a place that cannot be used, damage.

Whatever happens, what close() promised arrives; what cannot be promised is refused, in words.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sqlite3
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tahoefs.mountpoint import unmount
from tests.real.mounting import Mount, Mounter, tahoefs
from tests.real.sample_tree import content
from tests.real.tahoe_grid import TahoeGrid, wait_until

pytestmark = [pytest.mark.interop, pytest.mark.mount]

FILE_BYTES = 200_000
DISK_BYTES = 16 << 20  # of which the spool leaves 8 MiB free
LIMIT_BYTES = 2 << 20
LARGE_BYTES = 6 * LIMIT_BYTES


@contextlib.contextmanager
def small_disk(path: Path) -> Iterator[Path]:
    """A file system of DISK_BYTES."""
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES},mode=0700", "none", str(path)]
    if os.getuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("only root can mount a small file system here")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def fill(mount: Mount) -> dict[str, bytes]:
    """Write files until there is no room; returns those whose close() promised that they will arrive."""
    closed: dict[str, bytes] = {}
    while True:
        name, data = f"file{len(closed)}", content(FILE_BYTES, len(closed))
        try:
            (mount.path / name).write_bytes(data)
        except OSError as error:
            assert error.errno == errno.ENOSPC
            return closed
        closed[name] = data


def all_there(mount: Mount, files: dict[str, bytes]) -> bool:
    return all((mount.path / name).read_bytes() == data for name, data in files.items())


def kill(mount: Mount) -> None:
    os.kill(mount.pid, signal.SIGKILL)
    wait_until(lambda: not Path(f"/proc/{mount.pid}").exists(), "the daemon to be gone")


def arrived(grid: TahoeGrid, root_cap: str, files: dict[str, bytes]) -> bool:
    return all(grid.get(root_cap, name) == data for name, data in files.items())


def test_the_disk_is_full(real_grid: TahoeGrid, root_cap: str, mounted: Mounter, tmp_path: Path) -> None:
    """ENOSPC for what does not fit. The daemon is killed on the full disk; all that was closed arrives."""
    everybody = range(len(real_grid.servers))
    with small_disk(tmp_path / "disk") as disk:
        node = real_grid.new_client(disk / "node", "small")
        options = ("cache_size=1M", "journal_size=1G")
        with mounted(root_cap, *options, node=node, drain=False) as mount:
            with real_grid.hung(everybody):
                files = fill(mount)
                assert DISK_BYTES / 3 < len(files) * FILE_BYTES < DISK_BYTES
                assert all_there(mount, files)
                assert mount.status()["pending"]["files"] == len(files)
                kill(mount)
            unmount(mount.path, lazy=True)
        with mounted(root_cap, *options, node=node) as mount:
            assert all_there(mount, files)
            mount.sync()
            assert arrived(real_grid, root_cap, files)
            more = {f"more{number}": content(FILE_BYTES, 100 + number) for number in range(len(files))}
            for name, data in more.items():  # there is room again
                wait_until(lambda name=name, data=data: (mount.path / name).write_bytes(data), "room for another file")
            mount.sync()
            assert arrived(real_grid, root_cap, more)


def test_the_journal_is_full(real_grid: TahoeGrid, root_cap: str, mounted: Mounter) -> None:
    """A writer waits for room, and goes on when servers return; who waits too long gets ENOSPC. Nothing is lost."""
    everybody = range(len(real_grid.servers))
    with mounted(root_cap, f"journal_size={LIMIT_BYTES}") as mount:
        assert mount.status()["journal"]["limit"] == LIMIT_BYTES
        with real_grid.hung(everybody):
            files = {f"first{number}": content(FILE_BYTES, 50 + number) for number in range(LIMIT_BYTES // FILE_BYTES)}
            for name, data in files.items():
                (mount.path / name).write_bytes(data)
            waiting = threading.Thread(target=(mount.path / "waiting").write_bytes, args=(content(FILE_BYTES, 70),))
            waiting.start()
            wait_until(lambda: "waiting" in os.listdir(mount.path), "the writer to begin")
        waiting.join()
        files["waiting"] = content(FILE_BYTES, 70)
        mount.sync()
        assert all_there(mount, files) and arrived(real_grid, root_cap, files)
        with real_grid.hung(everybody):
            files = fill(mount)
            assert (len(files) + 1) * FILE_BYTES > LIMIT_BYTES
            assert mount.status()["journal"]["bytes"] <= LIMIT_BYTES
        wait_until(lambda: (mount.path / "after").write_bytes(b"x" * FILE_BYTES), "room for another file")
        mount.sync()
        assert arrived(real_grid, root_cap, files | {"after": b"x" * FILE_BYTES})


def test_a_file_larger_than_the_journal_is_changed(real_grid: TahoeGrid, root_cap: str, mounted: Mounter) -> None:
    """Only what is written is held here, also for who comes after a kill; the rest is read from the grid to be sent."""
    data = bytearray(content(LARGE_BYTES, 90))
    real_grid.put_at(root_cap, "large", bytes(data))
    options = (f"journal_size={LIMIT_BYTES}", "cache_size=4M")

    def change(mount: Mount, offset: int, piece: bytes) -> None:
        with (mount.path / "large").open("r+b") as file:
            file.seek(offset)
            file.write(piece)
        data[offset : offset + len(piece)] = piece

    with mounted(root_cap, *options, drain=False) as mount:
        change(mount, LARGE_BYTES // 2, b"changed" * 200)
        assert mount.status()["journal"]["bytes"] < LIMIT_BYTES // 4
        mount.sync()
        assert real_grid.get(root_cap, "large") == data
        for number in range(30):
            change(mount, number * 131_000, b"%d" % number)
        assert mount.status()["journal"]["bytes"] < LIMIT_BYTES // 4
        kill(mount)
    unmount(mount.path, lazy=True)
    with mounted(root_cap, *options) as mount:
        assert (mount.path / "large").read_bytes() == data
        mount.sync()
        assert real_grid.get(root_cap, "large") == data == (mount.path / "large").read_bytes()
        assert mount.status()["errors"] == []


@pytest.mark.parametrize("place", ["tahoefs", "tahoefs/journal"])
def test_no_place_for_a_journal(
    real_grid: TahoeGrid, root_cap: str, mounted: Mounter, tmp_path: Path, place: str
) -> None:
    """A clear refusal, nothing is mounted; with the place mended the mount works."""
    node = real_grid.new_client(tmp_path / "node", "refused")
    (node / place).parent.mkdir(exist_ok=True)
    (node / place).write_text("not a directory")
    where = tmp_path / "mnt"
    where.mkdir()
    done = tahoefs("mount", "-", where, "-d", node, stdin=root_cap, check=False)
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1 and str(node / place) in done.stderr
    assert not where.is_mount()
    (node / place).unlink()
    with mounted(root_cap, node=node) as mount:
        (mount.path / "file").write_bytes(b"works")


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_no_right_to_write_the_journal(real_grid: TahoeGrid, root_cap: str, tmp_path: Path) -> None:
    node = real_grid.new_client(tmp_path / "node", "refused")
    (node / "tahoefs").mkdir(mode=0o500)
    where = tmp_path / "mnt"
    where.mkdir()
    done = tahoefs("mount", "-", where, "-d", node, stdin=root_cap, check=False)
    assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1
    assert not where.is_mount()


# --- a journal that is not as it was left --------------------------------------------------------------------

SHORT, LONG = 3000, FILE_BYTES  # contents in the journal's rows, and in files beside them


@pytest.fixture
def left_behind(real_grid: TahoeGrid, root_cap: str, mounted: Mounter, tmp_path: Path) -> tuple[Path, dict[str, bytes]]:
    """A node directory whose mount was killed with unsent files: (their journal, what was in them)."""
    node = real_grid.new_client(tmp_path / "node", "killed")
    files = {f"file{number}": content(SHORT if number % 2 else LONG, 80 + number) for number in range(8)}
    with mounted(root_cap, node=node, drain=False) as mount:
        with real_grid.hung(range(len(real_grid.servers))):
            for name, data in files.items():
                (mount.path / name).write_bytes(data)
            descriptor = os.open(mount.path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
            kill(mount)
        unmount(mount.path, lazy=True)
    (slot,) = (node / "tahoefs" / "journal").glob("*/0")
    return slot, files


def node_of(slot: Path) -> Path:
    return slot.parents[3]


def test_a_journal_of_another_version(
    real_grid: TahoeGrid, root_cap: str, mounted: Mounter, left_behind: tuple[Path, dict[str, bytes]], tmp_path: Path
) -> None:
    """Refused, by name; with the program that wrote it, nothing is lost."""
    slot, files = left_behind

    def set_format(number: int) -> None:
        database = sqlite3.connect(slot / "journal.db")
        database.execute("UPDATE meta SET value = ? WHERE name = 'format'", (str(number),))
        database.commit()
        database.close()

    set_format(99)
    where = tmp_path / "mnt"
    where.mkdir()
    done = tahoefs("mount", "-", where, "-d", node_of(slot), stdin=root_cap, check=False)
    assert done.returncode == 1 and not where.is_mount()
    assert len(done.stderr.strip().splitlines()) == 1
    assert str(slot) in done.stderr and "format is 99" in done.stderr
    set_format(1)
    with mounted(root_cap, node=node_of(slot)) as mount:
        assert all_there(mount, files)
        mount.sync()
        assert arrived(real_grid, root_cap, files)


def test_damaged_contents(
    real_grid: TahoeGrid, root_cap: str, mounted: Mounter, left_behind: tuple[Path, dict[str, bytes]]
) -> None:
    """A byte of one file is flipped: that file is not sent, and status names it; all others arrive."""
    slot, files = left_behind
    damaged = min((slot / "files").iterdir(), key=lambda path: int(path.name))
    assert damaged.stat().st_size == LONG
    data = bytearray(damaged.read_bytes())
    data[LONG // 2] ^= 1
    damaged.write_bytes(data)
    intact = files.copy()
    intact.pop("file0")
    with mounted(root_cap, node=node_of(slot), drain=False) as mount:
        assert all_there(mount, intact)
        refused = tahoefs("sync", mount.path, check=False)
        assert refused.returncode != 0 and "file0" in refused.stderr
        errors = mount.status()["errors"]
        assert any(error["path"].endswith("file0") and "damaged" in error["message"] for error in errors)
        wait_until(lambda: set(real_grid.json(root_cap)[1]["children"]) == set(intact), "the others to arrive")
        assert arrived(real_grid, root_cap, intact)
        (mount.path / "file0").write_bytes(files["file0"])  # all one can do
        mount.sync()
        assert arrived(real_grid, root_cap, files)
        tahoefs("umount", mount.path)


def test_damaged_rows(
    real_grid: TahoeGrid, root_cap: str, mounted: Mounter, left_behind: tuple[Path, dict[str, bytes]]
) -> None:
    """One row is not what was written there: it is told, and what it stood for is missing; all others arrive."""
    slot, files = left_behind
    database = sqlite3.connect(slot / "journal.db")
    (number,) = database.execute("SELECT max(id) FROM rows").fetchone()
    database.execute("UPDATE rows SET sealed = zeroblob(length(sealed)) WHERE id = ?", (number,))
    database.commit()
    database.close()
    with mounted(root_cap, node=node_of(slot)) as mount:
        assert any("1 damaged entries" in error["message"] for error in mount.status()["errors"])
        missing = set(files) - set(os.listdir(mount.path))
        assert len(missing) <= 1
        intact = {name: data for name, data in files.items() if name not in missing}
        assert all_there(mount, intact)
        mount.sync()
        assert arrived(real_grid, root_cap, intact)
