"""Names that commands make: an existing cap under a new name, and clones. Over a VFS, with a folder in front or not.

    link    the name refers to the very same thing; what is mutable is shared
    clone   the name stays as it is, whatever becomes of the original:
                immutable files, also those on their way     the same target, at no cost
                mutable files, also those on their way       their contents now, as a new file
                directories                                  new ones, with clones of all that is in them
            converted, where that is asked for: files become mutable ones of one format, or mutable ones immutable;
            what is special (symbolic links) stays as it is

A clone of a tree is looked through as a whole before anything is made, and taken away again when it fails half-way.
Changes of names are made under the folders' locks, as those that come from the kernel, and the kernel is told.
"""

from __future__ import annotations

import errno
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any, Final

import trio
from attrs import evolve, frozen

from grid.errors import GridError, NoSuchChildError, WrongKindError
from grid.formats.caps import Cap, UnknownCap
from tahoefs import metadata as edge
from tahoefs.errnos import FSError
from tahoefs.inodes import Folder
from tahoefs.interfaces import IDirectory, IWritableContents, Target
from tahoefs.open_files import Handle
from tahoefs.targets import Kind, is_directory, kind_of, will_be_mutable
from tahoefs.vfs import VFS
from tahoefs.vfs_core import REFRESH_PATIENCE_S, Invalidation

CLONE_NAMES_MAX: Final = 100_000  # in one clone; held in memory while it is made
COPY_BYTES: Final = 1 << 20  # of a mutable file, at a time
TELL_NAMES: Final = 100  # made between two words about it
UNDO_TIMEOUT_S: Final = 10.0

Path = Sequence[str]  # names from the root of the tree on
Tell = Callable[[dict[str, Any]], Awaitable[None]]
Make = Callable[[IDirectory, str], Awaitable[Target]]


async def tell_nobody(state: dict[str, Any]) -> None:
    pass


@frozen
class Found:
    """What stands somewhere: with the metadata of its name, and that name, if it was found by one."""

    target: Target
    metadata: Mapping[str, Any]
    name: str | None


@frozen
class _Original:
    """One name of a tree that is to be cloned."""

    path: tuple[str, ...]  # below the clone; () for the clone itself
    target: Target
    metadata: Mapping[str, Any]
    directory: IDirectory | None = None  # the one it was found in

    def now(self) -> _Original | None:
        """What stands there by now: an unsent file that was replaced or removed since cannot be had any more."""
        entry = self.directory.get(self.path[-1]) if self.directory is not None else None
        return None if entry is None else evolve(self, target=entry.target, metadata=entry.metadata)


class Linking:
    """For one tree."""

    def __init__(self, vfs: VFS) -> None:
        self._vfs = vfs
        self._workspace = vfs.workspace

    # --- finding

    async def find(self, path: Path) -> Found:
        """What stands at `path` in the tree; open files are stored first. Raises NoSuchChildError, WrongKindError."""
        for handle in list(self._vfs.handles.values()):
            if isinstance(handle, Handle) and handle.opened.dirty and self._is_at_or_below(handle, path):
                await self._vfs.store(handle.opened.inode)
        return await self._follow(self._workspace.root, path)

    async def find_below(self, cap: Cap, path: Path) -> Found:
        """The same from any cap of this grid on."""
        if cap.is_verifier:
            raise WrongKindError("a verify cap reads nothing, so it cannot stand in a directory")
        return await self._follow(cap, path)

    async def _follow(self, target: Target, path: Path) -> Found:
        found = Found(target, {}, None)
        for part in path:
            directory = self._directory(found.target)
            await self._load(directory)
            name = self._name(part)
            entry = directory.get(name)
            if entry is None:
                raise NoSuchChildError(name)
            found = Found(entry.target, entry.metadata, name)
        return found

    async def _load(self, directory: IDirectory) -> None:
        """Have a listing no older than `poll`, or the best there is. Raises GridError when there is none."""
        await self._workspace.load(directory, None)
        with trio.move_on_after(REFRESH_PATIENCE_S), suppress(GridError):
            await self._workspace.load(directory, self._vfs.options.poll_s)

    def _directory(self, target: Target) -> IDirectory:
        if not is_directory(target):
            raise WrongKindError("a part of the path is not a directory")
        return self._workspace.directory(target)

    def _name(self, part: str, *, creating: bool = False) -> str:
        return self._vfs.name_of(part.encode(errors="surrogateescape"), creating=creating)

    def _is_at_or_below(self, handle: Handle, path: Path) -> bool:
        line = handle.opened.inode.ancestors()[::-1]
        names = [inode.link.name for inode in line if inode.link is not None]
        return line[0] is self._vfs.table.root and names[: len(path)] == [self._name(part) for part in path]

    # --- making names

    async def link(self, found: Found, path: Path) -> None:
        """`path` is the new name; or a directory, to have it there under the name it was found by.

        Raises FSError for what a file system would refuse, GridError.
        """
        path, directory = await self._place(found, path)
        await self._add(path, directory, partial(self._link, found.target, found.metadata))
        await self._vfs.settle(None)

    async def clone(self, found: Found, path: Path, tell: Tell = tell_nobody, *, mutable: str | None = None) -> int:
        """The same with a clone; `tell` hears how far it is. Returns how many names were made.

        `mutable`: what its files are to be, "sdmf", "mdmf" or "none" (immutable); None: immutable ones stay so, of
        others new ones are made as a program would. Raises FileTooLargeError too.
        """
        path, directory = await self._place(found, path)
        top, *rest = await self._survey(found, directory)
        async with self._maker(top, mutable) as make:
            made = await self._add(path, directory, make)
        try:
            await self._fill(made, rest, tell, mutable)
        except BaseException:
            await self._undo(path, directory, made)
            raise
        await self._vfs.settle(None)
        return 1 + len(rest)

    async def _place(self, found: Found, path: Path) -> tuple[tuple[str, ...], IDirectory]:
        """(the new name's whole path, the directory it comes into). Raises FSError(EEXIST, ENAMETOOLONG, …)."""
        try:
            there = await self._follow(self._workspace.root, path)
        except NoSuchChildError:
            parent = await self._follow(self._workspace.root, path[:-1])  # raises if it is this that is missing
            return tuple(path), self._directory(parent.target)
        if not is_directory(there.target):
            raise FSError(errno.EEXIST)
        if found.name is None:
            raise FSError(errno.EISDIR)
        return (*path, found.name), self._directory(there.target)

    async def _add(self, path: tuple[str, ...], directory: IDirectory, make: Make) -> Target:
        """Add one name as a program would, by `make`; returns what it refers to."""
        vfs, folder = self._vfs, self._vfs.table.folder_of(directory)
        name = self._name(path[-1], creating=True)
        await self._load(directory)
        async with folder.lock:
            vfs.require_change(folder)
            if not vfs.is_shown(name):
                raise FSError(errno.EINVAL)
            if name in folder.nascent or directory.get(name) is not None:
                raise FSError(errno.EEXIST)
            folder.changed_ns = time.time_ns()
            made = await make(directory, name)
        self._tell_kernel(path, folder)
        return made

    async def _link(self, target: Target, metadata: Mapping[str, Any], directory: IDirectory, name: str) -> Target:
        await self._workspace.link(directory, name, target, edge.changed(metadata, now_ns=time.time_ns()))
        return target

    def _tell_kernel(self, path: tuple[str, ...], folder: Folder) -> None:
        """It may have noted that there is no such name."""
        inode = self._vfs.table.root
        for part in path[:-1]:
            child = inode.children.get(self._name(part))
            if child is None:
                return  # it never looked there
            inode = child
        if inode.folder is folder:
            self._vfs.tell(Invalidation(inode.number, self._name(path[-1]).encode()))

    # --- cloning

    async def _survey(self, found: Found, destination: IDirectory) -> list[_Original]:
        """Everything there is to clone, each directory before what is in it."""
        originals = [_Original((), found.target, found.metadata)]
        todo: list[tuple[_Original, tuple[IDirectory, ...]]] = [(originals[0], ())]
        while todo:
            original, above = todo.pop()
            if isinstance(original.target, UnknownCap) and original.target.is_mutable:
                raise WrongKindError(f"{'/'.join(original.path) or 'this'} is of an unknown kind and may change")
            if not is_directory(original.target):
                continue
            directory = self._directory(original.target)
            if directory in above:
                raise FSError(errno.ELOOP)
            if directory is destination:
                raise FSError(errno.EINVAL)  # it would be cloned into itself
            await self._load(directory)
            below = [
                _Original((*original.path, name), entry.target, entry.metadata, directory)
                for name, entry in directory.entries().items()
            ]
            originals += below
            todo += [(each, (*above, directory)) for each in below]
            if len(originals) > CLONE_NAMES_MAX:
                raise FSError(errno.E2BIG)
        return originals

    async def _fill(self, made: Target, originals: Sequence[_Original], tell: Tell, mutable: str | None) -> None:
        directories: dict[tuple[str, ...], Any] = {(): made}
        for number, original in enumerate(originals):
            if number % TELL_NAMES == 0:
                await tell({"done": number, "names": len(originals)})
            directory = directories[original.path[:-1]]
            try:
                target = await self._make_in(directory, original, mutable)
            except NoSuchChildError:
                if (latest := original.now()) is None:
                    continue
                if is_directory(latest.target):
                    raise
                target = await self._make_in(directory, latest, mutable)
            if is_directory(original.target):
                directories[original.path] = target
            await trio.lowlevel.checkpoint()  # others want to go on meanwhile

    async def _make_in(self, directory: IDirectory, original: _Original, mutable: str | None) -> Target:
        async with self._maker(original, mutable) as make:
            return await make(directory, original.path[-1])

    @asynccontextmanager
    async def _maker(self, original: _Original, mutable: str | None) -> AsyncIterator[Make]:
        """What makes a name for a clone of `original`; all that takes long about it is done before."""
        becomes_mutable = mutable not in (None, "none")
        if is_directory(original.target):
            metadata = edge.changed(original.metadata, now_ns=time.time_ns())

            async def make_directory(directory: IDirectory, name: str) -> Target:
                return await self._workspace.make_directory(directory, name, metadata)

            yield make_directory
        elif will_be_mutable(original.target) or (
            becomes_mutable and kind_of(original.target, original.metadata) is Kind.FILE
        ):
            copied = await self._copy(original.target)
            now_ns = time.time_ns()
            if becomes_mutable:
                metadata = edge.for_mutable_file(original.metadata, self._vfs.defaults, now_ns=now_ns)
            else:
                metadata = edge.changed(original.metadata, now_ns=now_ns, size=copied.size)

            async def store(directory: IDirectory, name: str) -> Target:
                stored = await self._workspace.store(directory, name, copied, metadata, over=None, mutable=mutable)
                return stored[1]

            try:
                yield store
            finally:
                copied.close()
        else:
            yield partial(self._link, original.target, original.metadata)

    async def _copy(self, target: Target) -> IWritableContents:
        if not will_be_mutable(target):
            return await self._workspace.new_contents(target)  # never changes: it is fetched when the copy is sent
        contents = await self._workspace.open_contents(target)
        try:
            copied = await self._workspace.new_contents()
            try:
                for offset in range(0, contents.size, COPY_BYTES):
                    await copied.write(offset, await contents.read(offset, COPY_BYTES))
            except BaseException:
                copied.close()
                raise
            return copied
        finally:
            contents.close()

    async def _undo(self, path: tuple[str, ...], directory: IDirectory, made: Target) -> None:
        """Take a clone away that was not finished, unless something else stands there by now."""
        folder, name = self._vfs.table.folder_of(directory), self._name(path[-1])
        with trio.move_on_after(UNDO_TIMEOUT_S, shield=True), suppress(GridError):
            async with folder.lock:
                entry = directory.get(name)
                if entry is not None and is_directory(entry.target) and self._directory(entry.target) is made:
                    await self._workspace.unlink(directory, name)
            self._tell_kernel(path, folder)
