"""The spool: local files for what is being written, until it is on the grid.

    <state_dir>/spool/<pid>-<random>/lock      held with flock while the process lives
                                    /<number>  one sparse file per written file, AES-128-CTR under a random key
                                               that exists in memory only; byte i of the file is byte i of the contents

Only written ranges are held (`SpoolFile.spans`); the rest of the file on disk is a hole that means nothing.
What a dead process left is unreadable, and removed at the next start. Directories are 0700, files 0600.

Limits: the keystream of a file is reused when a range is written again, so somebody who images the disk twice
while a file is open learns the xor of the two writings. All held bytes count against one limit; files already
stored are kept as long as there is room, to be read back without the grid, and give way first.

Nothing here awaits with a lock held: accounting is plain synchronous code, `room` re-checks after each wait.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import logging
import os
import secrets
import shutil
from collections import OrderedDict
from pathlib import Path
from typing import Any, Protocol, Self

import trio

from cache.spans import Spans
from grid.crypto import KEY_BYTES, aes_ctr
from grid.errors import GridError, NodeDirectoryError

log = logging.getLogger(__name__)

SPANS_MAX = 1 << 20  # separate ranges in one file: 4 GiB of scattered 4 KiB writes
_FULL = (errno.ENOSPC, errno.EDQUOT)


class SpoolFullError(GridError):
    """No room for more unsent data, even after waiting: the mount answers ENOSPC. Nothing unsent is lost."""


class Keepable(Protocol):
    """A stored file as the spool sees it (a SealedFile)."""

    @property
    def held_bytes(self) -> int: ...
    def retain(self) -> Any: ...
    def release(self) -> None: ...


class Spool:
    """This process's spool directory, and the account of all bytes in it."""

    def __init__(self, path: Path, lock_fd: int, limit_bytes: int, keep_bytes: int) -> None:
        self._path = path
        self._lock_fd = lock_fd
        self._numbers = itertools.count(1)
        self._room = trio.Event()
        self._kept: OrderedDict[bytes, Keepable] = OrderedDict()  # by storage index, the longest unused first
        self._kept_bytes = 0
        self._keep_bytes = keep_bytes
        self.limit_bytes = limit_bytes
        self.used_bytes = 0

    @classmethod
    def open(cls, state_dir: Path, *, limit_bytes: int, keep_bytes: int) -> Self:
        """Make this process's directory and remove those of dead ones. Raises NodeDirectoryError."""
        root = state_dir / "spool"
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            root.chmod(0o700)
            guard = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                fcntl.flock(guard, fcntl.LOCK_EX)  # or a starting process might take our directory for a dead one's
                _remove_abandoned(root)
                path = root / f"{os.getpid()}-{secrets.token_hex(8)}"
                path.mkdir(mode=0o700)
                return cls(path, _lock(path), limit_bytes, keep_bytes)
            finally:
                os.close(guard)
        except OSError as error:
            raise NodeDirectoryError(
                f"cannot keep unsent files in {root}: {error.strerror}; check it is yours"
            ) from None

    def close(self) -> None:
        """Remove everything. Harmless when repeated."""
        shutil.rmtree(self._path, ignore_errors=True)
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def create(self) -> SpoolFile:
        """A new empty file, with one owner. Raises SpoolFullError, OSError."""
        return SpoolFile(self, self._path / str(next(self._numbers)))

    async def room(self, size: int, wait_s: float) -> None:
        """Return once `size` bytes more are within the limit; files kept for reading give way. SpoolFullError."""
        if self._make_room(size):
            return
        with trio.move_on_after(wait_s):
            while not self._make_room(size):
                await self._room.wait()
            return
        raise SpoolFullError(f"{self.used_bytes} bytes are not on the grid yet, the limit is {self.limit_bytes}")

    def account(self, growth: int) -> None:
        self.used_bytes += growth
        if growth < 0:
            self._room.set()
            self._room = trio.Event()

    def keep(self, storage_index: bytes, stored: Keepable) -> None:
        """Keep a stored file to be read back, within the bound; takes an ownership of its own."""
        size = stored.held_bytes
        if size > self._keep_bytes or storage_index in self._kept:
            return
        stored.retain()
        self._kept[storage_index] = stored
        self._kept_bytes += size
        while self._kept_bytes > self._keep_bytes:
            self._let_go_oldest()

    def find_kept(self, storage_index: bytes) -> Keepable | None:
        if storage_index in self._kept:
            self._kept.move_to_end(storage_index)
        return self._kept.get(storage_index)

    def _make_room(self, size: int) -> bool:
        while self.used_bytes + size > self.limit_bytes and self._kept:
            self._let_go_oldest()
        return self.used_bytes + size <= self.limit_bytes

    def _let_go_oldest(self) -> None:
        _, stored = self._kept.popitem(last=False)
        self._kept_bytes -= stored.held_bytes
        stored.release()


class SpoolFile:
    """One file in the spool. Removed when its last owner lets go; the descriptor is open only while in use.

    `retain`/`release` count owners (a writer, an unsent file, the spool's own keeping, a reader);
    `open`/`shut` count users of the descriptor, so that ten thousand unsent files need no ten thousand of them.
    """

    def __init__(self, spool: Spool, path: Path) -> None:
        self._spool = spool
        self._path = path
        self._key = secrets.token_bytes(KEY_BYTES)
        self._owners = 1
        self._users = 1
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self.spans = Spans()

    def __repr__(self) -> str:
        return f"<SpoolFile {self._path.name}, {self.spans.total} bytes>"

    @property
    def gone(self) -> bool:
        return self._owners == 0

    def retain(self) -> Self:
        self._owners += 1
        return self

    def release(self) -> None:
        self._owners -= 1
        if self._owners == 0:
            self._path.unlink(missing_ok=True)
            self._spool.account(-self.spans.total)

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
        sealed = memoryview(aes_ctr(self._key, data, offset))
        done = 0
        try:
            while done < len(sealed):
                done += os.pwrite(self._fd, sealed[done:], offset + done)
        except OSError as error:
            if error.errno in _FULL:
                raise SpoolFullError("the local disk is full") from None
            raise
        finally:
            before = self.spans.total
            self.spans.add(offset, offset + done)
            self._spool.account(self.spans.total - before)

    def read(self, offset: int, length: int) -> bytes:
        """A range that is held. Safe in a worker thread as long as nobody writes or cuts."""
        pieces = []
        while length > 0:
            piece = os.pread(self._fd, length, offset)
            if not piece:
                raise OSError(errno.EIO, f"spool file {self._path.name} is shorter than it was written")
            pieces.append(aes_ctr(self._key, piece, offset))
            offset, length = offset + len(piece), length - len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def cut(self, size: int) -> None:
        """Forget all from `size` on."""
        before = self.spans.total
        self.spans.remove(size, max(self.spans.stop, size))
        if self.spans.total != before:
            os.ftruncate(self._fd, self.spans.stop)
            self._spool.account(self.spans.total - before)


def _lock(path: Path) -> int:
    fd = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _remove_abandoned(root: Path) -> None:
    """Remove what dead processes left: a directory whose lock can be had has no process behind it."""
    for path in root.iterdir():
        try:
            fd = _lock(path)
        except OSError:  # alive, or not ours to judge
            continue
        log.info("removing the spool of a dead process, %s", path.name)
        shutil.rmtree(path, ignore_errors=True)
        os.close(fd)
