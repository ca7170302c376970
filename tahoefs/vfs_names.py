"""The namespace: lookup, create, mkdir, mknod, symlink, unlink, rmdir, rename.

Each change is one call on the workspace (later: one journal entry), made with the folder's lock held from the checks to
its answer. Waiting for the grid (`durability=grid`) comes after the lock.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Final

from grid.formats.caps import LiteralCap
from tahoefs import metadata as edge
from tahoefs.errnos import FSError
from tahoefs.inodes import Folder, Inode
from tahoefs.interfaces import Caller, IEntry, Metadata, Position
from tahoefs.targets import SYMLINK_BYTES_MAX, TYPE_NAMES, Kind
from tahoefs.vfs_attributes import Stat
from tahoefs.vfs_files import FileOperations

RENAME_NOREPLACE: Final = 1
RENAME_EXCHANGE: Final = 2
_SPECIAL_TYPES: Final = {stat.S_IFIFO: Kind.FIFO, stat.S_IFSOCK: Kind.SOCKET}


class NameOperations(FileOperations):
    async def lookup(self, parent_number: int, raw: bytes) -> Stat:
        """A Stat without number when there is no such name: that too may be kept for a while."""
        parent, folder = self.folder_inode(parent_number)
        if raw in (b".", b".."):
            return self._counted(parent if raw == b"." or parent.link is None else parent.link.parent)
        name = self.name_of(raw)
        await self.load(parent, folder)
        inode = self.child(parent, folder, name)
        found = Stat(0, entry_timeout_s=self.listing_timeout_s(folder)) if inode is None else self._counted(inode)
        if name.encode() != raw:
            found.entry_timeout_s = 0.0  # another spelling: the kernel is told of changes by the NFC name only
        return found

    def _counted(self, inode: Inode) -> Stat:
        """What the kernel is told of an inode it takes a reference to by that."""
        found = self.stat(inode, self.view(inode))
        inode.lookups += 1
        return found

    def forget(self, references: list[tuple[int, int]]) -> None:
        for number, count in references:
            self.table.forget(number, count)

    # --- making ----------------------------------------------------------------------------------------------

    async def create(
        self, parent_number: int, raw: bytes, mode: int, flags: int, caller: Caller
    ) -> tuple[int, bool, Stat]:
        """open(2) with O_CREAT: (handle, may pages be kept, stat).

        The name is there at once for this mount, and for others when the contents are stored.
        """
        parent, folder = self.folder_inode(parent_number)
        name = self.name_of(raw, creating=True)
        await self.load(parent, folder)
        existing = self.child(parent, folder, name)
        if existing is not None:  # another client was faster than the kernel's own lookup
            if flags & os.O_EXCL:
                raise FSError(errno.EEXIST)
            handle, keeps_pages = await self.open(existing.number, flags, caller)
            return handle, keeps_pages, self._counted(existing)
        async with self._changing(folder):
            self._require_free(parent, folder, name)
            metadata = self._new_metadata(parent, folder, mode, caller, directory=False)
            inode = self.table.add(parent, name, Kind.FILE, LiteralCap(b""), metadata)
            inode.draft = metadata
            folder.nascent[name] = inode
            folder.changed_ns = time.time_ns()
            opened = self._use(inode)
        try:
            await opened.start_empty()
        except BaseException:
            self._let_go(inode, opened)
            raise
        handle, _ = await self.open_handle(inode, flags & ~os.O_TRUNC)
        opened.handles -= 1  # ours, which kept it open until now
        return handle, True, self._counted(inode)

    async def mknod(self, parent_number: int, raw: bytes, mode: int, caller: Caller) -> Stat:
        """Regular files, FIFOs and sockets. Devices are EPERM: whoever mounts this should not meet any."""
        if stat.S_IFMT(mode) in (0, stat.S_IFREG):
            return await self._make_small(parent_number, raw, mode, caller, Kind.FILE, b"")
        kind = _SPECIAL_TYPES.get(stat.S_IFMT(mode))
        if kind is None:
            raise FSError(errno.EPERM)
        return await self._make_small(parent_number, raw, mode, caller, kind, b"")

    async def symlink(self, parent_number: int, raw: bytes, link_target: bytes, caller: Caller) -> Stat:
        """A small file that holds the target, whose metadata says that it is a link."""
        if len(link_target) > SYMLINK_BYTES_MAX:
            raise FSError(errno.ENAMETOOLONG)
        return await self._make_small(parent_number, raw, 0o777, caller, Kind.SYMLINK, link_target)

    async def readlink(self, number: int) -> bytes:
        inode = self.inode(number)
        view = self.view(inode)
        if inode.kind is not Kind.SYMLINK:
            raise FSError(errno.EINVAL)
        contents = await self.workspace.open_contents(view.target)
        try:
            return bytes(await contents.read(0, min(contents.size, SYMLINK_BYTES_MAX)))
        finally:
            contents.close()

    async def _make_small(
        self, parent_number: int, raw: bytes, mode: int, caller: Caller, kind: Kind, data: bytes
    ) -> Stat:
        parent, folder = self.folder_inode(parent_number)
        name = self.name_of(raw, creating=True)
        await self.load(parent, folder)
        contents = await self.workspace.new_contents()
        try:
            if data:
                await contents.write(0, data)
            async with self._changing(folder):
                self._require_free(parent, folder, name)
                metadata = self._new_metadata(parent, folder, mode, caller, directory=False)
                metadata = edge.changed(
                    metadata,
                    now_ns=time.time_ns(),
                    mtime_ns=time.time_ns(),
                    size=len(data),
                    type=TYPE_NAMES.get(kind),
                )
                folder.changed_ns = time.time_ns()
                with folder.being_changed(added=name):
                    position, target, _ = await self.workspace.store(
                        folder.directory,
                        name,
                        contents,
                        metadata,
                        over=None,
                        mutable=None if kind is Kind.FILE else "none",  # what is special is told by its size too
                    )
                inode = self.table.add(parent, name, kind, target, metadata)
                found = self._counted(inode)
        finally:
            contents.close()
        await self.settle(position)
        return found

    async def mkdir(self, parent_number: int, raw: bytes, mode: int, caller: Caller) -> Stat:
        parent, folder = self.folder_inode(parent_number)
        name = self.name_of(raw, creating=True)
        await self.load(parent, folder)
        async with self._changing(folder):
            self._require_free(parent, folder, name)
            metadata = self._new_metadata(parent, folder, mode, caller, directory=True)
            folder.changed_ns = time.time_ns()
            with folder.being_changed(added=name, more=1):
                directory = await self.workspace.make_directory(folder.directory, name, metadata)
            below = self.table.folder_of(directory)
            below.loaded = True
            inode = self.table.add(parent, name, Kind.DIRECTORY, directory, metadata, below)
            found = self._counted(inode)
        await self.settle(None)
        return found

    def _new_metadata(self, parent: Inode, folder: Folder, mode: int, caller: Caller, *, directory: bool) -> Metadata:
        """Owners are noted only where they are not what this mount shows by itself."""
        inherited = self.view(parent).metadata
        gid = caller.gid if self.options.gid is None else self.defaults.gid
        if self.mode(parent, self.view(parent)) & stat.S_ISGID:
            gid = edge.owner(inherited, self.defaults)[1]
            mode |= stat.S_ISGID if directory else 0
        uid = caller.uid if self.options.uid is None else self.defaults.uid
        return edge.changed(
            {},
            now_ns=time.time_ns(),
            mode=stat.S_IMODE(mode),
            uid=uid if uid != self.defaults.uid else None,
            gid=gid if gid != self.defaults.gid else None,
        )

    def _require_free(self, parent: Inode, folder: Folder, name: str) -> None:
        self.require_change(folder)
        if parent.link is None and parent is not self.table.root:
            raise FSError(errno.ENOENT)  # the directory itself was removed
        if not self.is_shown(name):
            raise FSError(errno.EINVAL)
        if name in folder.nascent or folder.directory.get(name) is not None:
            raise FSError(errno.EEXIST)

    async def hard_link(self, number: int, parent_number: int, raw: bytes) -> Stat:
        """A second name would need one set of attributes for both, and those are kept with names: not yet."""
        self.inode(number)
        self.require_change(self.folder_inode(parent_number)[1])
        self.name_of(raw, creating=True)
        raise FSError(errno.EPERM)

    # --- removing --------------------------------------------------------------------------------------------

    async def unlink(self, parent_number: int, raw: bytes) -> None:
        await self._remove(parent_number, raw, directory=False)

    async def rmdir(self, parent_number: int, raw: bytes) -> None:
        await self._remove(parent_number, raw, directory=True)

    async def _remove(self, parent_number: int, raw: bytes, *, directory: bool) -> None:
        parent, folder = self.folder_inode(parent_number)
        name = self.name_of(raw)
        await self.load(parent, folder)
        inode = self._existing(parent, folder, name)
        self.require_change(folder)
        if directory:
            await self._load_for_emptiness(inode)
        position = None
        async with self._changing(folder, *([inode.folder] if inode.folder and directory else [])):
            inode = self._existing(parent, folder, name)
            if directory:
                self._require_empty(inode)
            elif inode.kind is Kind.DIRECTORY:
                raise FSError(errno.EISDIR)
            view = self.view(inode)
            if inode.opened is not None:
                await inode.opened.keep_unlinked()
            folder.changed_ns = time.time_ns()
            with folder.being_changed(removed=name, more=-1 if directory else 0):
                if folder.directory.get(name) is not None:
                    position = await self.workspace.unlink(folder.directory, name)
            inode.draft = edge.changed(view.metadata, now_ns=time.time_ns())  # what is left, for who has it open
            self.table.unlink(inode)
        if position is not None:
            await self.settle(position)

    async def _load_for_emptiness(self, inode: Inode) -> None:
        if inode.folder is None:
            raise FSError(errno.ENOTDIR)
        if not self.is_loop(inode):
            await self.load(inode, inode.folder)

    def _require_empty(self, inode: Inode) -> None:
        if inode.folder is None:
            raise FSError(errno.ENOTDIR)
        if not self.is_loop(inode) and not inode.folder.is_empty():
            raise FSError(errno.ENOTEMPTY)

    def is_loop(self, inode: Inode) -> bool:
        """Does this directory contain itself? It is shown, but not entered, and removing it removes just the name."""
        return any(above.folder is inode.folder for above in inode.ancestors()[1:])

    def _existing(self, parent: Inode, folder: Folder, name: str) -> Inode:
        inode = self.child(parent, folder, name)
        if inode is None:
            raise FSError(errno.ENOENT)
        return inode

    # --- renaming --------------------------------------------------------------------------------------------

    async def rename(
        self, old_parent_number: int, old_raw: bytes, new_parent_number: int, new_raw: bytes, flags: int = 0
    ) -> None:
        if flags & ~(RENAME_NOREPLACE | RENAME_EXCHANGE) or flags == RENAME_NOREPLACE | RENAME_EXCHANGE:
            raise FSError(errno.EINVAL)
        old_parent, source = self.folder_inode(old_parent_number)
        new_parent, destination = self.folder_inode(new_parent_number)
        old_name, new_name = self.name_of(old_raw), self.name_of(new_raw, creating=True)
        if not self.is_shown(new_name):
            raise FSError(errno.EINVAL)
        await self.load(old_parent, source)
        await self.load(new_parent, destination)
        moved = self._existing(old_parent, source, old_name)
        replaced = self.child(new_parent, destination, new_name)
        self.require_change(source)
        self.require_change(destination)
        await self.store(moved)  # a file that is being written gets its stored name first: rename is durable then
        if flags & RENAME_EXCHANGE and replaced is not None:
            await self.store(replaced)
        elif replaced is not None and replaced.folder is not None:
            await self._load_for_emptiness(replaced)
        below = [replaced.folder] if replaced is not None and replaced.folder is not None else []
        async with self._changing(source, destination, *below):
            moved = self._existing(old_parent, source, old_name)
            replaced = self.child(new_parent, destination, new_name)
            if moved is replaced:
                return
            if moved.is_nascent:
                raise FSError(errno.EBUSY)  # made anew while we waited for the lock
            self._refuse_loops(moved, new_parent)
            directories = [each for each in (moved, replaced) if each is not None and each.folder is not None]
            before = [self.path_of(each) for each in directories]
            if flags & RENAME_EXCHANGE:
                position = await self._exchange(moved, replaced, new_parent, old_parent)
            else:
                position = await self._move(moved, replaced, new_parent, new_name, flags)
                directories = directories[: moved.folder is not None]  # what was replaced is nowhere
            if directories:
                await self.on_moved(list(zip(before, map(self.path_of, directories), strict=False)))
        await self.settle(position)

    async def _move(self, moved: Inode, replaced: Inode | None, parent: Inode, name: str, flags: int) -> Position:
        link, last = moved.link, None
        if replaced is not None:
            self._require_replaceable(moved, replaced, flags)
            last = self.view(replaced)
            if replaced.opened is not None:
                await replaced.opened.keep_unlinked()
        assert link is not None and link.parent.folder is not None and parent.folder is not None
        source, destination = link.parent.folder, parent.folder
        metadata = self._entry_metadata(source, link.name)
        source.changed_ns = destination.changed_ns = time.time_ns()
        position = await self.workspace.rename(source.directory, link.name, destination.directory, name, metadata)
        if replaced is not None and last is not None:
            replaced.draft = edge.changed(last.metadata, now_ns=time.time_ns())  # what is left, as in _remove
            self.table.unlink(replaced)
        self.table.link(moved, parent, name)
        moved.metadata = metadata
        return position

    async def _exchange(self, one: Inode, other: Inode | None, new_parent: Inode, old_parent: Inode) -> Position:
        if other is None:
            raise FSError(errno.ENOENT)
        self._refuse_loops(other, old_parent)
        first, second = one.link, other.link
        if first is None or second is None or other.is_nascent:
            raise FSError(errno.EBUSY)
        source, destination = first.parent.folder, second.parent.folder
        assert source is not None and destination is not None
        source.changed_ns = destination.changed_ns = one.ctime_ns = other.ctime_ns = time.time_ns()
        position = await self.workspace.exchange(source.directory, first.name, destination.directory, second.name)
        self.table.detach(one)
        self.table.detach(other)
        self.table.link(one, second.parent, second.name)
        self.table.link(other, first.parent, first.name)
        return position

    def _entry_metadata(self, folder: Folder, name: str) -> dict[str, Any]:
        entry: IEntry | None = folder.directory.get(name)
        if entry is None:
            raise FSError(errno.ENOENT)
        return edge.changed(entry.metadata, now_ns=time.time_ns())

    def _require_replaceable(self, moved: Inode, replaced: Inode, flags: int) -> None:
        if flags & RENAME_NOREPLACE:
            raise FSError(errno.EEXIST)
        if moved.folder is None and replaced.folder is not None:
            raise FSError(errno.EISDIR)
        if moved.folder is not None:
            self._require_empty(replaced)  # ENOTDIR for anything but a directory

    def _refuse_loops(self, moved: Inode, new_parent: Inode) -> None:
        """A directory cannot come to stand below itself, by whichever path it was reached."""
        if moved.folder is not None and any(above.folder is moved.folder for above in new_parent.ancestors()):
            raise FSError(errno.EINVAL)

    @asynccontextmanager
    async def _changing(self, *folders: Folder) -> AsyncIterator[None]:
        """Hold the locks of all these folders, taken in one order everywhere."""
        async with AsyncExitStack() as stack:
            for folder in sorted(set(folders), key=lambda folder: folder.rank):
                await stack.enter_async_context(folder.lock)
            yield
