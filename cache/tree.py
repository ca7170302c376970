"""The names of a mounted tree: directories with pending changes laid over what the grid has, and how names change.

Names refer to *targets*: a cap on the grid, a PendingFile on its way there, or a Directory (which may be new and have
no cap yet). Every operation on names is one call that first checks and waits (for a listing, for room), and then, in
one go without an await, takes a position in the journal and changes the view; from then on it is seen here, and the
committer brings it to the grid. So an operation is done whole or not at all, also when it is cancelled.

Who holds which lock over which await: `load` holds the directory's grid_lock while it reads the listing. Nothing else
here holds one; see `cache/committer.py` for the publishes.
"""

from __future__ import annotations

import json
import math
import time
from collections import deque
from typing import Any, Final, TypeAlias
from weakref import WeakValueDictionary

import trio
from cachetools import LRUCache, TTLCache

from cache.blocks import BlockCache
from cache.committer import Committer
from cache.connectivity import Connectivity
from cache.convergence import FileEncoding
from cache.directories import Change, Directory, Entry, Kind, Target, cap_of
from cache.disk_tier import DiskTier
from cache.journal import Journal
from cache.keeper import Keeper
from cache.kept import Kept
from cache.options import WorkspaceOptions
from cache.pending import PendingFile
from cache.prefetch import Prefetcher
from cache.spool import Spool
from grid.errors import (
    BadCapError,
    ChildExistsError,
    FormatError,
    NoSuchChildError,
    NotWriteableError,
    WrongKindError,
)
from grid.formats.caps import Cap, DirectoryCap, child_slots
from grid.formats.directory import normalize_name

Position: TypeAlias = int

JOURNAL_WAIT_S: Final = 20.0
LISTED_ENTRIES_MAX: Final = 50_000  # some 60 MB, over all directories that are kept listed though nobody holds them
SIZES_MAX: Final = 10_000  # mutable files whose size is remembered
ERRORS_MAX: Final = 50  # shown in status


class Tree:
    """All of a Workspace but files' contents. What it is made of is its heirs' too."""

    def __init__(
        self,
        nursery: trio.Nursery,
        client: Any,
        root: DirectoryCap,
        spool: Spool,
        journal: Journal,
        disk: DiskTier | None,
        options: WorkspaceOptions,
    ) -> None:
        k, happy, n = client.node.encoding
        self._nursery = nursery
        self._client = client
        self._spool = spool
        self._options = options
        self.encoding = FileEncoding(k, happy, n, client.node.convergence if options.convergent else None)
        self._disk = disk
        self._connectivity = Connectivity(client.broker, k)
        memory_bytes = min(options.memory_bytes, options.cache_bytes)
        self._blocks = BlockCache(nursery, memory_bytes, disk, self._connectivity)
        self._kept = Kept(client, disk, self._connectivity)
        self._prefetcher = Prefetcher(nursery, client, self._blocks)
        self._journal = journal
        self._table: WeakValueDictionary[Cap, Directory] = WeakValueDictionary()
        self._listed: LRUCache[Cap, Directory] = LRUCache(LISTED_ENTRIES_MAX, getsizeof=lambda d: 1 + len(d.base))
        self._sizes: TTLCache[bytes, int] = TTLCache(SIZES_MAX, options.poll_s, timer=trio.current_time)
        self._read_errors: deque[tuple[float, str, str]] = deque(maxlen=ERRORS_MAX)
        self._committer = Committer(nursery, client, spool, self._journal, self._table, options)
        self._drained = False
        self._replayed_upto = 0  # the last position of a process before this one
        nursery.start_soon(journal.run)
        nursery.start_soon(self._committer.run)
        nursery.start_soon(self._connectivity.run, self._committer.retry_now)
        if disk is not None:
            keeper = Keeper(disk, self._kept)
            self._committer.on_published = keeper.keep_directory
            self._committer.uploads.on_stored = keeper.note_file
            nursery.start_soon(keeper.run)
        self.root = self._table[root] = Directory(root, path="/")

    @property
    def readonly(self) -> bool:
        return self.root.readonly or self._options.read_only

    @property
    def offline(self) -> bool:
        """The grid does not answer: what is cached can be read, what is written waits, all else fails at once."""
        return self._connectivity.offline

    @property
    def durable(self) -> bool:
        """Does what was done survive the end of this process?"""
        return self._journal.durable

    @property
    def replaying(self) -> bool:
        """Is something on its way that a process before this one was told to do?"""
        return not self._journal.settled(self._replayed_upto)

    # --- directories

    def directory(self, target: Target) -> Directory:
        """The one Directory for this target. Raises WrongKindError for a file."""
        if isinstance(target, Directory):
            return target
        if not isinstance(target, DirectoryCap):
            raise WrongKindError("not a directory")
        directory = self._table.get(target)
        if directory is None:
            directory = self._table[target] = Directory(target)
        return directory

    async def load(self, directory: Directory, max_age_s: float | None = None) -> None:
        """Have a listing no older than `max_age_s` (None: any). Pending changes are laid over the newer one.

        Raises GridError when it cannot be had; an older listing stays in use. While the directory is being
        published its present listing is good enough, since the publish will bring the newest. When the grid has
        none for us, the one that was seen last is taken from the disk, and asked for again the next time.
        """
        if self._is_fresh(directory, max_age_s):
            return
        async with directory.grid_lock:
            cap = directory.cap
            if not isinstance(cap, DirectoryCap) or self._is_fresh(directory, max_age_s):
                return
            if directory.loaded:
                contents, fresh = await self._kept.ask_directory(cap, directory.version), True
            else:
                contents, fresh = await self._kept.read_directory(cap)
            loaded_at = trio.current_time() if fresh else -math.inf
            odd = directory.rebase(cap, contents.version, contents.entries, loaded_at)
            if fresh:  # an old listing says nothing about what others did
                self._committer.resolve(directory, odd)
        self._keep_listed(directory)

    def _is_fresh(self, directory: Directory, max_age_s: float | None) -> bool:
        if directory.loaded_at is None:
            return False
        if max_age_s is None or directory.immutable or directory.is_new or self._committer.is_publishing(directory):
            return True
        return trio.current_time() - directory.loaded_at <= max_age_s

    def _keep_listed(self, directory: Directory) -> None:
        if directory.cap is not None and len(directory.base) < LISTED_ENTRIES_MAX:
            self._listed.pop(directory.cap, None)  # its size may have changed
            self._listed[directory.cap] = directory

    async def make_directory(self, parent: Directory, name: str, metadata: dict[str, Any]) -> Directory:
        """A new, empty directory under a new name. Raises ChildExistsError."""
        name = await self._prepare(parent, name, metadata)
        if parent.get(name) is not None:
            raise ChildExistsError(name)
        made = Directory(None, path=_join(parent, name))
        self._link(parent, name, made, metadata, self._journal.begin())
        return made

    async def link(self, directory: Directory, name: str, target: Target, metadata: dict[str, Any]) -> Position:
        """Add the name, or replace what it refers to."""
        name = await self._prepare(directory, name, metadata)
        _check_target(target)
        position = self._journal.begin()
        self._link(directory, name, target, metadata, position)
        return position

    async def unlink(self, directory: Directory, name: str) -> Position:
        """Raises NoSuchChildError. Whether a directory may go is for the caller to know."""
        name = await self._prepare(directory, name)
        _existing(directory, name)
        position = self._journal.begin()
        self._unlink(directory, name, position)
        return position

    async def rename(
        self, src: Directory, src_name: str, dst: Directory, dst_name: str, metadata: dict[str, Any]
    ) -> Position:
        """Move; what had the new name is replaced. On the grid the new name comes before the old one goes."""
        src_name = await self._prepare(src, src_name)
        dst_name = await self._prepare(dst, dst_name, metadata)
        entry = _existing(src, src_name)
        if src is dst and src_name == dst_name:
            return self._journal.position
        position = self._journal.begin()
        moved = self._link(dst, dst_name, entry.target, metadata, _moved_position(src, src_name, position))
        self._unlink(src, src_name, position, moved)
        if isinstance(entry.target, Directory):
            entry.target.path = _join(dst, dst_name)
        return position

    async def exchange(self, a_dir: Directory, a_name: str, b_dir: Directory, b_name: str) -> Position:
        """Swap what two names refer to. Within one directory both change in one publish."""
        a_name = await self._prepare(a_dir, a_name)
        b_name = await self._prepare(b_dir, b_name)
        a, b = _existing(a_dir, a_name), _existing(b_dir, b_name)
        if a_dir is b_dir and a_name == b_name:
            return self._journal.position
        position = self._journal.begin()
        a_position = _moved_position(b_dir, b_name, position)
        b_position = _moved_position(a_dir, a_name, position)
        new_a, old_a = a_dir.put(a_name, b.target, b.metadata, a_position, time.time())
        new_b, old_b = b_dir.put(b_name, a.target, a.metadata, b_position, time.time())
        new_a.wait_for([new_b])
        new_b.wait_for([new_a])
        self._committer.enqueue(new_a)
        self._committer.enqueue(new_b)
        for old, new in ((old_a, new_b), (old_b, new_a)):
            if old is not None:
                self._committer.discard(old, moved_to=new if old.kind is Kind.LINK else None)
        return position

    async def set_metadata(self, directory: Directory, name: str, metadata: dict[str, Any]) -> Position:
        """The name's whole metadata but for Tahoe's own part. Raises NoSuchChildError."""
        name = await self._prepare(directory, name, metadata)
        _existing(directory, name)
        position = self._journal.begin()
        change, old = directory.describe(name, metadata, position, time.time())
        self._replace(change, old)
        return position

    # --- what the operations are made of; synchronous

    def _link(self, directory: Directory, name: str, target: Target, metadata: dict[str, Any], position: int) -> Change:
        change, old = directory.put(name, target, metadata, position, time.time())
        self._replace(change, old)
        return change

    def _unlink(self, directory: Directory, name: str, position: int, moved: Change | None = None) -> None:
        after = None if moved is None else {moved}
        change, old = directory.drop(name, position, time.time(), after=after)
        self._replace(change, old, moved)

    def _replace(self, change: Change | None, old: Change | None, moved: Change | None = None) -> None:
        if change is not None:
            self._committer.enqueue(change)
        if old is not None:
            self._committer.discard(old, moved_to=moved if old.kind is Kind.LINK else None)

    async def _prepare(self, directory: Directory, name: str, metadata: dict[str, Any] | None = None) -> str:
        """All that may wait or fail for want of something, before an operation begins. Returns the name in NFC."""
        self._check_open()
        if directory.readonly or directory.immutable:
            raise NotWriteableError("this directory cannot be changed with the cap that is mounted")
        name = normalize_name(name)
        _check_child(name, metadata)
        await self._journal.room(JOURNAL_WAIT_S)
        await self.load(directory)
        return name

    def _check_open(self) -> None:
        if self._drained or self._options.read_only:
            raise NotWriteableError("this mount is going away" if self._drained else "this mount is read-only")


def _existing(directory: Directory, name: str) -> Entry:
    entry = directory.get(name)
    if entry is None:
        raise NoSuchChildError(name)
    return entry


def _moved_position(directory: Directory, name: str, position: int) -> int:
    """Of a link to what `name` refers to now, elsewhere: who waits for the pending one waits for the new one."""
    old = directory.changes.get(name)
    return min(position, old.position) if old is not None and old.kind is Kind.LINK else position


def _check_child(name: str, metadata: dict[str, Any] | None) -> None:
    """One child that cannot be stored would keep all others of its directory from being stored."""
    try:
        name.encode("utf-8")
        json.dumps(metadata)
    except UnicodeEncodeError:
        raise FormatError("a name that is not Unicode cannot be stored") from None
    except (TypeError, ValueError, RecursionError):
        raise FormatError("metadata that is not JSON cannot be stored") from None
    if not name:
        raise FormatError("a child needs a name")


def _check_target(target: Target) -> None:
    if isinstance(target, PendingFile) and target.cap is None and target.sealed is None:
        raise NoSuchChildError(target.name)
    cap = cap_of(target)
    if cap is not None:
        try:
            child_slots(cap, deep_immutable=False)
        except FormatError as error:
            raise BadCapError("this cap cannot be a child of a directory") from error


def _join(directory: Directory, name: str) -> str | None:
    return None if directory.path is None else f"{directory.path.rstrip('/')}/{name}"
