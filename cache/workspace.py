"""The workspace: one mounted tree as its users see it, and the only thing of this package the mount talks to.

Names refer to *targets*: a cap on the grid, a PendingFile on its way there, or a Directory (which may be new and have
no cap yet). Every operation on names is one call that first checks and waits (for a listing, for room), and then, in
one go without an await, takes a position in the journal and changes the view; from then on it is seen here, and the
committer brings it to the grid. So an operation is done whole or not at all, also when it is cancelled.

    read    open_contents ─► spool (what was just written) | blocks ─► the grid
    write   new_contents ─► store ─► directories (pending changes) + committer ─► the grid

What is not on the grid yet survives a kill in the journal on the local disk: an operation is there from `persist` on
(`cache/journal.py`); `cache/opening.py` finds it there again.

Who holds which lock over which await: `load` holds the directory's grid_lock while it reads the listing. Nothing else
here holds one; see `cache/committer.py` for the publishes.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections import deque
from collections.abc import Iterable
from typing import Any, Final, TypeAlias
from weakref import WeakValueDictionary

import trio
from cachetools import LRUCache, TTLCache

from cache.blocks import BlockCache
from cache.committer import Committer
from cache.connectivity import Connectivity
from cache.contents import FileTooLargeError, WritableContents
from cache.convergence import FileEncoding
from cache.directories import Change, Directory, Entry, Kind, Target, cap_of
from cache.disk_tier import DiskTier
from cache.journal import Journal
from cache.keeper import Keeper
from cache.kept import Kept
from cache.layers import BytesContents, Contents, LiveContents
from cache.options import WorkspaceOptions
from cache.pending import PendingFile, Replacement
from cache.prefetch import Prefetcher, is_small
from cache.replay import Restored
from cache.sealed import SealedFile
from cache.snapshots import SnapshotContents
from cache.spool import Spool
from cache.uploads import mutable_bytes_max
from grid.errors import (
    BadCapError,
    ChildExistsError,
    FormatError,
    NoSuchChildError,
    NotWriteableError,
    PeerTimeoutError,
    WrongKindError,
)
from grid.formats.caps import Cap, DirectoryCap, LiteralCap, UnknownCap, child_slots
from grid.formats.directory import normalize_name
from grid.formats.segments import LITERAL_BYTES_MAX

Position: TypeAlias = int

JOURNAL_WAIT_S: Final = 20.0
LISTED_ENTRIES_MAX: Final = 50_000  # some 60 MB, over all directories that are kept listed though nobody holds them
SIZES_MAX: Final = 10_000  # mutable files whose size is remembered
ERRORS_MAX: Final = 50  # shown in status
UPLOADS_SHOWN_MAX: Final = 50


class Workspace:
    """Made by `open_workspace`, and of no use once that has ended."""

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

    # --- files

    async def new_contents(self, base: Target | None = None, *, keep: int | None = None) -> WritableContents:
        """To write: empty, or what `base` has (only its first `keep` bytes), fetched only where it is needed."""
        contents = None if base is None or keep == 0 else await self.open_contents(base)
        try:
            return WritableContents(self._spool, self.encoding, self._options.spool_wait_s, contents, keep)
        except BaseException:
            if contents is not None:
                contents.close()
            raise

    async def open_contents(self, target: Target) -> Contents:
        """To read, as it is now: later changes are not seen. Raises WrongKindError for what is no file."""
        if isinstance(target, PendingFile):
            if target.sealed is not None:
                return await self._open_sealed(target.sealed)
            if target.cap is None:
                raise NoSuchChildError(target.name)
            target = target.cap
        if isinstance(target, LiteralCap):
            return BytesContents(target.data)
        if isinstance(target, Directory | DirectoryCap | UnknownCap) or target.is_verifier:
            raise WrongKindError("not a file that can be read")
        local = self._local(target)
        if local is not None:
            return await self._open_sealed(local)
        contents = await self._open_stored(target)
        return LiveContents(target, contents.size, self.open_base, contents) if target.kind == "mdmf" else contents

    async def open_base(self, cap: Cap) -> Contents:
        """What contents are written over: of a mutable file what the grid has, though there may be newer contents."""
        return await (self._open_stored(cap) if cap.is_mutable else self.open_contents(cap))

    async def _open_stored(self, cap: Cap) -> Contents:
        snapshot = await self._kept.open_file(cap)
        if cap.is_mutable and cap.storage_index is not None:
            self._sizes[cap.storage_index] = snapshot.size
        return SnapshotContents(cap, snapshot, self._blocks)

    async def _open_sealed(self, sealed: SealedFile) -> Contents:
        sealed.retain()  # it may be stored, and let go, while it is checked
        try:
            await sealed.check()
            return sealed.open()
        finally:
            sealed.release()

    def is_prefetchable(self, target: Target) -> bool:
        """Would `prefetch` of this file fetch anything? Those on the grid only, and small."""
        cap = None if isinstance(target, Directory) else cap_of(target)
        return cap is not None and is_small(cap) and self._local(cap) is None

    def prefetch(self, targets: Iterable[Target]) -> None:
        """Somebody will probably read these files soon: fetch them now, as far as is_prefetchable()."""
        self._prefetcher.want(cap for t in targets if self.is_prefetchable(t) and (cap := cap_of(t)) is not None)

    def _local(self, cap: Cap) -> SealedFile | None:
        """What we have of it ourselves: contents on their way, or not long ago."""
        if cap.storage_index is None:
            return None
        replacement = self._committer.replacements.find(cap.storage_index)
        if replacement is not None:
            return replacement.sealed
        kept = self._spool.find_kept(cap.storage_index)
        return kept if isinstance(kept, SealedFile) and kept.size == cap.size else None

    async def store(
        self,
        directory: Directory,
        name: str,
        contents: WritableContents,
        metadata: dict[str, Any],
        *,
        over: Target | None,
    ) -> tuple[Position, Target, str]:
        """Seal the contents and link them: as a PendingFile, or at once as a cap if they are short enough for one.

        `over` is what the name referred to when the writing began, None for nothing. If it is another client's by now
        both are kept: the name under which ours is linked is returned. When it fails or is cancelled the contents are
        as before.
        """
        name = await self._prepare(directory, name, metadata)
        sealed = await contents.seal()
        target: Target
        if sealed.size <= LITERAL_BYTES_MAX and sealed.complete and self._options.mutable is None:
            target = LiteralCap(sealed.read_now())
            sealed.release()
        else:
            target = PendingFile(sealed, name)
        name = self._committer.name_for(directory, name, over)
        position = self._journal.begin()
        self._link(directory, name, target, metadata, position)
        return position, target, name

    async def replace(self, cap: Cap, contents: WritableContents) -> Position:
        """New contents for a mutable file, in place: of an MDMF file only what was written is sent, nothing fetched.

        Raises NotWriteableError, FileTooLargeError.
        """
        if not cap.is_mutable or cap.is_readonly or cap.storage_index is None or cap.is_directory:
            raise NotWriteableError("not a mutable file, or not one this cap may write")
        self._check_open()
        if contents.size > (most := mutable_bytes_max(cap.kind)):
            raise FileTooLargeError(f"a mutable file of over {most} bytes")
        await self._journal.room(JOURNAL_WAIT_S)
        if cap.kind == "mdmf":
            sealed = await contents.seal(under=LiveContents(cap, contents.size, self.open_base))
        else:
            sealed = await contents.seal(complete=True)  # the version it is based on may soon be gone
        position = self._journal.begin()
        self._sizes[cap.storage_index] = sealed.size
        self._committer.replacements.add(Replacement(cap, sealed, position))
        return position

    async def size_of(self, target: Target) -> int:
        """Bytes. Asks the grid for mutable files only, and not again within `poll_s`. Raises WrongKindError."""
        if isinstance(target, PendingFile):
            return target.size
        if isinstance(target, Directory | DirectoryCap):
            raise WrongKindError("a directory has no size of its own")
        if target.size is not None or target.storage_index is None or not target.is_mutable:
            return target.size or 0
        replacement = self._committer.replacements.find(target.storage_index)
        if replacement is not None:
            return replacement.size
        if (size := self._sizes.get(target.storage_index)) is None:
            contents = await self.open_contents(target)
            size = contents.size
            contents.close()
        return size

    # --- waiting, and what there is to know

    async def wait(
        self, position: Position | None = None, *, timeout_s: float | None = None, stall_s: float = math.inf
    ) -> None:
        """Return once all up to `position` (None: up to now) is on the grid and linked up to the root.

        What is waited for goes out at once. Raises what keeps it from getting there if that has failed repeatedly
        since this call, PeerTimeoutError after `timeout_s`, or `stall_s` without any progress; it goes on being tried.
        """
        upto = self._journal.position if position is None else position
        with trio.move_on_after(math.inf if timeout_s is None else timeout_s) as scope:
            await self._committer.wait(upto, stall_s)
        if scope.cancelled_caught:
            raise PeerTimeoutError(f"{len(self._journal)} changes are not on the grid after {timeout_s:g} s")

    async def persist(self, *, flush: bool = False) -> None:
        """Return once all up to now survives the end of this process, or (`flush`) a power cut too.

        Raises SpoolFullError, OSError when the local disk does not take it; it goes on being tried, and is on its way
        to the grid in any case.
        """
        await (self._journal.flush() if flush else self._journal.persist())

    async def drain(self, *, timeout_s: float | None = None) -> None:
        """Wait for everything; after that nothing can be changed any more."""
        await self.wait(timeout_s=timeout_s)
        self._drained = True

    def resume(self, restored: Restored) -> None:
        """Go on with what a process before this one had not brought to the grid. Before anybody else is let in."""
        self._replayed_upto = restored.position
        self._journal.position = max(self._journal.position, restored.position)
        self._journal.last_id = max(self._journal.last_id, restored.last_id)
        for cap, directory in restored.directories.items():
            if cap == self.root.cap:
                self.root = directory
            self._table[cap] = directory
        with self._journal.unchanged():
            for file in restored.files:
                self._journal.record(file)
            for change in restored.changes:
                self._committer.enqueue(change)
            for replacement in restored.replacements:
                self._committer.replacements.add(replacement)
        self._journal.forget(restored.stale)
        self._note_lost(restored)

    def adopt(self, restored: Restored) -> None:
        """The same for what another mount of this directory left: as if it had all been done now, by somebody else."""
        for change in restored.changes:
            cap = change.directory.cap
            home = change.directory if cap is None else self.directory(cap)
            name = change.name
            if home is not change.directory and home.changes.get(name) is not None:
                if change.kind is not Kind.LINK:
                    self._committer.discard(change)
                    continue
                name = self._committer.conflict_name(home, name, change.when)
            change.move(home, name, self._journal.begin())
            self._committer.enqueue(change)
        for replacement in restored.replacements:
            replacement.position = self._journal.begin()
            self._committer.replacements.add(replacement)
        self._replayed_upto = self._journal.position
        self._note_lost(restored)

    def _note_lost(self, restored: Restored) -> None:
        for lost in restored.lost:
            self.note_error("the journal", FormatError(f"could not be restored: {lost}"))

    def note_error(self, path: str, error: Exception) -> None:
        """A read failed for good, say: let status show it."""
        self._read_errors.append((time.time(), path, str(error)))

    def status(self) -> dict[str, Any]:
        """Plain values, for people and JSON; holds no cap."""
        committer, uploads = self._committer, self._committer.uploads
        pending = list({**dict.fromkeys(uploads.pending()), **dict.fromkeys(committer.linking())})
        shown = itertools.islice(sorted(pending, key=lambda file: file.stage == "queued"), UPLOADS_SHOWN_MAX)
        replacements = list(committer.replacements)
        now = time.time()
        errors = [(now, path, str(error)) for path, error in committer.errors()][:ERRORS_MAX]
        errors += self._read_errors
        return {
            "pending": {
                "files": len(pending) + len(replacements),
                "bytes": sum(file.unsent_bytes for file in pending) + sum(r.size for r in replacements),
                "directories": committer.dirty_directories,
            },
            "uploads": [
                {
                    "name": file.name,
                    "bytes": file.size,
                    "unsent_bytes": file.unsent_bytes,
                    "stage": file.stage,
                    "shares_placed": file.progress.shares_placed if file.progress is not None else 0,
                    "shares_total": self.encoding.n,
                }
                for file in shown
            ],
            "throughput": {
                "pushed_bytes": uploads.meter.total,
                "pushed_bytes_per_s": round(uploads.meter.rate(trio.current_time())),
            },
            "replaying": self.replaying,
            "journal": {"bytes": self._spool.used_bytes, "limit": self._spool.limit_bytes},
            "cache": {
                "bytes": self._disk.used_bytes if self._disk is not None else self._blocks.held_bytes,
                "limit": self._options.cache_bytes,
                "hits": self._blocks.hits,
                "misses": self._blocks.misses,
            },
            "uploaded": uploads.stored,
            "publishes": committer.publishes,
            "conflicts": committer.conflicts,
            "errors": [{"when": when, "path": path, "message": message} for when, path, message in errors],
        }


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
