"""Open files: one OpenFile per inode, shared by all its handles, so that all see the same bytes.

    no writer yet       reads come from `reader`, the stored contents, opened at the first read
    first write         `writable`: a spool file over the stored contents; from now on reads come from there
    stored (close)      `writable` is sealed and becomes the inode's new target; back to the first line

`lock` is held over every change of state, and over a write, an append or a truncation as a whole: appends of
different handles never overlap. Reads take it only to open `reader`. It is taken before any folder's lock.
What a read may still be using is closed only when the last handle is released.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import trio
from attrs import define, field, frozen

from tahoefs.errnos import FSError
from tahoefs.inodes import Inode
from tahoefs.interfaces import IContents, ILocalContents, ILocalSegments, IWorkspace, IWritableContents, Target
from tahoefs.targets import cap_of

FILE_BYTES_MAX: Final = 1 << 50  # ours: far above any grid, and far below where offset arithmetic ends


@define(eq=False)
class OpenFile:
    inode: Inode
    workspace: IWorkspace
    handles: int = 0
    writers: int = 0
    dirty: bool = False  # there is something to store; also true of a new file nothing was written to
    written_ns: int | None = None  # mtime of what is not stored yet
    writable: IWritableContents | None = None
    changing: int = 0  # truncations under way or about to begin, also by whom no handle counts as a writer
    storing: bool = False  # `writable` is being sealed: reads wait for what comes of it
    lock: trio.Lock = field(factory=trio.Lock)
    _reader: IContents | None = None
    _finished: list[IContents] = field(factory=list)

    @property
    def _source(self) -> IContents | None:
        return self.writable or self._reader

    @property
    def size(self) -> int | None:
        """Bytes as a reader would find them now; None when only the stored contents know."""
        return self._source.size if self._source is not None else None

    def local_segments(self) -> ILocalSegments | None:
        """What the local disk has of the stored contents, while nobody can change them."""
        if self.writers or self.changing or self.writable is not None:
            return None
        return self._reader.local() if isinstance(self._reader, ILocalContents) else None

    async def read(self, offset: int, length: int) -> bytes:
        while True:
            source = self._source if self._source and not self.storing else await self._open_reader()
            try:
                return await source.read(offset, length)
            except Exception:
                if source is self._source and not self.storing:
                    raise
                # The contents were sealed and stored meanwhile: what we read from is no longer for reading.

    async def write(self, offset: int, data: bytes, *, append: bool) -> int:
        """Write at `offset`, or at the end; returns where. Raises FSError(EFBIG)."""
        async with self.lock:
            contents = await self._for_writing(None)
            if append:
                offset = contents.size
            if offset + len(data) > FILE_BYTES_MAX:
                raise FSError(errno.EFBIG)
            await contents.write(offset, data)
            self._changed()
            return offset

    async def truncate(self, size: int) -> None:
        """Cut, or lengthen with zeros that take no room. Raises FSError(EFBIG)."""
        if size > FILE_BYTES_MAX:
            raise FSError(errno.EFBIG)
        async with self.lock:
            contents = await self._for_writing(size)
            if contents.size != size:
                await contents.truncate(size)
            self._changed()

    async def start_empty(self) -> None:
        """The contents of a file that was created just now."""
        async with self.lock:
            self.writable = await self.workspace.new_contents()
            self._changed()

    async def keep_unlinked(self) -> None:
        """Before the name goes: what is only on its way to the grid would go with it, so hold it here.

        Called with the folder's lock held, so without ours (see the order of locks); hence the second look.
        """
        if self.writable is None and cap_of(self.inode.target) is None:
            self._take(await self.workspace.new_contents(self.inode.target))

    @contextmanager
    def while_changing(self) -> Iterator[None]:
        self.changing += 1
        try:
            yield
        finally:
            self.changing -= 1

    @contextmanager
    def while_storing(self) -> Iterator[None]:
        self.storing = True
        try:
            yield
        finally:
            self.storing = False

    def stored(self, target: Target) -> None:
        """`writable` was stored: `target` holds its bytes now. Called with the lock held."""
        self._retire()
        self.inode.target = self.inode.cached = target
        self.dirty = False
        self.written_ns = None

    def close(self) -> None:
        """The last handle is gone."""
        self._retire()
        for contents in self._finished:
            contents.close()
        self._finished.clear()

    async def _for_writing(self, keep: int | None) -> IWritableContents:
        """The spool file; over the stored contents, of which only the first `keep` bytes count when given."""
        if self.writable is not None:
            return self.writable
        base = None if keep == 0 else self.inode.target
        return self._take(await self.workspace.new_contents(base, keep=keep))

    def _take(self, made: IWritableContents) -> IWritableContents:
        """Another task may have been faster while `made` was being opened: then that one's counts."""
        if self.writable is None:
            self.writable = made
        else:
            made.close()
        return self.writable

    async def _open_reader(self) -> IContents:
        async with self.lock:
            if self.writable is not None:
                return self.writable
            if self._reader is None:
                self._reader = await self.workspace.open_contents(self.inode.target)
            return self._reader

    def _changed(self) -> None:
        self.dirty = True
        self.written_ns = time.time_ns()

    def _retire(self) -> None:
        self._finished += [each for each in (self.writable, self._reader) if each is not None]
        self.writable = self._reader = None


@frozen(eq=False)
class Handle:
    """One open(2): an OpenFile and how it may be used."""

    opened: OpenFile
    flags: int

    @property
    def reads(self) -> bool:
        return self.flags & os.O_ACCMODE != os.O_WRONLY

    @property
    def writes(self) -> bool:
        return self.flags & os.O_ACCMODE != os.O_RDONLY

    @property
    def appends(self) -> bool:
        return bool(self.flags & os.O_APPEND)


@define(eq=False)
class DirectoryHandle:
    """One opendir(3): the names at that time, so that an offset means the same for as long as it is open."""

    inode: Inode
    names: list[str]
