"""Files: open, read, write, truncate, and the storing of what was written.

When something is stored: at the close of the last handle that writes, at fsync, before a file that has no stored name
yet is renamed, and when a path is truncated that nobody has open for writing. Immutable contents become a new
file under the name; a mutable file is replaced in place.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
import time
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from grid.errors import GridError
from tahoefs import metadata as edge
from tahoefs.errnos import FSError
from tahoefs.inodes import Folder, Inode, Link, usual_number
from tahoefs.interfaces import Caller, Position
from tahoefs.open_files import Handle, OpenFile
from tahoefs.pushing import PagePusher
from tahoefs.targets import Kind, cap_of, failed, is_mutable_file, same_contents
from tahoefs.vfs_attributes import AttributeOperations, Changes, Stat
from tahoefs.vfs_core import Invalidation, View

log = logging.getLogger(__name__)


class FileOperations(AttributeOperations):
    @cached_property
    def pusher(self) -> PagePusher:
        return PagePusher(self._let_go)

    async def open(self, number: int, flags: int, caller: Caller) -> tuple[int, bool]:
        """Return (handle, may the kernel keep the pages it has of this file?)."""
        inode = self.inode(number)
        view = self.view(inode)
        writing = flags & os.O_ACCMODE != os.O_RDONLY or bool(flags & os.O_TRUNC)
        self._require_open(inode, view, caller, writing=writing)
        mode = self.mode(inode, view)
        kept = mode & ~(stat.S_ISUID | (stat.S_ISGID if mode & stat.S_IXGRP else 0))
        if flags & os.O_TRUNC and caller.uid != 0 and kept != mode:  # at every other change the kernel sees to it
            await self.set_attributes(number, Changes(mode=stat.S_IMODE(kept)), caller)
        return await self.open_handle(inode, flags)

    def _require_open(self, inode: Inode, view: View, caller: Caller, *, writing: bool) -> None:
        if inode.kind is Kind.DIRECTORY:
            raise FSError(errno.EISDIR)
        if inode.kind is Kind.UNKNOWN:
            raise FSError(errno.EACCES)
        if writing and not self.can_write(inode, view):
            raise self.refuse()
        if writing and caller.uid != 0 and edge.is_no_write(view.metadata):
            raise FSError(errno.EACCES)

    async def open_handle(self, inode: Inode, flags: int) -> tuple[int, bool]:
        opened = self._use(inode)
        keeps_pages = not is_mutable_file(inode.target) and same_contents(inode.cached or inode.target, inode.target)
        inode.cached = inode.target
        handle = Handle(opened, flags)
        opened.writers += handle.writes
        try:
            if handle.writes or flags & os.O_TRUNC:
                with opened.while_changing():
                    await self.pusher.quiet(opened)
                    if flags & os.O_TRUNC:
                        await self._truncate(opened, 0)
        except BaseException:
            opened.writers -= handle.writes
            self._let_go(inode, opened)
            raise
        return self.add_handle(handle), keeps_pages

    def _use(self, inode: Inode) -> OpenFile:
        if inode.opened is None:
            inode.opened = OpenFile(inode, self.workspace)
        inode.opened.handles += 1
        return inode.opened

    def _let_go(self, inode: Inode, opened: OpenFile) -> None:
        opened.handles -= 1
        self.pusher.left(opened)
        if opened.handles == 0:
            inode.opened = None
            opened.close()
            if inode.is_nascent:  # it could not be stored: the name goes with the last handle
                self.table.unlink(inode)
            elif inode.link is not None:
                inode.draft = None
            self.table.drop_if_unused(inode)

    async def read(self, number: int, offset: int, length: int) -> bytes:
        opened = self.file_handle(number).opened
        if offset == 0 and opened.writable is None:
            self._look_ahead(opened.inode)
        if (page := await self.pusher.page(opened, offset, length)) is not None:
            return page
        try:
            data = await opened.read(offset, length)
        except GridError as error:
            self.workspace.note_error(self.path_of(opened.inode), error)
            raise
        await self.pusher.note(opened, offset, len(data))
        return data

    def _look_ahead(self, inode: Inode) -> None:
        """A file begins to be read. If that looks like the directory being read through, have the next ones fetched."""
        link = inode.link
        folder = link.parent.folder if link else None
        if link is None or folder is None or not self.workspace.is_prefetchable(inode.target):
            return
        entries, parent = folder.directory.entries, link.parent.number

        def orders() -> list[list[str]]:
            names = [name for name, entry in entries().items() if self.workspace.is_prefetchable(entry.target)]
            return [names, sorted(names, key=lambda name: usual_number(parent, name))]

        following = self.neighbours.note(folder, link.name, folder.directory.generation, orders)
        found = (folder.directory.get(name) for name in following)
        self.workspace.prefetch(entry.target for entry in found if entry is not None)

    async def write(self, number: int, offset: int, data: bytes) -> int:
        handle = self.file_handle(number)
        opened, inode = handle.opened, handle.opened.inode
        if not handle.writes:
            raise FSError(errno.EBADF)
        where = await opened.write(offset, data, append=handle.appends)
        self._start_draft(inode)
        if where != offset:
            self.tell(Invalidation(inode.number))  # the kernel took the end to be elsewhere, and cached that
        return len(data)

    async def setattr(self, number: int, changes: Changes, handle_number: int | None, caller: Caller) -> Stat:
        inode = self.inode(number)
        if changes.size is not None:
            await self._resize(inode, changes.size, handle_number, caller)
        if (changes.mode, changes.uid, changes.gid, changes.atime_ns, changes.mtime_ns) != (None,) * 5:
            await self.set_attributes(number, changes, caller)
        return await self.getattr(number)

    async def _resize(self, inode: Inode, size: int, handle_number: int | None, caller: Caller) -> None:
        if handle_number is not None:
            handle = self.file_handle(handle_number)
            if not handle.writes:
                raise FSError(errno.EINVAL)
            await self._truncate(handle.opened, size)
            return
        self._require_open(inode, self.view(inode), caller, writing=True)
        opened = self._use(inode)
        try:
            with opened.while_changing():
                await self.pusher.quiet(opened)
                await self._truncate(opened, size)
            position = None if opened.writers else await self.store(inode)
        finally:
            self._let_go(inode, opened)
        if position is not None:
            await self.settle(position)

    async def _truncate(self, opened: OpenFile, size: int) -> None:
        await opened.truncate(size)
        self._start_draft(opened.inode)

    def _start_draft(self, inode: Inode) -> None:
        """From the first change of the contents on, metadata waits to be stored with them."""
        if inode.draft is None:
            inode.draft = dict(self.view(inode).metadata)

    # --- storing ---------------------------------------------------------------------------------------------

    async def flush(self, number: int) -> None:
        """close(2): the last handle that writes stores. Raises what storing raises; what was written stays then."""
        handle = self.file_handle(number)
        opened = handle.opened
        if not handle.writes or opened.writers > 1:
            return
        if (position := await self.store(opened.inode)) is not None:
            await self.settle(position)
        self._report_failed_upload(opened.inode)

    async def fsync(self, number: int) -> None:
        opened = self.file_handle(number).opened
        await self.settle(await self.store(opened.inode), flush=True)
        self._report_failed_upload(opened.inode)

    async def release(self, number: int) -> None:
        """No handle of that open(2) is left. What was written after the last close, by mmap, is stored now."""
        handle = self.file_handle(number)
        del self.handles[number]
        opened = handle.opened
        opened.writers -= handle.writes
        try:
            if opened.writers == 0 and await self.store(opened.inode) is not None:
                await self.workspace.persist()
        finally:
            self._let_go(opened.inode, opened)

    async def store(self, inode: Inode) -> Position | None:
        """Store what was written under the inode's name, if anything was; files unlinked here are stored nowhere.

        If the name is another client's by now, ours is stored beside it, and the inode has that name from then on.
        """
        opened = inode.opened
        if opened is None or not opened.dirty:
            return None
        async with opened.lock:
            while (link := inode.link or self._lost_link(inode)) is not None and opened.dirty:
                folder = link.parent.folder
                assert folder is not None
                async with folder.lock:
                    if link in (inode.link, inode.lost):  # else it was renamed or unlinked while we waited
                        return await self._store_locked(inode, opened, link, folder)
        return None

    def _draft_of(self, inode: Inode, folder: Folder, link: Link) -> Mapping[str, Any]:
        """The metadata to store: its draft is as old as the first write, and other clients may have noted something."""
        if inode.draft is None:
            return inode.metadata
        entry = None if inode.is_nascent or inode.link is not link else folder.directory.get(link.name)
        if entry is None or not same_contents(inode.target, entry.target):
            return inode.draft
        return edge.beside(inode.draft, entry.metadata)

    def _lost_link(self, inode: Inode) -> Link | None:
        """The name it had, unless that was in a directory which is gone as well."""
        above = inode.lost.parent if inode.lost is not None else None
        return inode.lost if above is self.table.root or (above is not None and above.link is not None) else None

    async def _store_locked(self, inode: Inode, opened: OpenFile, link: Link, folder: Folder) -> Position:
        contents = opened.writable
        assert contents is not None
        target = cap_of(inode.target) or inode.target  # a new mutable file has its cap once it was stored
        mutable = is_mutable_file(target)
        now_ns = time.time_ns()
        metadata = edge.changed(
            self._draft_of(inode, folder, link),
            now_ns=now_ns,
            mtime_ns=now_ns if opened.written_ns is None else opened.written_ns,
            size=None if mutable else contents.size,
        )
        with opened.while_storing():
            if mutable:
                position = await self.workspace.replace(target, contents, name=link.name)
                if self.can_change(folder):  # its time is noted on the edge, where we may
                    position = await self.workspace.set_metadata(folder.directory, link.name, metadata)
            else:
                over = None if inode.is_nascent else inode.target
                with folder.being_changed(added=link.name):
                    position, target, name = await self.workspace.store(
                        folder.directory, link.name, contents, metadata, over=over
                    )
        if folder.nascent.get(link.name) is inode:
            del folder.nascent[link.name]
        if not mutable and (inode.link is None or name != link.name):
            inode.lost = None
            self.table.link(inode, link.parent, name)
            self.tell(Invalidation(link.parent.number, name.encode()))
        opened.stored(target)
        inode.metadata, inode.draft = metadata, None
        return position

    def _report_failed_upload(self, inode: Inode) -> None:
        link = inode.link
        folder = link.parent.folder if link else None
        if inode.opened is not None and folder is not None and not inode.opened.dirty and failed(inode.target):
            raise FSError(errno.EIO)

    async def store_all(self) -> None:
        """At the end of a mount: store whatever is still open for writing."""
        for handle in list(self.handles.values()):
            if isinstance(handle, Handle) and handle.opened.dirty:
                try:
                    await self.store(handle.opened.inode)
                except Exception:
                    log.exception("a file that was still open could not be stored")
