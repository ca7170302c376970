"""A random workload on a mount, and the tree that must be found there when its daemon is killed at any moment.

A Worker changes names of its own (the first letter of what stands in the root says whose it is), one call after the
other, and knows at each moment which trees are allowed:

    no call under way      one: all calls that have returned, and nothing else
    a call under way       two: without it, and with all of it
    a file held open       what was fsynced; what was written after that may be missing, all of it

Trees are flat: {path: Entry}, paths relative to the root of the mount.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from threading import Event

from attrs import evolve, frozen

SIZES = (0, 10, 55, 56, 700, 5_000, 40_000, 40_000)
BIG = 400_000
NAMES = ("a", "b.txt", "c", "ä")
ENTRIES_MAX = 9  # of one worker: the whole tree is read after every kill
DIRECTORIES_MAX = 3
PIECE = 128 << 10
RENAME_EXCHANGE = 2
AT_FDCWD = -100
_libc = ctypes.CDLL(None, use_errno=True)


@frozen
class Entry:
    """What one path is. `mtime_ns` None: not known, so anything will do."""

    kind: str  # "file", "directory", "symlink", "fifo"
    mode: int
    data: bytes = b""  # contents, or where a symlink points to
    xattrs: tuple[tuple[str, bytes], ...] = ()
    mtime_ns: int | None = None

    def agrees(self, found: Entry) -> bool:
        return evolve(found, mtime_ns=self.mtime_ns) == self if self.mtime_ns is None else found == self

    def __str__(self) -> str:
        shown = f"{len(self.data)} bytes {self.data[:8]!r}" if self.kind == "file" else repr(self.data)
        return f"{self.kind} {self.mode:o} {shown} {self.xattrs} {self.mtime_ns}"


Tree = Mapping[str, Entry]


def read_tree(root: Path, letter: str) -> dict[str, Entry]:
    """What a worker's part of the mount holds."""
    found: dict[str, Entry] = {}
    todo = [name for name in sorted(os.listdir(root)) if name.startswith(letter)]
    while todo:
        path = todo.pop()
        entry = found[path] = read_entry(root / path)
        if entry.kind == "directory":
            todo += [f"{path}/{name}" for name in os.listdir(root / path)]
    return found


def read_entry(path: Path) -> Entry:
    status = path.lstat()
    mode = stat.S_IMODE(status.st_mode)
    if stat.S_ISLNK(status.st_mode):
        return Entry("symlink", mode, os.fsencode(path.readlink()))
    xattrs = tuple((name, os.getxattr(path, name)) for name in sorted(os.listxattr(path)))
    if stat.S_ISREG(status.st_mode):
        data = path.read_bytes()
        assert len(data) == status.st_size
        return Entry("file", mode, data, xattrs, status.st_mtime_ns)
    return Entry("directory" if stat.S_ISDIR(status.st_mode) else "fifo", mode, xattrs=xattrs)


def differences(wanted: Tree, found: Tree) -> list[str]:
    """In words; none if they agree."""
    said = [f"{path} is missing: {wanted[path]}" for path in sorted(wanted.keys() - found.keys())]
    said += [f"{path} should not be there: {found[path]}" for path in sorted(found.keys() - wanted.keys())]
    for path in sorted(wanted.keys() & found.keys()):
        if not wanted[path].agrees(found[path]):
            said.append(f"{path} is {found[path]}, not {wanted[path]}")
    return said


class Worker:
    """One thread's part of the workload. The same seed and the same tree make the same calls."""

    def __init__(self, root: Path, letter: str) -> None:
        self._root = root
        self._letter = letter
        self._random = random.Random()
        self.tree: Tree = {}  # all that has returned
        self.allowed: tuple[Tree, ...] = (self.tree,)
        self.calls = 0
        self._held: tuple[int, str, bytearray] | None = None  # descriptor, path, contents as written

    # --- between kills

    def run(self, seed: str, killed: Event) -> None:
        """Work until `killed` is set and calls fail. Raises what fails before that."""
        self._random = random.Random(seed + self._letter)
        try:
            while not killed.is_set():
                self._random.choice(STEPS)(self)
                self.calls += 1
            if self._held is not None:
                self._let_go()
        except OSError:
            if not killed.is_set():
                raise
        finally:
            if self._held is not None:
                with contextlib.suppress(OSError):
                    os.close(self._held[0])
                self._held = None

    def check(self) -> None:
        """One of the allowed trees is there; from now on it is the one that must stay."""
        found = read_tree(self._root, self._letter)
        said = [differences(tree, found) for tree in self.allowed]
        assert [] in said, "\nor\n".join("\n".join(each) for each in said)
        self._returned(self.allowed[said.index([])])

    def _returned(self, tree: Tree) -> None:
        self.tree, self.allowed = tree, (tree,)

    @contextlib.contextmanager
    def _changing(self, changes: Mapping[str, Entry | None]) -> Iterator[None]:
        """Until the block has ended, both trees are allowed. None takes a path away."""
        merged: dict[str, Entry | None] = {**self.tree, **changes}
        after = {path: entry for path, entry in merged.items() if entry is not None}
        self.allowed = (self.tree, after)
        yield
        self._returned(after)

    # --- choosing

    def _path(self, path: str) -> Path:
        return self._root / path

    def _some(self, *kinds: str) -> str | None:
        """A path of one of these kinds, but not the one held open or above it."""
        held = self._held[1] if self._held else None
        paths = [path for path, entry in self.tree.items() if entry.kind in kinds and not (held and _is_in(held, path))]
        return self._random.choice(paths) if paths else None

    def _place(self) -> str:
        """A path in some directory, there or not."""
        directories = [None, *(path for path, entry in self.tree.items() if entry.kind == "directory")]
        above = self._random.choice(directories)
        name = self._random.choice(NAMES)
        return f"{self._letter}{name}" if above is None else f"{above}/{name}"

    def _free(self) -> str | None:
        place = self._place()
        return None if place in self.tree or len(self.tree) >= ENTRIES_MAX else place

    def _bytes(self) -> bytes:
        size = BIG if self._random.random() < 0.03 else self._random.choice(SIZES)
        return self._random.randbytes(size)

    # --- the steps

    def create(self) -> None:
        if (path := self._free()) is not None:
            data = self._bytes()
            with self._changing({path: Entry("file", 0o644, data)}):
                self._write_whole(path, data, os.O_CREAT | os.O_EXCL)

    def overwrite(self) -> None:
        if (path := self._some("file")) is not None:
            data = self._bytes()
            with self._changing({path: evolve(self.tree[path], data=data, mtime_ns=None)}):
                self._write_whole(path, data, os.O_TRUNC)

    def _write_whole(self, path: str, data: bytes, flags: int, *, sync: bool = False) -> None:
        with self._opened(path, os.O_WRONLY | flags) as descriptor:
            _write_all(descriptor, data)
            if sync:
                os.fsync(descriptor)

    @contextlib.contextmanager
    def _opened(self, path: str, flags: int) -> Iterator[int]:
        """What fails inside is reported, rather than what the close says after that."""
        descriptor = os.open(self._path(path), flags, 0o644)
        try:
            yield descriptor
        except BaseException:
            with contextlib.suppress(OSError):
                os.close(descriptor)
            raise
        os.close(descriptor)

    def patch(self) -> None:
        """Some parts overwritten, perhaps past the end."""
        if (path := self._some("file")) is not None:
            data, parts = bytearray(self.tree[path].data), []
            for _ in range(self._random.randrange(1, 4)):
                offset, part = self._random.randrange(len(data) + 1000), self._random.randbytes(300)
                parts.append((offset, part))
                data[len(data) :] = bytes(max(0, offset - len(data)))
                data[offset : offset + len(part)] = part
            with (
                self._changing({path: evolve(self.tree[path], data=bytes(data), mtime_ns=None)}),
                self._opened(path, os.O_RDWR) as descriptor,
            ):
                for offset, part in parts:
                    os.pwrite(descriptor, part, offset)

    def append(self) -> None:
        if (path := self._some("file")) is not None:
            more = self._random.randbytes(self._random.choice((1, 60, 3000)))
            with (
                self._changing({path: evolve(self.tree[path], data=self.tree[path].data + more, mtime_ns=None)}),
                self._opened(path, os.O_WRONLY | os.O_APPEND) as descriptor,
            ):
                os.write(descriptor, more)

    def truncate(self) -> None:
        if (path := self._some("file")) is not None:
            size = self._random.randrange(len(self.tree[path].data) + 2000)
            data = self.tree[path].data[:size].ljust(size, b"\0")
            with self._changing({path: evolve(self.tree[path], data=data, mtime_ns=None)}):
                os.truncate(self._path(path), size)

    def save(self) -> None:
        """As editors do: written beside, fsynced, renamed over."""
        path = self._some("file")
        if path is None or (beside := f"{path}~") in self.tree:
            return
        data = self._bytes()
        with self._changing({beside: Entry("file", 0o644, data)}):
            self._write_whole(beside, data, os.O_CREAT | os.O_EXCL, sync=True)
        with self._changing({path: self.tree[beside], beside: None}):
            self._path(beside).rename(self._path(path))

    def hold(self) -> None:
        """A file is opened, written and fsynced, written again, and closed only some steps later."""
        if self._held is not None:
            self._let_go()
            return
        path = self._some("file") if self._random.random() < 0.5 else self._free()
        if path is None:
            return
        old = self.tree.get(path)
        written = bytearray(b"" if old is None else old.data)
        descriptor = os.open(self._path(path), os.O_WRONLY | os.O_APPEND | (os.O_CREAT if old is None else 0), 0o644)
        self._held = descriptor, path, written
        if self._random.random() < 0.7:
            self._append_held(descriptor, written)
            with self._changing({path: self._as_held(path, written)}):
                os.fsync(descriptor)
        if path in self.tree:
            self._append_held(descriptor, written)
        else:
            self._let_go()  # another step might want the name

    def _append_held(self, descriptor: int, written: bytearray) -> None:
        part = self._random.randbytes(self._random.choice((10, 3000)))
        written += part
        os.write(descriptor, part)

    def _as_held(self, path: str, written: bytearray) -> Entry:
        return evolve(self.tree.get(path, Entry("file", 0o644)), data=bytes(written), mtime_ns=None)

    def _let_go(self) -> None:
        assert self._held is not None
        descriptor, path, written = self._held
        with self._changing({path: self._as_held(path, written)}):
            self._held = None
            os.close(descriptor)

    def unlink(self) -> None:
        if (path := self._some("file", "symlink", "fifo")) is not None:
            with self._changing({path: None}):
                self._path(path).unlink()

    def mkdir(self) -> None:
        path = self._free()
        if path is not None and sum(entry.kind == "directory" for entry in self.tree.values()) < DIRECTORIES_MAX:
            with self._changing({path: Entry("directory", 0o755)}):
                self._path(path).mkdir(0o755)

    def rmdir(self) -> None:
        path = self._some("directory")
        if path is not None and not any(_is_in(other, path) for other in self.tree if other != path):
            with self._changing({path: None}):
                self._path(path).rmdir()

    def symlink(self) -> None:
        if (path := self._free()) is not None:
            target = f"somewhere/{self._random.randrange(1000)}" + "x" * self._random.choice((0, 60))
            with self._changing({path: Entry("symlink", 0o777, target.encode())}):
                self._path(path).symlink_to(target)

    def fifo(self) -> None:
        if (path := self._free()) is not None:
            with self._changing({path: Entry("fifo", 0o644)}):
                os.mkfifo(self._path(path), 0o644)

    def rename(self) -> None:
        old, new = self._some("file", "symlink", "directory"), self._place()
        held = self._held[1] if self._held else ""
        if old is None or _is_in(new, old) or _is_in(old, new) or _is_in(held, new):
            return
        there = self.tree.get(new)
        if there is not None and "directory" in (there.kind, self.tree[old].kind):
            return
        with self._changing(self._moved(old, new)):
            self._path(old).rename(self._path(new))

    def exchange(self) -> None:
        kinds = ("file", "symlink", "directory", "fifo")
        one, other = self._some(*kinds), self._some(*kinds)
        if one is None or other is None or _is_in(one, other) or _is_in(other, one):
            return
        there, here = self._moved(one, other), self._moved(other, one)
        changes = {**there, **here, **{path: entry for path, entry in there.items() if entry is not None}}
        with self._changing(changes):
            paths = [os.fsencode(self._path(path)) for path in (one, other)]
            if _libc.renameat2(AT_FDCWD, paths[0], AT_FDCWD, paths[1], RENAME_EXCHANGE) != 0:
                raise OSError(ctypes.get_errno(), "renameat2")

    def _moved(self, old: str, new: str) -> dict[str, Entry | None]:
        inside = {path: entry for path, entry in self.tree.items() if _is_in(path, old)}
        return dict.fromkeys(inside) | {new + path[len(old) :]: entry for path, entry in inside.items()}

    def chmod(self) -> None:
        if (path := self._some("file", "directory", "fifo")) is not None:
            mode = self._random.choice((0o600, 0o640, 0o700, 0o755))
            with self._changing({path: evolve(self.tree[path], mode=mode)}):
                self._path(path).chmod(mode)

    def set_xattr(self) -> None:
        if (path := self._some("file", "directory")) is not None:
            name, value = f"user.{self._random.choice('xy')}", self._random.randbytes(20)
            xattrs = tuple(sorted({**dict(self.tree[path].xattrs), name: value}.items()))
            with self._changing({path: evolve(self.tree[path], xattrs=xattrs)}):
                os.setxattr(self._path(path), name, value)

    def remove_xattr(self) -> None:
        path = self._some("file", "directory")
        if path is not None and self.tree[path].xattrs:
            name, _ = self.tree[path].xattrs[0]
            with self._changing({path: evolve(self.tree[path], xattrs=self.tree[path].xattrs[1:])}):
                os.removexattr(self._path(path), name)

    def set_time(self) -> None:
        if (path := self._some("file")) is not None:
            mtime_ns = self._random.randrange(1 << 60)
            with self._changing({path: evolve(self.tree[path], mtime_ns=mtime_ns)}):
                os.utime(self._path(path), ns=(mtime_ns, mtime_ns))


STEPS: tuple[Callable[[Worker], None], ...] = (
    *[Worker.create] * 4,
    *[Worker.overwrite] * 3,
    *[Worker.patch] * 2,
    *[Worker.append] * 3,
    *[Worker.rename] * 4,
    *[Worker.unlink] * 2,
    Worker.truncate,
    Worker.save,
    Worker.hold,
    Worker.mkdir,
    Worker.rmdir,
    Worker.symlink,
    Worker.fifo,
    Worker.exchange,
    Worker.chmod,
    Worker.set_xattr,
    Worker.remove_xattr,
    Worker.set_time,
)


def _is_in(path: str, above: str) -> bool:
    """Whether `path` is `above` or something in it."""
    return path == above or path.startswith(f"{above}/")


def _write_all(descriptor: int, data: bytes) -> None:
    """In pieces, so that a kill may come between them."""
    for start in range(0, len(data), PIECE):
        os.write(descriptor, data[start : start + PIECE])
