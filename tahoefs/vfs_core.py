"""What all parts of the VFS stand on: names, listings, what an inode is right now, and who may change what.

    vfs_core ← vfs_attributes ← vfs_files ← vfs_names ← vfs (directories, and the whole)

Listings are refreshed on the way: a lookup, an opendir, … in a directory other clients may change asks the workspace
for one no older than `poll` seconds. Does a fetch fail or take too long, an older listing answers, if there is one.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import unicodedata
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import trio
from attrs import define, frozen

from grid.errors import GridError, GridUnreachableError
from tahoefs import metadata as edge
from tahoefs.errnos import FSError
from tahoefs.inodes import Folder, Inode, InodeTable
from tahoefs.interfaces import IEntry, IWorkspace, Metadata, Position, Target, VFSOptions
from tahoefs.neighbours import Neighbours
from tahoefs.open_files import DirectoryHandle, Handle
from tahoefs.targets import Kind, is_directory, is_mutable_file, is_unreadable, kind_of, same_contents

log = logging.getLogger(__name__)

NAME_BYTES_MAX: Final = 255
REFRESH_PATIENCE_S: Final = 4.0  # then a listing we have answers, even if it is older than `poll`
REFRESH_PAUSE_S: Final = 15.0  # and goes on answering without asking, or every call would wait so long
FIRST_LOAD_TIMEOUT_S: Final = 9.0  # without any listing; inside the deadline of a metadata request
GRID_WAIT_TIMEOUT_S: Final = 600.0  # `durability=grid`: one call's wait until it is on the grid
FOREVER_S: Final = 3600.0  # how long the kernel may keep what cannot change
BELIEF_S_MIN: Final = 0.5  # …, and what can, though our listing is nearly as old as `poll`
INVALIDATIONS_MAX: Final = 1024  # waiting to be told to the kernel; beyond that its own timeouts must do


@frozen
class Invalidation:
    """What the kernel may have cached is no longer so: an inode's bytes and attributes, or (with `name`) an entry."""

    number: int
    name: bytes | None = None


@define
class View:
    """What an inode is now: what it refers to, with which metadata."""

    target: Target
    metadata: Metadata


Moved = Callable[[Sequence[tuple[str, str]]], Awaitable[None]]  # directories were renamed: (old path, new path)


async def nobody_minds(moves: Sequence[tuple[str, str]]) -> None:
    pass


class VFSCore:
    """State shared by all operations. Numbers come from the kernel: one that is unknown is answered ESTALE."""

    def __init__(
        self,
        workspace: IWorkspace,
        *,
        options: VFSOptions,
        free_bytes: Callable[[], int | None] | None = None,
    ) -> None:
        """`free_bytes`: what the storage servers have left for us, by what they last said; must not block."""
        self.workspace = workspace
        self.options = options
        self.table = InodeTable(workspace.root)
        self.defaults = edge.Defaults(
            uid=os.getuid() if options.uid is None else options.uid,
            gid=os.getgid() if options.gid is None else options.gid,
            umask=_process_umask() if options.umask is None else options.umask,
        )
        self.mounting_uid = os.getuid()
        self.read_only = options.read_only or workspace.readonly
        self.free_bytes = free_bytes
        self.neighbours = Neighbours()
        self.on_moved: Callable[[Sequence[tuple[str, str]]], Awaitable[None]] = (
            nobody_minds  # told of directories that were renamed: (old, new) paths
        )
        self.faults = 0  # calls that ended in an exception that was a bug
        self.timeouts = 0  # calls that missed their deadline
        self.handles: dict[int, Handle | DirectoryHandle] = {}
        self.handle_numbers = itertools.count(1)
        self._tell, self.invalidations = trio.open_memory_channel[Invalidation](INVALIDATIONS_MAX)

    # --- names and numbers -----------------------------------------------------------------------------------

    def inode(self, number: int) -> Inode:
        inode = self.table.find(number)
        if inode is None:
            raise FSError(errno.ESTALE)
        return inode

    def folder_inode(self, number: int) -> tuple[Inode, Folder]:
        inode = self.inode(number)
        if inode.folder is None:
            raise FSError(errno.ENOTDIR)
        return inode, inode.folder

    def name_of(self, raw: bytes, *, creating: bool = False) -> str:
        """A name as directories hold it: NFC. ENAMETOOLONG over 255 bytes; not UTF-8: ENOENT, EILSEQ for a new one."""
        if len(raw) > NAME_BYTES_MAX:
            raise FSError(errno.ENAMETOOLONG)
        try:
            name = unicodedata.normalize("NFC", raw.decode())
        except UnicodeDecodeError:
            raise FSError(errno.EILSEQ if creating else errno.ENOENT) from None
        if len(name.encode()) > NAME_BYTES_MAX:
            raise FSError(errno.ENAMETOOLONG)
        return name

    def path_of(self, inode: Inode) -> str:
        """Where it is in the mount, for messages."""
        line = inode.ancestors()[::-1]
        if line[0] is not self.table.root:
            return "(deleted)"
        return "/" + "/".join(each.link.name for each in line if each.link is not None)

    # --- listings --------------------------------------------------------------------------------------------

    async def load(self, inode: Inode, folder: Folder) -> None:
        """Have a listing of `folder` no older than `poll`, or the best there is. Raises GridError, TooSlowError."""
        directory = folder.directory
        if directory.cap is None:
            folder.loaded = True  # made by us and never published: nobody else can know more
        elif not folder.loaded:
            with trio.fail_after(FIRST_LOAD_TIMEOUT_S):
                await self.workspace.load(directory, None)
            folder.loaded = True
        elif not directory.immutable and trio.current_time() >= folder.refresh_at:
            generation = directory.generation
            with trio.move_on_after(REFRESH_PATIENCE_S) as patience:
                try:
                    await self.workspace.load(directory, self.options.poll_s)
                except GridError as error:
                    log.info("listing not refreshed, an older one is used: %s", error)
                    if not isinstance(error, GridUnreachableError):  # offline: that costs no time, and ends any moment
                        folder.refresh_at = trio.current_time() + REFRESH_PAUSE_S
            if patience.cancelled_caught:
                folder.refresh_at = trio.current_time() + REFRESH_PAUSE_S
                log.info("listing not refreshed within %g s, an older one is used", REFRESH_PATIENCE_S)
            if directory.generation != generation:
                folder.notice_foreign_change()
                self._tell_changes(inode, folder)

    def _tell_changes(self, parent: Inode, folder: Folder) -> None:
        """The listing changed under us: let the kernel drop what it keeps of entries that are others now."""
        for name, inode in list(parent.children.items()):
            if inode.is_nascent:
                continue
            entry = folder.directory.get(name)
            if entry is None:
                self.tell(Invalidation(parent.number, name.encode()))
            elif inode.opened is None and inode.folder is None and not same_contents(inode.target, entry.target):
                self.tell(Invalidation(inode.number))

    def listing_timeout_s(self, folder: Folder) -> float:
        """How long the kernel may believe an answer from this listing: until the listing is `poll` seconds old."""
        directory = folder.directory
        if directory.immutable:
            return FOREVER_S
        if directory.cap is None or directory.loaded_at is None:  # made here: nobody else knows it yet
            return self.options.poll_s
        age_s = trio.current_time() - directory.loaded_at
        return max(self.options.poll_s - age_s, min(self.options.poll_s, BELIEF_S_MIN))

    def tell(self, invalidation: Invalidation) -> None:
        try:
            self._tell.send_nowait(invalidation)
        except (trio.WouldBlock, trio.BrokenResourceError, trio.ClosedResourceError):
            log.debug("invalidation dropped")

    def is_shown(self, name: str) -> bool:
        """Can a local program hold this name? Others of the grid's names are left out of listings."""
        return name not in ("", ".", "..") and "/" not in name and "\0" not in name and _fits(name)

    # --- what an inode is now --------------------------------------------------------------------------------

    def child(self, parent: Inode, folder: Folder, name: str) -> Inode | None:
        """The inode behind a name of a loaded folder, made if need be; None when there is no such name.

        When another client replaced a file that is open here, the open one keeps its contents, as after a
        rename over it, and the name gets a new inode. What is written to it is stored beside that.
        """
        if (nascent := folder.nascent.get(name)) is not None:
            return nascent
        known = parent.children.get(name)
        entry = folder.directory.get(name) if self.is_shown(name) else None
        if entry is None:
            if known is not None:
                self._lose(known)
            return None
        if known is not None:
            if self._is_still(known, entry):
                return known
            self._lose(known)
        kind = kind_of(entry.target, entry.metadata)
        return self.table.add(
            parent,
            name,
            kind,
            entry.target,
            entry.metadata,
            self._folder_behind(entry.target) if kind is Kind.DIRECTORY else None,
        )

    def _lose(self, inode: Inode) -> None:
        """Another client removed or replaced what this inode was."""
        if inode.opened is not None and inode.opened.writers:
            inode.lost = inode.link
        self.table.unlink(inode)

    def _folder_behind(self, target: Target) -> Folder:
        return self.table.folder_of(self.workspace.directory(target))

    def _is_still(self, inode: Inode, entry: IEntry) -> bool:
        """Is `entry` what `inode` is? Takes the entry's news over if so."""
        if inode.folder is not None:
            if not is_directory(entry.target) or self._folder_behind(entry.target) is not inode.folder:
                return False
        elif inode.kind is not kind_of(entry.target, entry.metadata):
            return False
        elif inode.opened is not None:
            if not (inode.opened.dirty or same_contents(inode.target, entry.target)):
                return False
            inode.metadata = entry.metadata
            return True
        inode.target, inode.metadata = entry.target, entry.metadata
        return True

    def view(self, inode: Inode) -> View:
        """Raises ESTALE when another client removed or replaced what this inode was (the kernel then looks again)."""
        link = inode.link
        if link is not None and inode.draft is None:
            folder = link.parent.folder
            entry = folder.directory.get(link.name) if folder is not None and folder.loaded else None
            if entry is None or not self._is_still(inode, entry):
                opened = inode.opened is not None
                self._lose(inode)
                if not opened:
                    raise FSError(errno.ESTALE)
        return View(inode.target, inode.metadata if inode.draft is None else inode.draft)

    # --- who may change what ---------------------------------------------------------------------------------

    def refuse(self) -> FSError:
        return FSError(errno.EROFS if self.read_only else errno.EACCES)

    def can_change(self, folder: Folder) -> bool:
        """May names and metadata in this directory be changed, by what its cap allows?"""
        return not (self.read_only or folder.directory.readonly or folder.directory.immutable)

    def can_write(self, inode: Inode, view: View) -> bool:
        """May the contents be changed, by what caps allow: in place, or by a new file under the name?"""
        if inode.folder is not None:
            return self.can_change(inode.folder)
        if self.read_only or is_unreadable(view.target):
            return False
        if is_mutable_file(view.target):
            return not view.target.is_readonly
        folder = inode.link.parent.folder if inode.link else None
        return folder is None or self.can_change(folder)

    def require_change(self, folder: Folder) -> None:
        if not self.can_change(folder):
            raise self.refuse()

    async def settle(self, position: Position | None, *, flush: bool = False) -> None:
        """Return once what was done is in the journal (`flush`: and on the disk). Called without any lock.

        With `durability=grid`: once `position` is on the grid.
        """
        await self.workspace.persist(flush=flush)
        if self.options.durability == "grid":
            with trio.fail_after(GRID_WAIT_TIMEOUT_S):
                await self.workspace.wait(position)

    # --- handles ---------------------------------------------------------------------------------------------

    def add_handle(self, handle: Handle | DirectoryHandle) -> int:
        number = next(self.handle_numbers)  # given once only: a late request never meets another's handle
        self.handles[number] = handle
        return number

    def file_handle(self, number: int) -> Handle:
        handle = self.handles.get(number)
        if not isinstance(handle, Handle):
            raise FSError(errno.EBADF)
        return handle

    def directory_handle(self, number: int) -> DirectoryHandle:
        handle = self.handles.get(number)
        if not isinstance(handle, DirectoryHandle):
            raise FSError(errno.EBADF)
        return handle


def _fits(name: str) -> bool:
    if len(name) * 4 <= NAME_BYTES_MAX:
        return True
    return len(name.encode(errors="surrogatepass")) <= NAME_BYTES_MAX


def _process_umask() -> int:
    umask = os.umask(0o077)
    os.umask(umask)
    return umask
