"""A machine that makes the same random calls on a mount and in a directory of the local disk, the model: same answers.

    FileSystemMachine(mount, base)      `mount` has a path and can be mounted again; `base` is a local directory
        rules: one call each, answered by both      remount: all is closed first
        teardown: everything closed, the trees are equal

Every example plays in a directory of its own, of the same name on both. Left out is what differs on purpose
(hard links, …) and what no two file systems share: inode numbers, times that nobody set, sizes of directories.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import stat
from pathlib import Path
from typing import Any, Protocol

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from tests.tahoefs.posix_calls import RENAME_EXCHANGE, RENAME_NOREPLACE, renameat2

FILES_MAX = 4  # open at a time
REMOUNTS_MAX = 1  # in one example
SET_TIME_NS_MAX = 10**18  # times below were set by a call, those above are of some clock
KIB = 1 << 10

names = st.sampled_from(["a", "b", "c", "ä"])
paths = st.one_of(
    names, names, st.builds("{}/{}".format, names, names), st.builds("{}/{}/{}".format, names, names, names)
)
sizes = st.sampled_from([0, 1, 55, 56, 4 * KIB, 70_000, 128 * KIB, 200_001])
offsets = st.one_of(sizes, st.integers(0, 300_000))
chunks = st.builds(
    lambda seed, size: (hashlib.blake2b(bytes([seed])).digest() * (size // 64 + 1))[:size],
    st.integers(0, 255),
    st.sampled_from([1, 100, 4 * KIB, 5000, 150_000]),
)
attribute_names = st.sampled_from(["user.one", "user.two", "user.\u00fc"])
access = st.sampled_from([os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_RDWR | os.O_APPEND])
extras = st.sampled_from([0, os.O_CREAT, os.O_CREAT | os.O_EXCL, os.O_TRUNC, os.O_CREAT | os.O_TRUNC])
indices = st.integers(0, FILES_MAX - 1)
_numbers = itertools.count()


class Mounted(Protocol):
    """What the machine needs of a mount."""

    @property
    def path(self) -> Path: ...
    def remount(self) -> None: ...


class Player:
    """Plays calls in one directory; open files are numbered in order of opening."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files: list[int] = []
        root.mkdir()

    def play(self, name: str, *arguments: Any) -> Any:
        try:
            return getattr(self, name)(*arguments)
        except OSError as error:
            return errno.errorcode[error.errno or 0]

    def close_all(self) -> None:
        while self.files:
            os.close(self.files.pop())

    def open(self, path: str, flags: int) -> str:
        self.files.append(os.open(self.root / path, flags, 0o644))
        return "opened"

    def close(self, index: int) -> None:
        os.close(self.files.pop(index))

    def pwrite(self, index: int, offset: int, data: bytes) -> int:
        return os.pwrite(self.files[index], data, offset)

    def write_at_end(self, index: int, data: bytes) -> int:
        os.lseek(self.files[index], 0, os.SEEK_END)
        return os.write(self.files[index], data)

    def pread(self, index: int, offset: int, length: int) -> bytes:
        return os.pread(self.files[index], length, offset)

    def ftruncate(self, index: int, size: int) -> None:
        os.ftruncate(self.files[index], size)

    def fstat(self, index: int) -> Any:
        return shown(os.fstat(self.files[index]))

    def fsync(self, index: int) -> None:
        os.fsync(self.files[index])

    def fsetxattr(self, index: int, name: str, value: bytes) -> None:
        os.setxattr(self.files[index], name, value)

    def fchmod(self, index: int, mode: int) -> None:
        os.fchmod(self.files[index], mode)

    def lstat(self, path: str) -> Any:
        return shown(os.lstat(self.root / path))

    def contents(self, path: str) -> Any:
        return digest(self.root / path)

    def listdir(self, path: str) -> list[str]:
        return sorted(os.listdir(self.root / path))

    def readlink(self, path: str) -> str:
        return os.readlink(self.root / path)

    def mkdir(self, path: str) -> None:
        os.mkdir(self.root / path, 0o755)

    def mkfifo(self, path: str) -> None:
        os.mkfifo(self.root / path, 0o640)

    def rmdir(self, path: str) -> None:
        os.rmdir(self.root / path)

    def unlink(self, path: str) -> None:
        os.unlink(self.root / path)

    def symlink(self, target: str, path: str) -> None:
        os.symlink(target, self.root / path)

    def truncate(self, path: str, size: int) -> None:
        os.truncate(self.root / path, size)

    def chmod(self, path: str, mode: int) -> None:
        os.chmod(self.root / path, mode)

    def utime(self, path: str, mtime_ns: int) -> None:
        os.utime(self.root / path, ns=(0, mtime_ns))

    def rename(self, old: str, new: str, flags: int) -> None:
        renameat2(self.root / old, self.root / new, flags)

    def setxattr(self, path: str, name: str, value: bytes, flags: int) -> None:
        os.setxattr(self.root / path, name, value, flags)

    def removexattr(self, path: str, name: str) -> None:
        os.removexattr(self.root / path, name)

    def xattrs(self, path: str) -> dict[str, bytes]:
        return {name: os.getxattr(self.root / path, name) for name in sorted(os.listxattr(self.root / path))}

    def tree(self) -> dict[str, Any]:
        """Everything below, with contents and attributes."""
        found: dict[str, Any] = {}
        for above, directories, files in os.walk(self.root):
            for name in sorted(directories + files):
                path = os.path.relpath(f"{above}/{name}", self.root)
                status = os.lstat(self.root / path)
                found[path] = [shown(status)]
                if stat.S_ISREG(status.st_mode):
                    found[path] += [digest(self.root / path), self.xattrs(path)]
                elif stat.S_ISLNK(status.st_mode):
                    found[path].append(self.readlink(path))
        return found


def digest(path: Path) -> tuple[int, str]:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        size = os.fstat(descriptor).st_size
        return size, hashlib.sha256(os.pread(descriptor, size + 1, 0)).hexdigest()
    finally:
        os.close(descriptor)


def shown(status: os.stat_result) -> tuple[int, ...]:
    """Mode, links, size, and the time if somebody set it."""
    if stat.S_ISDIR(status.st_mode):
        return (status.st_mode,)  # its links are counted once it was listed
    mtime_ns = status.st_mtime_ns if status.st_mtime_ns < SET_TIME_NS_MAX else -1
    return status.st_mode, status.st_nlink, status.st_size, mtime_ns


class FileSystemMachine(RuleBasedStateMachine):
    def __init__(self, mount: Mounted, base: Path) -> None:
        super().__init__()
        self.mount = mount
        self.base = base
        self.remounts = 0

    @initialize()
    def begin(self) -> None:
        name = f"play{next(_numbers)}"
        self.model, self.subject = Player(self.base / name), Player(self.mount.path / name)

    def both(self, name: str, *arguments: Any) -> None:
        expected = self.model.play(name, *arguments)
        assert self.subject.play(name, *arguments) == expected

    def on_file(self, name: str, index: int, *arguments: Any) -> None:
        if self.model.files:
            self.both(name, index % len(self.model.files), *arguments)

    # --- open files

    @precondition(lambda self: len(self.model.files) < FILES_MAX)
    @rule(path=paths, access=access, extras=extras)
    def open(self, path: str, access: int, extras: int) -> None:
        self.both("open", path, access | extras | os.O_NONBLOCK)  # or a FIFO would wait for its other end

    @rule(index=indices)
    def close(self, index: int) -> None:
        self.on_file("close", index)

    @rule(index=indices, offset=offsets, data=chunks)
    def pwrite(self, index: int, offset: int, data: bytes) -> None:
        self.on_file("pwrite", index, offset, data)

    @rule(index=indices, data=chunks)
    def append(self, index: int, data: bytes) -> None:
        if self.model.files and os.fstat(self.model.files[index % len(self.model.files)]).st_size < 512 * KIB:
            self.on_file("write_at_end", index, data)

    @rule(index=indices, offset=offsets, length=st.sampled_from([1, 6000, 300_000]))
    def pread(self, index: int, offset: int, length: int) -> None:
        self.on_file("pread", index, offset, length)

    @rule(index=indices, size=sizes)
    def ftruncate(self, index: int, size: int) -> None:
        self.on_file("ftruncate", index, size)

    @rule(index=indices, name=attribute_names, value=st.binary(max_size=20))
    def fsetxattr(self, index: int, name: str, value: bytes) -> None:
        self.on_file("fsetxattr", index, name, value)

    @rule(index=indices, mode=st.sampled_from([0o600, 0o444]))
    def fchmod(self, index: int, mode: int) -> None:
        self.on_file("fchmod", index, mode)

    @rule(index=indices)
    def fsync(self, index: int) -> None:
        self.on_file("fsync", index)

    @rule()
    def fstat(self) -> None:
        for index in range(len(self.model.files)):
            self.both("fstat", index)

    # --- names

    @rule(path=paths)
    def mkdir(self, path: str) -> None:
        self.both("mkdir", path)

    @rule(path=paths)
    def rmdir(self, path: str) -> None:
        self.both("rmdir", path)

    @rule(path=paths)
    def mkfifo(self, path: str) -> None:
        self.both("mkfifo", path)

    @rule(path=paths)
    def unlink(self, path: str) -> None:
        self.both("unlink", path)

    @rule(text=paths, path=paths)
    def symlink(self, text: str, path: str) -> None:
        self.both("symlink", text, path)

    @rule(old=paths, new=paths, flags=st.sampled_from([0, 0, 0, RENAME_NOREPLACE, RENAME_EXCHANGE]))
    def rename(self, old: str, new: str, flags: int) -> None:
        self.both("rename", old, new, flags)

    # --- attributes

    @rule(path=paths, size=sizes)
    def truncate(self, path: str, size: int) -> None:
        self.both("truncate", path, size)

    @rule(path=paths, mode=st.sampled_from([0o600, 0o755, 0o444, 0o4755]))
    def chmod(self, path: str, mode: int) -> None:
        self.both("chmod", path, mode)

    @rule(path=paths, mtime_ns=st.integers(0, SET_TIME_NS_MAX - 1))
    def utime(self, path: str, mtime_ns: int) -> None:
        self.both("utime", path, mtime_ns)

    @rule(path=paths, name=attribute_names, value=st.binary(max_size=100), flags=st.sampled_from([0, 0, 1, 2]))
    def setxattr(self, path: str, name: str, value: bytes, flags: int) -> None:
        self.both("setxattr", path, name, value, flags)

    @rule(path=paths, name=attribute_names)
    def removexattr(self, path: str, name: str) -> None:
        self.both("removexattr", path, name)

    # --- looking

    @rule(path=paths)
    def look(self, path: str) -> None:
        for call in ("lstat", "listdir", "readlink", "xattrs", "contents"):
            self.both(call, path)

    @precondition(lambda self: self.remounts < REMOUNTS_MAX)
    @rule()
    def remount(self) -> None:
        self.remounts += 1
        self.close_all()
        self.mount.remount()
        self.compare()

    def compare(self) -> None:
        assert self.subject.tree() == self.model.tree()

    def close_all(self) -> None:
        self.model.close_all()
        self.subject.close_all()

    def teardown(self) -> None:
        if hasattr(self, "subject"):
            self.compare()
            self.close_all()
            self.compare()


def run_machine(mount: Mounted, base: Path, *, examples: int, steps: int) -> None:
    """The same examples every time, unless TAHOEFS_SOAK asks for new ones."""
    run_state_machine_as_test(
        lambda: FileSystemMachine(mount, base),
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            derandomize=not os.environ.get("TAHOEFS_SOAK"),
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate, Phase.shrink],
        ),
    )


def digests(base: Path) -> dict[str, str | None]:
    """What a client that knows no attributes finds of a local tree: {path: SHA-256, None for directories}."""
    found: dict[str, str | None] = {}
    for path in base.rglob("*"):
        name, mode = str(path.relative_to(base)), path.lstat().st_mode
        data = b""
        if stat.S_ISLNK(mode):
            data = os.fsencode(os.readlink(path))
        elif stat.S_ISREG(mode):  # a FIFO would wait to be written to
            data = path.read_bytes()
        found[name] = None if stat.S_ISDIR(mode) else hashlib.sha256(data).hexdigest()
    return found
