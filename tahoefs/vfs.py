"""The file system's meaning: what each call does, over a Workspace. Thin `fuse.py` translates, this decides.

    VFS ─ names (lookup, create, rename, …) ─ files (open, read, write, store) ─ attributes ─ core
        └ directories: opendir, readdir, fsyncdir (here)

Methods are named after the calls, take inode and handle numbers and byte names, and raise FSError, or GridError and
OSError from below. What is promised to programs is in SEMANTICS.md.

A directory handle holds the names as they were at opendir (or rewinddir), sorted; an offset is a place in that list. So
offsets stay good while names come and go: what vanished is left out, what came shows after the next rewind, and nothing
is shown twice.
"""

from __future__ import annotations

import errno
import stat
from collections.abc import Iterator

from tahoefs.errnos import FSError
from tahoefs.inodes import Folder, Inode
from tahoefs.open_files import DirectoryHandle
from tahoefs.vfs_attributes import Changes, FreeSpace, Stat, grid_free_bytes
from tahoefs.vfs_names import NameOperations

__all__ = ["VFS", "Changes", "FreeSpace", "Stat", "grid_free_bytes"]


class VFS(NameOperations):
    async def opendir(self, number: int) -> int:
        inode, folder = self.folder_inode(number)
        if self.is_loop(inode):
            raise FSError(errno.ELOOP)
        await self.load(inode, folder)
        return self.add_handle(DirectoryHandle(inode, self._names(folder)))

    def _names(self, folder: Folder) -> list[str]:
        shown = [name for name in folder.directory.entries() if self.is_shown(name)]
        return sorted({*shown, *folder.nascent}) if folder.nascent else sorted(shown)

    async def readdir(self, number: int, offset: int) -> Iterator[tuple[bytes, Stat, int, Inode | None]]:
        """(name, stat, offset of the next, inode) from `offset` on; the caller counts a reference to each inode.

        The first two are "." and "..", to which no reference is taken (inode None).
        """
        handle = self.directory_handle(number)
        folder = handle.inode.folder
        assert folder is not None
        if offset == 0 and (handle.inode.link is not None or handle.inode is self.table.root):
            await self.load(handle.inode, folder)
            handle.names = self._names(folder)
        return self._listing(handle, folder, offset)

    def _listing(
        self, handle: DirectoryHandle, folder: Folder, offset: int
    ) -> Iterator[tuple[bytes, Stat, int, Inode | None]]:
        inode = handle.inode
        above = inode.link.parent if inode.link is not None else inode
        for place, (dots, each) in enumerate(((b".", inode), (b"..", above))):
            if offset <= place:
                yield dots, Stat(each.number, stat.S_IFDIR), place + 1, None
        for place in range(max(offset - 2, 0), len(handle.names)):
            name = handle.names[place]
            child = self.child(inode, folder, name)
            if child is not None:
                yield name.encode(), self.stat(child, self.view(child)), place + 3, child

    async def releasedir(self, number: int) -> None:
        self.directory_handle(number)
        del self.handles[number]

    async def fsyncdir(self, number: int) -> None:
        self.directory_handle(number)
        await self.settle(None, flush=True)
