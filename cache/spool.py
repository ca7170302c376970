"""The spool: local files for what is being written, until it is on the grid.

    <directory>/<number>   one sparse file per written file, AES-128-CTR under a random key of its own;
                           byte i of the file is byte i of the contents

A file's key exists in memory, and in the journal's row about it once it is sealed; so what was open when the process
died is unreadable, and removed at the next start. Files are 0600, in a directory that belongs to one
process at a time (`cache/journal_store.py`).

Only written ranges are held (`SpoolFile.spans`); the rest of the file on disk is a hole that means nothing.

Limits: the keystream of a file is reused when a range is written again, so somebody who images the disk twice
while a file is open learns the xor of the two writings. All held bytes count against one limit; files already
stored are kept as long as there is room, to be read back without the grid, and give way first.

Nothing here awaits with a lock held: accounting is plain synchronous code, `room` re-checks after each wait.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections import OrderedDict
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any, Protocol, Self

import trio

from cache.spans import Spans
from grid.crypto import KEY_BYTES, aes_ctr
from grid.errors import GridError, NotWriteableError

CHUNK_BYTES = 1 << 20  # read at a time
DISK_RESERVE_BYTES = 8 << 20  # left free on the disk, so that the journal itself can go on
DISK_LOOK_S = 0.5  # between looks whether there is room on a full disk
SPANS_MAX = 1 << 20  # separate ranges in one file: 4 GiB of scattered 4 KiB writes
_FULL = (errno.ENOSPC, errno.EDQUOT)


class SpoolFullError(GridError):
    """No room for more unsent data, even after waiting: the mount answers ENOSPC. Nothing unsent is lost."""


class Keepable(Protocol):
    """A stored file as the spool sees it (a SealedFile)."""

    @property
    def held_bytes(self) -> int:
        """What is in the spool because of it."""

    def retain(self) -> Any: ...
    def release(self) -> None: ...


class Spool:
    """This process's spool directory, and the account of all bytes in it."""

    def __init__(self, path: Path | None, *, limit_bytes: int, keep_bytes: int) -> None:
        """`path`: a directory that nobody else uses; None where nothing will be written."""
        self._path = path
        self._next = 1 + max((int(name) for name in self._names()), default=0)
        self._room = trio.Event()
        self._kept: OrderedDict[bytes, tuple[Keepable, int]] = OrderedDict()  # by storage index, longest unused first
        self._kept_bytes = 0
        self._keep_bytes = keep_bytes
        self.limit_bytes = limit_bytes
        self.used_bytes = 0

    @property
    def unsent_bytes(self) -> int:
        """Without the files that are only kept to be read back: those give way to whatever is written."""
        return self.used_bytes - self._kept_bytes

    def _names(self) -> list[str]:
        return [] if self._path is None else [path.name for path in self._path.iterdir() if path.name.isdecimal()]

    def create(self) -> SpoolFile:
        """A new empty file, with one owner. Raises SpoolFullError, OSError."""
        number = self._next
        self._next += 1
        path = self._path_of(number)
        return SpoolFile(self, path, number, secrets.token_bytes(KEY_BYTES), Spans(), _create(path))

    def restore(self, number: int, key: bytes, spans: Spans) -> SpoolFile:
        """A sealed file that a process before this one left, with one owner; not open. It may be damaged."""
        self._next = max(self._next, number + 1)
        self.account(spans.total)
        return SpoolFile(self, self._path_of(number), number, key, spans)

    def adopt(self, path: Path) -> int:
        """Have a file of another directory on the same disk here too. Returns its number here. Raises OSError."""
        number = self._next
        os.link(path, self._path_of(number))
        self._next += 1
        return number

    def sweep(self, known: Container[int]) -> None:
        """Remove the files that nobody knows: they were open when their process died."""
        for name in self._names():
            if int(name) not in known and self._path is not None:
                (self._path / name).unlink(missing_ok=True)

    def _path_of(self, number: int) -> Path:
        if self._path is None:
            raise NotWriteableError("this mount is read-only")
        return self._path / str(number)

    def let_go(self) -> None:
        """Of all files that were only kept to be read back."""
        while self._kept:
            self._let_go_oldest()

    async def room(self, size: int, wait_s: float) -> None:
        """Return once there is room for `size` bytes more, by the limit and on the disk. Raises SpoolFullError.

        Files kept for reading give way.
        """
        if self._make_room(size):
            return
        with trio.move_on_after(wait_s):
            while not self._make_room(size):
                with trio.move_on_after(DISK_LOOK_S):  # others make room on the disk without telling us
                    await self._room.wait()
            return
        if self.used_bytes + size <= self.limit_bytes:
            raise SpoolFullError("the local disk is full")
        raise SpoolFullError(f"{self.unsent_bytes} bytes are not on the grid yet, the limit is {self.limit_bytes}")

    def account(self, growth: int) -> None:
        self.used_bytes += growth
        if growth < 0:
            self.wake()

    def wake(self) -> None:
        """Let those who wait for room look again."""
        self._room.set()
        self._room = trio.Event()

    def keep(self, storage_index: bytes, stored: Keepable) -> None:
        """Keep a stored file to be read back, within the bound; takes an ownership of its own."""
        size = stored.held_bytes
        if size > self._keep_bytes or storage_index in self._kept:
            return
        stored.retain()
        self._kept[storage_index] = stored, size
        self._kept_bytes += size
        while self._kept_bytes > self._keep_bytes:
            self._let_go_oldest()

    def find_kept(self, storage_index: bytes) -> Keepable | None:
        if storage_index in self._kept:
            self._kept.move_to_end(storage_index)
        stored, _ = self._kept.get(storage_index, (None, 0))
        return stored

    def has_spare(self, size: int) -> bool:
        """May so much be fetched for convenience? Half of the room is left to writers."""
        if self.unsent_bytes + size > self.limit_bytes // 2:
            return False
        return self._path is None or free_bytes(self._path) >= 2 * size + DISK_RESERVE_BYTES

    def _make_room(self, size: int) -> bool:
        while self._kept and not self._fits(size):
            self._let_go_oldest()
        return self._fits(size)

    def _fits(self, size: int) -> bool:
        if self.used_bytes + size > self.limit_bytes:
            return False
        return self._path is None or free_bytes(self._path) >= size + DISK_RESERVE_BYTES

    def _let_go_oldest(self) -> None:
        _, (stored, size) = self._kept.popitem(last=False)
        self._kept_bytes -= size
        stored.release()


class SpoolFile:
    """One file in the spool. Removed when its last owner lets go; the descriptor is open only while in use.

    `retain`/`release` count owners (a writer, an unsent file, the spool's own keeping, a reader);
    `open`/`shut` count users of the descriptor, so that ten thousand unsent files need no ten thousand of them.
    """

    def __init__(self, spool: Spool, path: Path, number: int, key: bytes, spans: Spans, fd: int = -1) -> None:
        """Open when it comes with a descriptor, which has one user then."""
        self._spool = spool
        self._path = path
        self._owners = 1
        self._users = int(fd >= 0)
        self._fd = fd
        self.number = number
        self.key = key
        self.spans = spans

    def __repr__(self) -> str:
        return f"<SpoolFile {self._path.name}, {self.spans.total} bytes>"

    @property
    def gone(self) -> bool:
        return self._owners == 0

    def account(self, growth: int) -> None:
        """For bytes that are kept elsewhere because of this file."""
        if growth:
            self._spool.account(growth)

    def retain(self) -> Self:
        self._owners += 1
        return self

    def release(self, *, remove: bool = True) -> None:
        """`remove` false: the file on the disk is left for `remove`, at a time its owner knows."""
        self._owners -= 1
        if self._owners == 0:
            if remove:
                self.remove()
            self._spool.account(-self.spans.total)

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)
        self._spool.wake()

    def open(self) -> Self:
        if self._users == 0:
            self._fd = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        self._users += 1
        return self

    def shut(self) -> None:
        self._users -= 1
        if self._users == 0:
            os.close(self._fd)
            self._fd = -1  # so that a late reader gets an error, never some other file that has the number now

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Put `data` there and account for it. Raises SpoolFullError when the disk or the map of ranges is full."""
        if len(self.spans) >= SPANS_MAX:
            raise SpoolFullError(f"a file written in more than {SPANS_MAX} separate pieces")
        before, count = self.spans.total, self.put(offset, data)
        self.spans.add(offset, offset + count)
        self._spool.account(self.spans.total - before)

    def put(self, offset: int, data: bytes | memoryview) -> int:
        """The same without taking note of it. In a thread, if nobody reads that range. Raises SpoolFullError."""
        sealed = memoryview(aes_ctr(self.key, data, offset))
        done = 0
        try:
            while done < len(sealed):
                done += os.pwrite(self._fd, sealed[done:], offset + done)
        except OSError as error:
            if error.errno in _FULL:
                raise SpoolFullError("the local disk is full") from None
            raise
        return done

    def read(self, offset: int, length: int) -> bytes:
        """A range that is held. Safe in a worker thread as long as nobody writes or cuts."""
        pieces = []
        while length > 0:
            piece = os.pread(self._fd, length, offset)
            if not piece:
                raise OSError(errno.EIO, f"spool file {self._path.name} is shorter than it was written")
            pieces.append(aes_ctr(self.key, piece, offset))
            offset, length = offset + len(piece), length - len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def sync(self) -> None:
        """Have it on the disk; blocks. Nothing to do once it is removed."""
        try:
            fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def stored_ranges(self) -> Iterator[bytes]:
        """What is held, as it stands on the disk: encrypted, in order, a chunk at a time; blocks. Raises OSError."""
        with self._path.open("rb", buffering=0) as stream:
            for start, stop in self.spans:
                for position in range(start, stop, CHUNK_BYTES):
                    wanted = min(CHUNK_BYTES, stop - position)
                    if len(data := os.pread(stream.fileno(), wanted, position)) != wanted:
                        raise OSError(errno.EIO, f"spool file {self.number} is shorter than it was written")
                    yield data

    def store_ranges(self, data: bytes) -> None:
        """The reverse, into a file that is not there, or not whole. Raises OSError."""
        with open(self._path, "wb", buffering=0, opener=lambda path, flags: os.open(path, flags, 0o600)) as stream:
            done = 0
            for start, stop in self.spans:
                os.pwrite(stream.fileno(), data[done : done + stop - start], start)
                done += stop - start

    def cut(self, size: int) -> None:
        """Forget all from `size` on."""
        before = self.spans.total
        self.spans.remove(size, max(self.spans.stop, size))
        if self.spans.total != before:
            os.ftruncate(self._fd, self.spans.stop)
            self._spool.account(self.spans.total - before)


def free_bytes(path: Path) -> int:
    """What may still be written on the file system of `path`."""
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize


def _create(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno in _FULL:
            raise SpoolFullError("the local disk is full") from None
        raise
