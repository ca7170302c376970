"""Attributes: stat, chmod and its kin, access, statfs, extended attributes.

Sizes come from the cap, from pending contents, or from the open file; only for a mutable file is the grid asked, and
only in getattr, never in a lookup or a listing (those say "unknown, ask again").
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Final

from attrs import define, frozen

from grid.interfaces import IStorageServer
from tahoefs import metadata as edge
from tahoefs import xattrs
from tahoefs.errnos import FSError
from tahoefs.inodes import ROOT_INODE, Inode
from tahoefs.interfaces import Caller, Metadata, Position
from tahoefs.targets import Kind, is_mutable_file, is_unreadable, known_size, will_be_mutable
from tahoefs.vfs_core import NAME_BYTES_MAX, VFSCore, View

BLOCK_BYTES: Final = 4096
IO_BYTES: Final = 128 << 10  # what programs should read and write at a time: what the kernel asks us for
STAT_BLOCK_BYTES: Final = 512  # st_blocks counts in these
FREE_BYTES_UNKNOWN: Final = 1 << 40  # shown while no server has said how much it has left
INODES_FREE: Final = 1 << 32  # there is no such limit; programs want to see some
MOUNTED_NS: Final = time.time_ns()  # the root has no edge, so nobody noted its time


@define
class Stat:
    """struct stat, and how long the kernel may keep it. `number` 0: there is no such name."""

    number: int
    mode: int = 0
    nlink: int = 1
    uid: int = 0
    gid: int = 0
    size: int = 0
    atime_ns: int = 0
    mtime_ns: int = 0
    ctime_ns: int = 0
    entry_timeout_s: float = 0.0
    attr_timeout_s: float = 0.0


@frozen
class Changes:
    """What setattr is asked to change; None leaves as it is."""

    size: int | None = None
    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None


@frozen
class FreeSpace:
    block_bytes: int
    blocks: int
    blocks_free: int
    inodes: int
    name_bytes_max: int


def grid_free_bytes(servers: Iterable[IStorageServer], k: int, n: int) -> int | None:
    """Bytes of files that still fit, by what connected servers last said: theirs, divided by n/k; None: none said."""
    told = [server.available_space for server in servers if server.connected]
    known = [space for space in told if space is not None]
    return sum(known) * k // n if known else None


class AttributeOperations(VFSCore):
    async def getattr(self, number: int) -> Stat:
        inode = self.inode(number)
        view = self.view(inode)
        size = self._size_now(inode, view)
        if size is None:
            size = await self.workspace.size_of(view.target)
        return self.stat(inode, view, size)

    def _size_now(self, inode: Inode, view: View) -> int | None:
        size = inode.opened.size if inode.opened is not None else None
        return known_size(view.target) if size is None else size

    def stat(self, inode: Inode, view: View, size: int | None = None) -> Stat:
        """Without any waiting; an unknown size is shown as 0 for no time at all."""
        attr_timeout_s = timeout_s = self.timeout_s(inode)
        if size is None and (size := self._size_now(inode, view)) is None:
            attr_timeout_s, size = 0.0, 0
        elif is_mutable_file(view.target):  # or the kernel would cut a newer version to the size of an older one
            attr_timeout_s = 0.0
        uid, gid = edge.owner(view.metadata, self.defaults)
        mtime_ns, ctime_ns = self._times_ns(inode, view, size)
        return Stat(
            number=inode.number,
            mode=self.mode(inode, view),
            nlink=self._nlink(inode),
            uid=uid,
            gid=gid,
            size=size,
            atime_ns=inode.atime_ns if inode.atime_ns is not None else mtime_ns,
            mtime_ns=mtime_ns,
            ctime_ns=ctime_ns,
            entry_timeout_s=timeout_s,
            attr_timeout_s=attr_timeout_s,
        )

    def timeout_s(self, inode: Inode) -> float:
        """How long the kernel may believe what it was told about `inode` and its name."""
        folder = inode.link.parent.folder if inode.link else inode.folder
        return self.options.poll_s if folder is None else self.listing_timeout_s(folder)

    def mode(self, inode: Inode, view: View) -> int:
        """Type and permissions: those noted, less the write bits where no cap allows writing."""
        if inode.kind is Kind.UNKNOWN:
            return stat.S_IFREG
        if inode.kind is Kind.SYMLINK:
            return stat.S_IFLNK | 0o777
        bits = edge.permissions(view.metadata, self.defaults, directory=inode.kind is Kind.DIRECTORY)
        if not self.can_write(inode, view):
            bits &= ~edge.WRITE_BITS
        return int(inode.kind.value) | bits

    def _nlink(self, inode: Inode) -> int:
        if inode.folder is None:
            return 1 if inode.link else 0
        if inode.link is None and inode.number != ROOT_INODE:
            return 0
        return (
            2 + inode.folder.subdirectories() if inode.folder.loaded else 1
        )  # 1: not known, as other file systems say

    def _times_ns(self, inode: Inode, view: View, size: int) -> tuple[int, int]:
        mtime_ns, ctime_ns = edge.times_ns(view.metadata, None if is_mutable_file(view.target) else size)
        if inode.number == ROOT_INODE:
            mtime_ns, ctime_ns = mtime_ns or MOUNTED_NS, ctime_ns or MOUNTED_NS
        if inode.opened is not None and inode.opened.written_ns is not None:
            mtime_ns = inode.opened.written_ns
            ctime_ns = max(ctime_ns, mtime_ns)
        if inode.folder is not None and inode.folder.changed_ns > ctime_ns:
            mtime_ns = ctime_ns = inode.folder.changed_ns
        return mtime_ns, max(ctime_ns, inode.ctime_ns)

    # --- changing --------------------------------------------------------------------------------------------

    async def set_attributes(self, number: int, changes: Changes, caller: Caller) -> None:
        """All but the size (see `vfs_files`). Times of access are kept while the inode lives, and not stored."""
        inode = self.inode(number)
        view = self.view(inode)
        if inode.kind is Kind.UNKNOWN:
            raise FSError(errno.EACCES)
        own: dict[str, int] = {}
        if changes.uid is not None:
            own["uid"] = changes.uid
        if changes.gid is not None:
            own["gid"] = changes.gid
        if changes.mtime_ns is not None:
            own["mtime_ns"] = changes.mtime_ns
        if own or changes.mode is not None:
            # What has a write cap of its own, or will have: a new file in a mount with `mutable=`.
            keeps_write_cap = will_be_mutable(view.target) or inode.folder is not None or self.options.mutable != "none"

            def change(metadata: Metadata) -> Metadata:
                now_ns = time.time_ns()
                result = edge.changed(metadata, now_ns=now_ns, **own)
                if changes.mode is not None:
                    result = edge.with_mode(result, changes.mode, now_ns=now_ns, tell_others=not keeps_write_cap)
                return result

            await self.change_metadata(inode, change)
            if inode.opened is not None and changes.mtime_ns is not None and inode.draft is not None:
                inode.opened.written_ns = changes.mtime_ns
        if changes.atime_ns is not None:
            if self.read_only:
                raise self.refuse()
            inode.atime_ns, inode.ctime_ns = changes.atime_ns, time.time_ns()

    async def change_metadata(self, inode: Inode, change: Callable[[Metadata], Metadata]) -> None:
        """Change what is noted on the edge; with contents not stored yet it waits, and goes with them."""
        if inode.opened is not None:
            async with inode.opened.lock:  # not while the contents are being stored with the metadata of before
                position = await self._change_metadata(inode, change)
        else:
            position = await self._change_metadata(inode, change)
        if position is not None:
            await self.settle(position)

    async def _change_metadata(self, inode: Inode, change: Callable[[Metadata], Metadata]) -> Position | None:
        view = self.view(inode)
        link = inode.link
        if link is None or inode.draft is not None:
            if self.read_only:
                raise self.refuse()
            inode.draft = change(view.metadata)  # the root (it has no edge), unlinked files, files being written
            return None
        folder = link.parent.folder
        assert folder is not None
        self.require_change(folder)
        async with folder.lock:
            entry = folder.directory.get(link.name)
            if entry is None or inode.link is not link:
                raise FSError(errno.ESTALE)
            return await self.workspace.set_metadata(folder.directory, link.name, change(entry.metadata))

    # --- asking ----------------------------------------------------------------------------------------------

    async def access(self, number: int, mask: int, caller: Caller, groups: frozenset[int] = frozenset()) -> bool:
        """access(2), where the kernel does not judge by mode bits itself."""
        inode = self.inode(number)
        view = self.view(inode)
        if mask & os.W_OK and not self.can_write(inode, view):
            raise self.refuse()
        mode = self.mode(inode, view)
        if caller.uid == 0:
            return not mask & os.X_OK or bool(mode & 0o111) or inode.kind is Kind.DIRECTORY
        uid, gid = edge.owner(view.metadata, self.defaults)
        shift = 6 if caller.uid == uid else 3 if gid == caller.gid or gid in groups else 0
        return (mode >> shift) & mask == mask

    def statfs(self) -> FreeSpace:
        """From what servers said last; never asks them."""
        free_bytes = self.free_bytes() if self.free_bytes is not None else None
        blocks = (FREE_BYTES_UNKNOWN if free_bytes is None else max(free_bytes, 0)) // BLOCK_BYTES
        return FreeSpace(BLOCK_BYTES, blocks, blocks, INODES_FREE, NAME_BYTES_MAX)

    # --- extended attributes ---------------------------------------------------------------------------------

    async def getxattr(self, number: int, name: bytes, caller: Caller) -> bytes:
        if not xattrs.is_ours(name):
            return xattrs.get_users(self.view(self.inode(number)).metadata if xattrs.is_users(name) else {}, name)
        inode = self.inode(number)
        view = self.view(inode)
        trusted = caller.uid in (0, self.mounting_uid)
        writable = self.can_write(inode, view) and not edge.is_no_write(view.metadata)
        return xattrs.describe(view.target, name, show_caps=trusted, show_write_cap=writable)

    async def listxattr(self, number: int) -> list[bytes]:
        return [name.encode() for name in edge.xattrs(self.view(self.inode(number)).metadata)]

    async def setxattr(self, number: int, name: bytes, value: bytes) -> None:
        await self._change_xattrs(number, lambda values: xattrs.with_users(values, name, value))

    async def removexattr(self, number: int, name: bytes) -> None:
        await self._change_xattrs(number, lambda values: xattrs.without_users(values, name))

    async def _change_xattrs(self, number: int, change: Callable[[Mapping[str, bytes]], Mapping[str, bytes]]) -> None:
        inode = self.inode(number)
        if is_unreadable(inode.target):
            raise FSError(errno.EACCES)

        def changed(metadata: Metadata) -> Metadata:
            return edge.with_xattrs(metadata, change(edge.xattrs(metadata)), now_ns=time.time_ns())

        await self.change_metadata(inode, changed)
