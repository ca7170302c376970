"""Inodes: what the kernel holds by number, kept apart from the names that lead to them.

    InodeTable ─ number → Inode ─ link → (parent Inode, name)      None once unlinked
                            ├─ folder   → Folder → the workspace's Directory     for directories
                            └─ opened   → OpenFile                               for files while open

An inode's number is a hash of its first parent and name (the next free one if taken), so that it is mostly the same
after the kernel forgot it and after the next mount; programs that keep numbers (git, tar, rsync) then do not see every
file as changed. A rename changes the link and keeps the number.

One grid directory can be reached by several paths: each path has inodes of its own (the kernel allows a directory only
one place in its tree), but they share one Folder, which holds what belongs to the directory itself.

Who frees: an inode goes when the kernel forgot it, nothing holds it open and no inode below it is left.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final
from weakref import WeakValueDictionary

import trio
from attrs import define, field, frozen

from tahoefs.interfaces import IDirectory, Metadata, Target
from tahoefs.targets import Kind, is_directory

if TYPE_CHECKING:
    from tahoefs.open_files import OpenFile

ROOT_INODE: Final = 1
FIRST_INODE: Final = 2
NUMBER_MASK: Final = (1 << 63) - 1


@define(eq=False, weakref_slot=True)
class Folder:
    """One directory of the grid, however many paths lead to it.

    `lock` is held over every change of the directory's names, from the check to the workspace's answer, so that a file
    being stored at close cannot come back after a concurrent unlink. Order: an OpenFile's lock, then folder locks by
    ascending `rank`.
    """

    directory: IDirectory
    rank: int
    loaded: bool = False
    nascent: dict[str, Inode] = field(factory=dict)  # files created but not stored yet: names the workspace lacks
    refresh_at: float = 0.0  # trio's clock: the grid did not answer, so the listing there is will do until then
    changed_ns: int = 0  # when a name here last changed, as far as this mount knows
    lock: trio.Lock = field(factory=trio.Lock)
    _scanned: int | None = None  # the directory's generation for which the next two hold
    _subdirectories: int = 0
    _names: set[str] = field(factory=set)

    def subdirectories(self) -> int:
        self._scan()
        return self._subdirectories

    @contextmanager
    def being_changed(self, *, added: str | None = None, removed: str | None = None, more: int = 0) -> Iterator[None]:
        """Around the workspace's call for one change of ours: names come and go, `more` subdirectories (or fewer).

        Keeps the counts true without going through all entries again. Does not note the time.
        """
        known = self._scanned == self.directory.generation
        yield
        if known:
            self._subdirectories += more
            self._names.discard(removed or "")
            self._names.update([added] if added is not None else [])
            self._scanned = self.directory.generation

    def notice_foreign_change(self) -> None:
        """After a load: if names came or went that we did not change, the directory changed just now."""
        before = self._names if self._scanned is not None else None
        self._scan()
        if before is not None and before != self._names:
            self.changed_ns = time.time_ns()

    def _scan(self) -> None:
        if self._scanned == self.directory.generation:
            return
        entries = self.directory.entries()
        self._scanned = self.directory.generation
        self._names = set(entries)
        self._subdirectories = sum(is_directory(entry.target) for entry in entries.values())

    def is_empty(self) -> bool:
        return not self.nascent and not self.directory.entries()


@frozen
class Link:
    parent: Inode
    name: str


@define(eq=False)
class Inode:
    """One thing the kernel knows. `target` and `metadata` are as last seen; all that is left once unlinked."""

    number: int
    kind: Kind
    target: Target
    metadata: Metadata
    link: Link | None = None
    lost: Link | None = None  # the name another client took away while somebody here had the file open for writing
    folder: Folder | None = None
    lookups: int = 0  # references the kernel holds
    children: dict[str, Inode] = field(factory=dict)  # the inodes linked below, by name
    opened: OpenFile | None = None
    draft: Metadata | None = None  # metadata that goes with contents not stored yet
    atime_ns: int | None = None  # kept while the inode lives, never stored
    ctime_ns: int = 0  # of the last change that is not stored itself, the same
    cached: Target = None  # what the kernel's page cache may hold bytes of

    @property
    def is_nascent(self) -> bool:
        """Created, and not stored yet: only this mount knows of it."""
        link = self.link
        folder = link.parent.folder if link else None
        return link is not None and folder is not None and folder.nascent.get(link.name) is self

    def ancestors(self) -> list[Inode]:
        """This inode, its parent, …, the root (or the last one still linked)."""
        line = [self]
        while (link := line[-1].link) is not None:
            line.append(link.parent)
        return line


def usual_number(parent_number: int, name: str) -> int:
    """The number of the inode first linked there, unless another one had it already."""
    digest = hashlib.blake2b(b"%d/" % parent_number + name.encode(errors="surrogatepass"), digest_size=8).digest()
    return max(int.from_bytes(digest, "big") & NUMBER_MASK, FIRST_INODE)


class InodeTable:
    def __init__(self, root: IDirectory) -> None:
        self._folders: WeakValueDictionary[int, Folder] = WeakValueDictionary()
        self._folders_made = 0
        self.root = Inode(ROOT_INODE, Kind.DIRECTORY, root, {}, folder=self.folder_of(root), lookups=1, draft={})
        self._by_number: dict[int, Inode] = {ROOT_INODE: self.root}

    def __len__(self) -> int:
        return len(self._by_number)

    def find(self, number: int) -> Inode | None:
        return self._by_number.get(number)

    def folder_of(self, directory: IDirectory) -> Folder:
        """The one Folder of a directory. (It keeps the directory alive, so the id stays its own.)"""
        folder = self._folders.get(id(directory))
        if folder is None:
            self._folders_made += 1
            folder = self._folders[id(directory)] = Folder(directory, self._folders_made)
        return folder

    def add(
        self, parent: Inode, name: str, kind: Kind, target: Target, metadata: Metadata, folder: Folder | None = None
    ) -> Inode:
        """A new inode linked at (parent, name); what was linked there is unlinked."""
        number = usual_number(parent.number, name)
        while number in self._by_number:
            number = max((number + 1) & NUMBER_MASK, FIRST_INODE)
        inode = self._by_number[number] = Inode(number, kind, target, metadata, folder=folder)
        self.link(inode, parent, name)
        return inode

    def link(self, inode: Inode, parent: Inode, name: str) -> None:
        """Give `inode` this name, and this one only."""
        if (other := parent.children.get(name)) is not None and other is not inode:
            self.unlink(other)
        before = inode.link.parent if inode.link else None
        self._take_from_parent(inode)
        inode.link = Link(parent, name)
        parent.children[name] = inode
        if before is not None:
            self.drop_if_unused(before)

    def detach(self, inode: Inode) -> None:
        """Take the name away from an inode that gets another one at once."""
        self._take_from_parent(inode)

    def unlink(self, inode: Inode) -> None:
        """`inode` has no name any more. It lives on while the kernel or an open file holds it."""
        parent = inode.link.parent if inode.link else None
        self._take_from_parent(inode)
        self.drop_if_unused(inode)
        if parent is not None:
            self.drop_if_unused(parent)

    def forget(self, number: int, count: int) -> None:
        inode = self._by_number.get(number)
        if inode is not None and inode is not self.root:
            inode.lookups = max(0, inode.lookups - count)
            self.drop_if_unused(inode)

    def drop_if_unused(self, inode: Inode) -> None:
        """Free `inode`, and above it every directory that was only kept for what is below."""
        current: Inode | None = inode
        while current is not None and current is not self.root:
            if current.lookups or current.opened is not None or current.children:
                return
            parent = current.link.parent if current.link else None
            self._by_number.pop(current.number, None)
            self._take_from_parent(current)
            current = parent

    def _take_from_parent(self, inode: Inode) -> None:
        link, inode.link = inode.link, None
        if link is None:
            return
        if link.parent.children.get(link.name) is inode:
            del link.parent.children[link.name]
        nascent = link.parent.folder.nascent if link.parent.folder else {}
        if nascent.get(link.name) is inode:
            del nascent[link.name]
