# ruff: noqa: PTH102, PTH106, PTH108, PTH101, PTH115, PTH116, PTH123, PTH211
"""The same random calls on a real mount and on a directory of the local disk: same answers, same tree."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import random
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.tahoefs.mounts import MemoryMount, memory_mount, needs_fuse

CALLS = 600
NAMES = ("a", "b", "c", "ä")
RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2
AT_FDCWD = -100
_libc = ctypes.CDLL(None, use_errno=True)


@pytest.fixture(scope="module")
def mount(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MemoryMount]:
    with memory_mount(tmp_path_factory.mktemp("model") / "mnt") as mounted:
        yield mounted


@pytest.fixture
def real_mount(tmp_path: Path) -> Iterator[MemoryMount]:
    """Over the real workspace and storage servers in memory."""
    with memory_mount(tmp_path / "mnt", "--real") as mounted:
        yield mounted


class Player:
    """Plays calls in one directory; open files are numbered in order of opening."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files: list[int] = []

    def play(self, name: str, *arguments: Any) -> Any:
        try:
            return getattr(self, name)(*arguments)
        except OSError as error:
            return errno.errorcode[error.errno or 0]

    def close_all(self) -> None:
        while self.files:
            os.close(self.files.pop())

    def _path(self, path: str) -> str:
        return f"{self.root}/{path}"

    def open(self, path: str, flags: int) -> str:
        self.files.append(os.open(self._path(path), flags, 0o644))
        return "opened"

    def close(self, index: int) -> None:
        os.close(self.files.pop(index % len(self.files)))

    def write(self, index: int, offset: int, data: bytes) -> int:
        return os.pwrite(self.files[index % len(self.files)], data, offset)

    def read(self, index: int, offset: int, length: int) -> bytes:
        return os.pread(self.files[index % len(self.files)], length, offset)

    def ftruncate(self, index: int, size: int) -> None:
        os.ftruncate(self.files[index % len(self.files)], size)

    def fstat(self, index: int) -> tuple[int, int]:
        found = os.fstat(self.files[index % len(self.files)])
        return (0, 0) if stat.S_ISDIR(found.st_mode) else (found.st_size, found.st_nlink)

    def fsync(self, index: int) -> None:
        os.fsync(self.files[index % len(self.files)])

    def stat(self, path: str) -> tuple[int, int, int]:
        found = os.lstat(self._path(path))
        is_directory = stat.S_ISDIR(found.st_mode)
        return found.st_mode, 0 if is_directory else found.st_nlink, 0 if is_directory else found.st_size

    def contents(self, path: str) -> bytes:
        with open(self._path(path), "rb") as file:
            return file.read()

    def listing(self, path: str) -> list[str]:
        return sorted(os.listdir(self._path(path)))

    def mkdir(self, path: str) -> None:
        os.mkdir(self._path(path), 0o755)

    def rmdir(self, path: str) -> None:
        os.rmdir(self._path(path))

    def unlink(self, path: str) -> None:
        os.unlink(self._path(path))

    def symlink(self, target: str, path: str) -> None:
        os.symlink(target, self._path(path))

    def truncate(self, path: str, size: int) -> None:
        os.truncate(self._path(path), size)

    def chmod(self, path: str, mode: int) -> None:
        os.chmod(self._path(path), mode)

    def utime(self, path: str, mtime_ns: int) -> int:
        os.utime(self._path(path), ns=(0, mtime_ns))
        return os.stat(self._path(path)).st_mtime_ns

    def rename(self, old: str, new: str, flags: int) -> None:
        paths = [os.fsencode(self._path(path)) for path in (old, new)]
        if _libc.renameat2(AT_FDCWD, paths[0], AT_FDCWD, paths[1], flags) != 0:
            raise OSError(ctypes.get_errno(), "renameat2")

    def tree(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for above, directories, files in os.walk(self.root):
            for name in sorted(directories + files):
                path = os.path.relpath(f"{above}/{name}", self.root)
                status = os.lstat(self._path(path))
                found[path] = [status.st_mode]
                if stat.S_ISREG(status.st_mode):
                    found[path] += [self.contents(path), status.st_size, status.st_nlink]
                elif stat.S_ISLNK(status.st_mode):
                    found[path].append(os.readlink(self._path(path)))
        return found


def random_call(source: random.Random, opened: int) -> tuple[Any, ...]:
    def path() -> str:
        return "/".join(source.choices(NAMES, k=source.choice((1, 1, 2, 3))))

    access = source.choice((os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_RDWR | os.O_APPEND))
    size = source.choice((0, 1, 55, 56, 4096, 70_000, 200_000))
    makers: list[Callable[[], tuple[Any, ...]]] = [
        lambda: ("open", path(), access | source.choice((0, os.O_CREAT, os.O_CREAT | os.O_EXCL, os.O_TRUNC))),
        lambda: ("open", path(), os.O_RDWR | os.O_CREAT),
        lambda: ("stat", path()),
        lambda: ("contents", path()),
        lambda: ("listing", source.choice((".", path()))),
        lambda: ("mkdir", path()),
        lambda: ("rmdir", path()),
        lambda: ("unlink", path()),
        lambda: ("symlink", path(), path()),
        lambda: ("truncate", path(), size),
        lambda: ("chmod", path(), source.choice((0o600, 0o755, 0o444))),
        lambda: ("utime", path(), source.randrange(1 << 60)),
        lambda: ("rename", path(), path(), source.choice((0, 0, 0, RENAME_NOREPLACE, RENAME_EXCHANGE))),
    ]
    if opened:
        index = source.randrange(opened)
        makers += [
            lambda: ("close", index),
            lambda: ("write", index, source.randrange(size + 1), source.randbytes(source.choice((1, 100, 5000)))),
            lambda: ("write", index, source.randrange(size + 1), source.randbytes(source.choice((1, 100, 5000)))),
            lambda: ("read", index, source.randrange(size + 1), 6000),
            lambda: ("ftruncate", index, size),
            lambda: ("fstat", index),
            lambda: ("fsync", index),
        ]
    return source.choice(makers)()


def play(seed: int, control: Player, subject: Player) -> None:
    source = random.Random(seed)
    history = []
    try:
        for _ in range(CALLS):
            call = random_call(source, len(control.files))
            history.append([each if not isinstance(each, bytes) else len(each) for each in call])
            assert subject.play(*call) == control.play(*call), history[-25:]
        assert subject.tree() == control.tree()
    finally:
        control.close_all()
        subject.close_all()
    assert subject.tree() == control.tree()


def players(*bases: Path) -> list[Player]:
    for base in bases:
        (base / "play").mkdir()
    return [Player(base / "play") for base in bases]


@needs_fuse
@pytest.mark.parametrize("seed", range(4))
def test_mount_answers_as_the_local_disk_does(mount: MemoryMount, tmp_path: Path, seed: int) -> None:
    subject = mount.path / f"{seed}"
    subject.mkdir()
    play(seed, *players(tmp_path, subject))


@needs_fuse
def test_another_client_finds_on_the_grid_what_the_local_disk_has(real_mount: MemoryMount, tmp_path: Path) -> None:
    control, subject = players(tmp_path, real_mount.path)
    play(seed=100, control=control, subject=subject)
    expected: dict[str, str | None] = {"play": None}
    for path, (mode, *rest) in control.tree().items():
        data = os.fsencode(rest[0]) if stat.S_ISLNK(mode) else rest[0] if rest else None
        expected[f"play/{path}"] = None if data is None else hashlib.sha256(data).hexdigest()
    real_mount.stop()
    assert real_mount.counts["tree"] == expected
    assert (real_mount.counts["faults"], real_mount.counts["handles"]) == (0, 0)
