"""Changes to share files that a kill cannot tear: a redo journal, one for the whole store.

A change of several steps (lengths, data, leases, more than one share of a slot) is first written down whole in one
file, then done, then struck out:

    STORE/tahoefs.journal:  magic 8 | body length 8 | CRC-32 of the body 4 | body
    body: steps, each       kind 1 | storage index 16 | share number 2 | position 8 | length 8 | data (WRITE only)

Killed before the record is whole, nothing was done: old. Killed later, the store does all the steps again when it is
opened next: new. Every step may be repeated. A change that is one step, and cannot be torn (a rename, an unlink, a
write within one page), goes straight to the file.

Why this and not a copy that is renamed over the share: a write of 3 kB into an MDMF share of 100 MB costs as little as
into a small one, and a small share (a directory changed) is a matter of two writes more, not of a new file. Measured on
ext4, CPU time for 3 kB: in place, which a kill can tear, 2 us; by the journal 14 us, into 100 MB 20 us; copy and rename
65 us, into 100 MB a thousand times that. The bytes go to memory twice; the disk hardly sees the journal, whose first
pages are written over again before they are due. 1 MiB costs 0.5 ms, most of it the checksum. New shares never pass
through here: they are made beside the others and appear by rename.

Why redo and not undo: nothing has to be read first.

fsync policy: none, as in Tahoe-LAFS: what was acknowledged survives the end of this process however it comes, and of
two machines that lose power one may lose what it took in the last seconds; the file's redundancy is across servers.
`durable=True` asks for more: the record is on the disk before the first step, the steps before the record is struck
out, and a rename before it is acknowledged.
"""

from __future__ import annotations

import errno
import logging
import os
import struct
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Final

from attrs import field, frozen

from grid.server.errors import NoSpaceError

log = logging.getLogger(__name__)

Buffer = bytes | bytearray | memoryview

PAGE_BYTES: Final = 4096  # the kernel copies a write page by page, and looks for a kill in between
KEPT_BYTES: Final = 4 << 20  # the file is cut back to this after a large change
_ZEROS: Final = bytes(64 << 10)
_BUFFERS_MAX: Final = 512  # in one system call

_MAGIC: Final = b"tahoefs\x01"
_RECORD = struct.Struct(">8sQL")
_STEP = struct.Struct(">B16sHQQ")
_WRITE, _ZERO, _RESIZE, _UNLINK, _RENAME = range(1, 6)


@frozen
class Write:
    position: int  # in the file
    data: Buffer = field(repr=False)


@frozen
class Zero:
    position: int
    length: int


@frozen
class Resize:
    length: int


@frozen
class Unlink:
    """The share goes; so does its bucket's directory, if that is empty then."""


@frozen
class Rename:
    """The temporary file of that share takes its place."""


Step = Write | Zero | Resize | Unlink | Rename


@frozen
class FileChange:
    storage_index: bytes
    number: int
    steps: Sequence[Step]
    grows_to: int | None = None  # bytes to have room for before anything is done; the file may then be longer


class Places:
    """Where a store's files are."""

    def share(self, storage_index: bytes, number: int) -> str:
        raise NotImplementedError

    def temporary(self, storage_index: bytes, number: int) -> str:
        raise NotImplementedError


class Journal:
    """Calls of commit() may come from several threads; they take turns."""

    def __init__(self, path: str, places: Places, *, durable: bool) -> None:
        """Finishes what an earlier process could not. Raises OSError."""
        self._path = path
        self._places = places
        self._durable = durable
        self._turn = threading.Lock()
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self.unfinished = True  # a whole record may be there whose steps are not all done
        self._finish()

    def close(self) -> None:
        """A journal with nothing in it leaves no file."""
        os.close(self._fd)
        if not self.unfinished:
            with suppress(OSError):
                os.unlink(self._path)

    @property
    def busy(self) -> bool:
        """Whether commit() would have to wait for another thread."""
        return self._turn.locked()

    def commit(self, changes: Sequence[FileChange]) -> None:
        """Do all the changes or none. Raises NoSpaceError, OSError: nothing was done, or all of it will be later."""
        if len(changes) == 1 and _cannot_be_torn(changes[0].steps):
            with self._turn:
                self._finish()
                self._do(changes[0])
            return
        record = _encode(changes)
        with self._turn:
            self._finish()
            try:
                for change in changes:
                    self._make_room(change)
                write_all(self._fd, record, 0)
            except OSError as error:
                self._strike_out()
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise NoSpaceError("no space left for this change") from None
                raise
            if self._durable:
                os.fdatasync(self._fd)
            self.unfinished = True
            for change in changes:
                self._do(change)
            self.unfinished = False
            self._strike_out()
            if sum(map(len, record)) > KEPT_BYTES:
                os.ftruncate(self._fd, KEPT_BYTES)

    def _strike_out(self) -> None:
        os.pwrite(self._fd, bytes(8), 0)

    def _make_room(self, change: FileChange) -> None:
        """So that the disk cannot turn out to be full half-way."""
        if change.grows_to is None:
            return
        fd = os.open(self._places.share(change.storage_index, change.number), os.O_RDWR | os.O_CLOEXEC)
        try:
            size = os.fstat(fd).st_size
            if change.grows_to > size:
                os.posix_fallocate(fd, size, change.grows_to - size)
        finally:
            os.close(fd)

    def _finish(self) -> None:
        """Do what the record says, if there is a whole one."""
        if not self.unfinished:
            return
        changes = _decode(_read_record(self._fd))
        for change in changes:
            with suppress(FileNotFoundError):  # an earlier attempt got as far as deleting it
                self._do(change)
        if changes:
            log.info("finished a change of %d shares that was interrupted", len(changes))
        self._strike_out()
        self.unfinished = False

    def _do(self, change: FileChange) -> None:
        path = self._places.share(change.storage_index, change.number)
        first = change.steps[0]
        if isinstance(first, Unlink):
            with suppress(FileNotFoundError):
                os.unlink(path)
            with suppress(OSError):
                os.rmdir(os.path.dirname(path))
            return
        if isinstance(first, Rename):
            with suppress(FileNotFoundError):  # done before
                publish(self._places.temporary(change.storage_index, change.number), path, durable=self._durable)
            return
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            do_steps(fd, change.steps)
            if self._durable:
                os.fdatasync(fd)
        finally:
            os.close(fd)


def _cannot_be_torn(steps: Sequence[Step]) -> bool:
    if len(steps) != 1:
        return False
    step = steps[0]
    if isinstance(step, Write):
        return step.position // PAGE_BYTES == (step.position + max(len(step.data), 1) - 1) // PAGE_BYTES
    return not isinstance(step, Zero)


# --- file work ------------------------------------------------------------------------------------------------------


def do_steps(fd: int, steps: Sequence[Step]) -> None:
    """Write, zero and resize one open file."""
    for step in steps:
        if isinstance(step, Write):
            write_all(fd, [step.data], step.position)
        elif isinstance(step, Zero):
            _zero(fd, step.position, step.length)
        elif isinstance(step, Resize):
            os.ftruncate(fd, step.length)


def _zero(fd: int, position: int, length: int) -> None:
    """Beyond the file's end it is enough to make it longer."""
    end = position + length
    size = os.fstat(fd).st_size
    while position < min(end, size):
        position += os.pwrite(fd, memoryview(_ZEROS)[: min(end, size) - position], position)
    if end > size:
        os.ftruncate(fd, end)


def write_all(fd: int, buffers: Sequence[Buffer], position: int) -> None:
    """Put all the buffers one after another at `position`; the kernel may take them in parts."""
    if len(buffers) == 1:
        rest = buffers[0]
        while (taken := os.pwrite(fd, rest, position)) < len(rest):
            position += taken
            rest = memoryview(rest)[taken:]
        return
    waiting = list(buffers)
    while waiting:
        batch = waiting[:_BUFFERS_MAX]
        taken = os.pwritev(fd, batch, position)
        position += taken
        if taken == sum(map(len, batch)):
            del waiting[: len(batch)]
            continue
        done = 0
        while done < len(batch) and taken >= len(batch[done]):
            taken -= len(batch[done])
            done += 1
        del waiting[:done]
        if taken:
            waiting[0] = memoryview(waiting[0])[taken:]


def publish(temporary: str, path: str, *, durable: bool) -> None:
    """Let a finished file appear under its name, whole. Raises FileNotFoundError when there is no such temporary."""
    if durable:
        _fsync(temporary, os.O_RDWR)
    try:
        os.rename(temporary, path)
    except FileNotFoundError:
        os.stat(temporary)
        _make_bucket(os.path.dirname(path))
        os.rename(temporary, path)
    if durable:
        _fsync(os.path.dirname(path), os.O_RDONLY)


def _make_bucket(path: str) -> None:
    """The directory of one storage index, in one of those of its first two characters, which may be missing, too."""
    try:
        os.mkdir(path)
    except FileNotFoundError:
        os.makedirs(path, exist_ok=True)
    except FileExistsError:
        return


def _fsync(path: str, flags: int) -> None:
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# --- the record -----------------------------------------------------------------------------------------------------


def _encode(changes: Sequence[FileChange]) -> list[Buffer]:
    buffers: list[Buffer] = [b""]
    for change in changes:
        for step in change.steps:
            kind, position, length = _fields(step)
            buffers.append(_STEP.pack(kind, change.storage_index, change.number, position, length))
            if isinstance(step, Write):
                buffers.append(step.data)
    checksum = 0
    for buffer in buffers:
        checksum = zlib.crc32(buffer, checksum)
    buffers[0] = _RECORD.pack(_MAGIC, sum(map(len, buffers)), checksum)
    return buffers


def _fields(step: Step) -> tuple[int, int, int]:
    if isinstance(step, Write):
        return _WRITE, step.position, len(step.data)
    if isinstance(step, Zero):
        return _ZERO, step.position, step.length
    if isinstance(step, Resize):
        return _RESIZE, 0, step.length
    return (_UNLINK if isinstance(step, Unlink) else _RENAME), 0, 0


def _read_record(fd: int) -> memoryview:
    """The body of a whole record, or nothing."""
    size = os.fstat(fd).st_size
    head = os.pread(fd, _RECORD.size, 0)
    if len(head) < _RECORD.size:
        return memoryview(b"")
    magic, length, checksum = _RECORD.unpack(head)
    if magic != _MAGIC or length > size - _RECORD.size:
        return memoryview(b"")
    body = bytearray(length)
    position = 0
    while position < length:
        got = os.preadv(fd, [memoryview(body)[position:]], _RECORD.size + position)
        if not got:
            return memoryview(b"")
        position += got
    return memoryview(body) if zlib.crc32(body) == checksum else memoryview(b"")


_MAKE: Final[dict[int, Callable[[int, int], Step]]] = {
    _ZERO: Zero,
    _RESIZE: lambda _, length: Resize(length),
    _UNLINK: lambda *_: Unlink(),
    _RENAME: lambda *_: Rename(),
}


def _decode(body: memoryview) -> list[FileChange]:
    """The changes again; steps of one share that stand together are one change. `body` passed its checksum."""
    changes: list[FileChange] = []
    for storage_index, number, step in _steps(body):
        last = changes[-1] if changes else None
        if last is not None and (last.storage_index, last.number) == (storage_index, number):
            changes[-1] = FileChange(storage_index, number, [*last.steps, step])
        else:
            changes.append(FileChange(storage_index, number, [step]))
    return changes


def _steps(body: memoryview) -> Iterator[tuple[bytes, int, Step]]:
    place = 0
    while place < len(body):
        kind, storage_index, number, position, length = _STEP.unpack_from(body, place)
        place += _STEP.size
        if kind == _WRITE:
            yield storage_index, number, Write(position, body[place : place + length])
            place += length
        else:
            yield storage_index, number, _MAKE[kind](position, length)
