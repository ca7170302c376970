"""Files that are read while their pages are pushed into the kernel, and changed at that moment, on a real mount."""

from __future__ import annotations

import mmap
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

import pytest

from tahoefs.pushing import SEQUENTIAL_BYTES
from tests.tahoefs.mounts import MemoryMount, memory_mount, needs_fuse

FILE_BYTES = (8 << 20) + 12_345
PIECE_BYTES = 1 << 18
STAMP = bytes([1]) * 5000
PLACE = 5 << 20
ROUNDS = 10 if os.environ.get("TAHOEFS_SOAK") == "1" else 1
TIMEOUT_S = 60


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[MemoryMount]:
    with memory_mount(tmp_path / "mnt", "--real") as mounted:
        yield mounted


def contents(name: str) -> bytes:
    return random.Random(name).randbytes(FILE_BYTES)


def read_on(path: Path, far: Callable[[], object]) -> bytes:
    """All of it from one descriptor, front to back; `far` is called in the middle of where pages are pushed."""
    pieces, size = [], 0
    with path.open("rb", buffering=0) as file:
        while piece := file.read(PIECE_BYTES):
            pieces.append(piece)
            size += len(piece)
            if size - len(piece) < SEQUENTIAL_BYTES <= size:
                far()
    return b"".join(pieces)


def overwrite(path: Path, before: bytes) -> bytes:
    with path.open("r+b", buffering=0) as file:
        file.seek(PLACE)
        file.write(STAMP)
        assert (
            os.pread(file.fileno(), len(STAMP) + 2, PLACE - 1)
            == before[PLACE - 1 : PLACE] + STAMP + before[PLACE + len(STAMP) : PLACE + len(STAMP) + 1]
        )
    return before[:PLACE] + STAMP + before[PLACE + len(STAMP) :]


def cut(path: Path, before: bytes) -> bytes:
    os.truncate(path, PLACE)
    assert path.stat().st_size == PLACE
    return before[:PLACE]


def cut_and_lengthen(path: Path, before: bytes) -> bytes:
    with path.open("r+b", buffering=0) as file:
        file.truncate(PLACE)
        file.truncate(FILE_BYTES)
        assert not any(os.pread(file.fileno(), 1 << 20, PLACE))
    return before[:PLACE] + bytes(FILE_BYTES - PLACE)


def empty(path: Path, before: bytes) -> bytes:
    path.open("wb").close()
    assert path.stat().st_size == 0
    return b""


def write_anew(path: Path, before: bytes) -> bytes:
    path.write_bytes(STAMP)
    return STAMP


def replace(path: Path, before: bytes) -> bytes:
    other = path.with_name(f"{path.name} made anew")
    other.write_bytes(before[::-1])
    other.rename(path)
    return before[::-1]


def map_and_write(path: Path, before: bytes) -> bytes:
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        mapped[PLACE : PLACE + len(STAMP)] = STAMP
    return before[:PLACE] + STAMP + before[PLACE + len(STAMP) :]


def append(path: Path, before: bytes) -> bytes:
    with path.open("ab") as file:
        file.write(STAMP)
    return before + STAMP


def keep(path: Path, before: bytes) -> bytes:
    return before


CHANGES = [overwrite, cut, cut_and_lengthen, empty, write_anew, replace, map_and_write, append, keep]


@needs_fuse
def test_what_is_read_is_right_whatever_changes_meanwhile(mount: MemoryMount) -> None:
    expected = {change.__name__: contents(change.__name__) for change in CHANGES}
    for name, data in expected.items():
        (mount.path / name).write_bytes(data)
    for _ in range(ROUNDS):
        mount.remount()
        for change in CHANGES:
            path, before = mount.path / change.__name__, expected[change.__name__]
            seen, far = [b""], threading.Event()

            def read(path: Path = path, seen: list[bytes] = seen, far: threading.Event = far) -> None:
                seen[0] = read_on(path, far.set)

            reader = threading.Thread(target=read, daemon=True)
            reader.start()
            assert far.wait(TIMEOUT_S)
            after = expected[change.__name__] = change(path, before)
            assert path.read_bytes() == after, change
            reader.join(TIMEOUT_S)
            assert not reader.is_alive(), "a reader hangs"
            for offset in range(0, len(seen[0]), mmap.PAGESIZE):
                page = seen[0][offset : offset + mmap.PAGESIZE]
                assert page in (before[offset : offset + len(page)], after[offset : offset + len(page)]), offset
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            assert path.read_bytes() == after, f"{change}, without the page cache"
            expected[change.__name__] = contents(change.__name__)
            path.write_bytes(expected[change.__name__])
    mount.stop()
    assert mount.counts["tree"] == {name: sha256(data).hexdigest() for name, data in expected.items()}
    assert (mount.counts["faults"], mount.counts["timeouts"], mount.counts["handles"]) == (0, 0, 0)
    assert mount.counts["pushed"] > len(CHANGES) * ROUNDS << 20, "next to nothing was pushed"


@needs_fuse
def test_two_read_the_same_file_and_most_of_it_is_pushed(mount: MemoryMount) -> None:
    data = contents("shared")
    (mount.path / "file").write_bytes(data)
    mount.remount()
    seen: list[bytes] = []
    readers = [
        threading.Thread(target=lambda: seen.append(read_on(mount.path / "file", lambda: None)), daemon=True)
        for _ in range(2)
    ]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(TIMEOUT_S)
    assert seen == [data, data]
    mount.stop()
    assert mount.counts["pushed"] > 3 << 20
    assert (mount.counts["faults"], mount.counts["handles"]) == (0, 0)


@needs_fuse
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_the_mount_ends_while_pages_are_pushed(mount: MemoryMount, how: signal.Signals) -> None:
    (mount.path / "file").write_bytes(contents("file"))
    mount.remount()
    failures: list[OSError] = []

    def read() -> None:
        try:
            for _ in range(100):
                read_on(mount.path / "file", lambda: mount.process.send_signal(how))
                with (mount.path / "file").open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            failures.append(error)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(TIMEOUT_S)
    assert not reader.is_alive(), "a reader hangs"
    assert failures, "the mount is still there"
    mount.join()
    assert mount.process.returncode == (0 if how == signal.SIGTERM else -how)
