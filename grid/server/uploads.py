"""Immutable shares on their way in: written in any order, in a file that gets its name when it is whole.

    allocate -> (write ...) -> close     the file moves to where shares are
                            -> abort     it goes; so do uploads nobody wrote to for 30 minutes, and all at a stop

The file is made at the first write. What a share is surrounded by (header, one lease) is written with the last step, so
that a share written in one go costs one system call. Bytes may be sent twice, if they are the same ones.
Source: the uploads of Tahoe-LAFS 1.20.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Final

import trio
from attrs import define, field

from grid import stats
from grid.formats import container
from grid.server.errors import (
    BadRequestError,
    ConflictingWriteError,
    DataTooLargeError,
    NoSpaceError,
    UploadFinishedError,
)
from grid.server.journal import Buffer, publish, write_all
from grid.server.open_files import OpenFile, OpenFiles
from grid.server.shares import ShareStore
from grid.server.spans import SPANS_MAX, Spans

if TYPE_CHECKING:
    from grid.server.storage import StorageService

WRITTEN_BYTES: Final = stats.counter("storage_written_bytes", "Bytes of immutable shares written by clients.")
OPEN_UPLOADS_MAX: Final = 256  # files kept open while nobody writes to them
_COMPARED_BYTES: Final = 1 << 20  # at a time


@define(eq=False)
class Upload:
    """One share being written by one client. Calls take effect in the order they were made."""

    storage_index: bytes
    number: int
    size: int  # bytes, exactly
    lease: container.Lease  # its time counts from the allocation
    upload_secret: bytes | None = field(repr=False)  # who may write, over HTTP
    _service: StorageService = field(repr=False)
    state: str = "open"  # then "closed" or "aborted"
    last_written_s: float = field(factory=trio.current_time)
    spans: Spans = field(factory=Spans, repr=False)
    made: bool = False  # whether there is a file
    _turn: trio.Lock = field(factory=trio.Lock, repr=False)

    @property
    def finished(self) -> bool:
        """Closed, aborted or given up: nothing can be written any more."""
        return self.state != "open"

    @property
    def complete(self) -> bool:
        """Every byte was written."""
        return self.spans.total >= self.size

    @property
    def required(self) -> list[tuple[int, int]]:
        """(begin, end) of what was not written yet, in order."""
        return self.spans.missing(self.size)

    async def write(self, offset: int, *data: Buffer) -> None:
        """Put `data`, one piece after the other, at `offset`. None of it may change until this returns.

        Raises ConflictingWriteError, DataTooLargeError, NoSpaceError, UploadFinishedError, BadRequestError; nothing
        was written then.
        """
        if offset < 0:
            raise BadRequestError("negative offset")
        await self._take_turn()
        try:
            self.check_open()
            self._service.touch(self)
            await self._service.work(sum(map(len, data)), partial(self._write, offset, data))
        finally:
            self._turn.release()

    async def close(self) -> None:
        """The share appears, whole: what was not written is zeros. Raises UploadFinishedError, NoSpaceError."""
        await self._take_turn()
        try:
            self.check_open()
            # a checkpoint here would let a timer end what is being closed: this is a few system calls
            self._publish()
            self.state = "closed"
        finally:
            self._turn.release()
        self._service.forget(self)

    async def abort(self) -> None:
        """Harmless when repeated, and after close()."""
        await self._take_turn()
        self._turn.release()
        self.abort_now()

    def abort_now(self) -> None:
        """As abort(), for who cannot wait. A write under way in a thread ends up in a file without a name."""
        if self.state == "open":
            self.state = "aborted"
            self._service.upload_files.discard(self)
            self._service.forget(self)

    async def _take_turn(self) -> None:
        try:
            self._turn.acquire_nowait()
        except trio.WouldBlock:
            await self._turn.acquire()

    def check_open(self) -> None:
        """Raises UploadFinishedError."""
        if self.state != "open":
            raise UploadFinishedError("precondition")

    # --- file work, perhaps in a thread; only ever one at a time

    def _write(self, offset: int, data: Sequence[Buffer]) -> None:
        end = offset + sum(map(len, data))
        with self._service.upload_files.use(self) as file:
            if written := self.spans.within(offset, end):
                whole = memoryview(b"".join(data))
                for begin, until in written:
                    self._compare(file.fd, begin, whole[begin - offset : until - offset])
            if end > self.size:
                raise DataTooLargeError(self.size, offset, end - offset)
            if len(self.spans) >= SPANS_MAX:
                raise BadRequestError("an upload with too many holes")
            buffers, position = [*data], container.IMMUTABLE_HEADER_BYTES + offset
            if offset == 0:
                buffers, position = [container.pack_immutable_header(self.size, 1), *data], 0
            if end == self.size:
                buffers.append(container.pack_immutable_lease(self.lease))
            _write(file.fd, buffers, position)
        WRITTEN_BYTES.add(end - offset)
        self.spans.add(offset, end)

    def _compare(self, fd: int, begin: int, data: memoryview) -> None:
        for start in range(0, len(data), _COMPARED_BYTES):
            piece = data[start : start + _COMPARED_BYTES]
            if os.pread(fd, len(piece), container.IMMUTABLE_HEADER_BYTES + begin + start) != piece:
                raise ConflictingWriteError("bytes already written differ")

    def _publish(self) -> None:
        header_written = bool(self.spans.within(0, 1))
        lease_written = bool(self.spans.within(self.size - 1, self.size)) if self.size else False
        store = self._service.store
        with self._service.upload_files.use(self) as file:
            if not header_written:
                _write(file.fd, [container.pack_immutable_header(self.size, 1)], 0)
            if not lease_written:
                lease = container.pack_immutable_lease(self.lease)
                _write(file.fd, [lease], container.immutable_lease_offset(self.size, 0))
        self._service.upload_files.let_go(self)
        publish(
            store.upload(self.storage_index, self.number),
            store.share(self.storage_index, self.number),
            durable=store.durable,
        )


def _write(fd: int, buffers: list[Buffer], position: int) -> None:
    try:
        write_all(fd, buffers, position)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise NoSpaceError("no space left for this share") from None
        raise


class UploadFiles(OpenFiles[Upload, OpenFile]):
    """Made at first use. Using one raises UploadFinishedError, OSError."""

    def __init__(self, store: ShareStore) -> None:
        super().__init__(OPEN_UPLOADS_MAX)
        self._store = store

    def _open(self, upload: Upload) -> OpenFile:
        # given up while this waited for a thread: its file is deleted, and another upload may have its name by now
        upload.check_open()
        path = self._store.upload(upload.storage_index, upload.number)
        flags = os.O_RDWR | os.O_CLOEXEC | (0 if upload.made else os.O_CREAT | os.O_EXCL)
        file = OpenFile(os.open(path, flags, 0o644))
        upload.made = True
        return file

    def _is_good(self, upload: Upload, file: OpenFile) -> bool:
        upload.check_open()
        return True

    def discard(self, upload: Upload) -> None:
        """Close the file and delete it."""
        self.let_go(upload)
        if upload.made:
            with suppress(OSError):
                os.unlink(self._store.upload(upload.storage_index, upload.number))
