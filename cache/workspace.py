"""The workspace: one mounted tree as its users see it, and the only thing of this package the mount talks to.

    names   Tree (`cache/tree.py`)
    read    open_contents ─► spool (what was just written) | blocks ─► the grid
    write   new_contents ─► store ─► directories (pending changes) + committer ─► the grid

What is not on the grid yet survives a kill in the journal on the local disk: an operation is there from `persist` on
(`cache/journal.py`); `cache/opening.py` finds it there again.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterable, Sequence
from typing import Any, Final

import trio

from cache.contents import WritableContents
from cache.directories import Directory, Kind, Target, cap_of
from cache.layers import BytesContents, Contents, LiveContents
from cache.pending import PendingFile, Replacement
from cache.pin_list import PinList
from cache.pins import Pins
from cache.prefetch import is_small
from cache.replay import Restored
from cache.sealed import SealedFile
from cache.snapshots import SnapshotContents
from cache.tree import ERRORS_MAX, JOURNAL_WAIT_S, Position, Tree
from cache.uploads import require_size, stored_as
from grid.errors import (
    FormatError,
    NoSuchChildError,
    NotWriteableError,
    PeerTimeoutError,
    WrongKindError,
)
from grid.formats.caps import Cap, DirectoryCap, LiteralCap, UnknownCap
from grid.formats.segments import LITERAL_BYTES_MAX

UPLOADS_SHOWN_MAX: Final = 50
_SHOWN_LATER: Final = {"queued": 1, "linking": 2}  # than what is being sent; what waits for its directory alone is last


class Workspace(Tree):
    """Made by `open_workspace`, and of no use once that has ended."""

    pins: Pins | None = None  # None: there is no disk cache to keep anything in

    def keep_pins(self, pin_list: PinList, owner: str, above: Sequence[DirectoryCap]) -> None:
        """Keep what is in the list, from now on. Before anybody else is let in."""
        if self._disk is not None and isinstance(self.root.cap, DirectoryCap):
            parts = (self._client, self.root.cap, self._kept, self._blocks, self._disk, self._connectivity)
            self.pins = Pins(*parts, pin_list, owner=owner, poll_s=self._options.poll_s, above=above)
            self._nursery.start_soon(self.pins.run)

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
        mutable: str | None = None,
    ) -> tuple[Position, Target, str]:
        """Seal the contents and link them: as a PendingFile, or at once as a cap if they are short enough for one.

        `mutable`: "none", "sdmf" or "mdmf"; None for what the options say, or an immutable file if it is too large for
        that. Raises FileTooLargeError.

        `over` is what the name referred to when the writing began, None for nothing. If it is another client's by now
        both are kept: the name under which ours is linked is returned. When it fails or is cancelled the contents are
        as before.
        """
        mutable = stored_as(contents.size, mutable, self._options.mutable)
        name = await self._prepare(directory, name, metadata)
        sealed = await contents.seal()
        target: Target
        if sealed.size <= LITERAL_BYTES_MAX and sealed.complete and mutable == "none":
            target = LiteralCap(sealed.read_now())
            sealed.release()
        else:
            target = PendingFile(sealed, name, mutable)
        name = self._committer.name_for(directory, name, over)
        position = self._journal.begin()
        self._link(directory, name, target, metadata, position)
        return position, target, name

    async def replace(self, cap: Cap, contents: WritableContents, *, name: str = "a mutable file") -> Position:
        """New contents for a mutable file, in place: of an MDMF file only what was written is sent, nothing fetched.

        `name`: for messages. Raises NotWriteableError, FileTooLargeError.
        """
        if not cap.is_mutable or cap.is_readonly or cap.storage_index is None or cap.is_directory:
            raise NotWriteableError("not a mutable file, or not one this cap may write")
        self._check_open()
        require_size(contents.size, cap.kind)
        await self._journal.room(JOURNAL_WAIT_S)
        sealed = await contents.seal(complete=cap.kind != "mdmf")  # else the version it is based on may soon be gone
        position = self._journal.begin()
        self._sizes[cap.storage_index] = sealed.size
        self._committer.replacements.add(Replacement(cap, sealed, position, name))
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
        pending: list[PendingFile | Replacement] = list(
            dict.fromkeys(itertools.chain(uploads.pending(), committer.linking(), committer.replacements))
        )
        shown = sorted(pending, key=lambda file: _SHOWN_LATER.get(file.stage, 0))[:UPLOADS_SHOWN_MAX]
        now = time.time()
        errors = [(now, path, str(error)) for path, error in committer.errors()][:ERRORS_MAX]
        errors += self._read_errors
        return {
            "pending": {
                "files": len(pending),
                "bytes": sum(file.unsent_bytes for file in pending),
                "directories": committer.dirty_directories,
            },
            "uploads": [
                {
                    "name": file.name,
                    "bytes": file.size,
                    "unsent_bytes": file.unsent_bytes,
                    "stage": file.stage,
                    "shares_placed": file.progress.shares_placed if file.progress is not None else 0,
                    "shares_total": self.encoding.n if isinstance(file, PendingFile) else 0,  # 0: not counted
                }
                for file in shown
            ],
            "throughput": {
                "pushed_bytes": uploads.meter.total,
                "pushed_bytes_per_s": round(uploads.meter.rate(trio.current_time())),
            },
            "replaying": self.replaying,
            "journal": {"bytes": self._spool.unsent_bytes, "limit": self._spool.limit_bytes},
            "cache": {
                "bytes": self._disk.used_bytes if self._disk is not None else self._blocks.held_bytes,
                "limit": self._options.cache_bytes,
                "hits": self._blocks.hits,
                "misses": self._blocks.misses,
            },
            "pinned": [] if self.pins is None else self.pins.status(),
            "uploaded": uploads.stored,
            "publishes": committer.publishes,
            "conflicts": committer.conflicts,
            "errors": [{"when": when, "path": path, "message": message} for when, path, message in errors],
        }
