"""Opening a workspace: what is on the local disk for it is found, and what a process before this one left goes on.

    <state_dir>/journal/<prefix of the root's storage index>/<slot>/   what is unsent (`cache/journal_store.py`)
               pins/<the same prefix>.pins                             what is pinned (`cache/pin_list.py`)

Who holds a read cap only can send nothing, and has no journal.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

import trio

from cache.disk_tier import DiskTier
from cache.journal import Journal
from cache.journal_store import JournalStore, Row, abandoned_stores, open_store
from cache.kept import read_key
from cache.options import WorkspaceOptions
from cache.pin_list import PinList
from cache.replay import Replay, Restored
from cache.spool import Spool
from cache.workspace import Workspace
from grid.errors import GridError, NodeDirectoryError, WrongKindError
from grid.formats.base32 import b2a
from grid.formats.caps import Cap, DirectoryCap
from grid.formats.hashutil import tagged_hash

log = logging.getLogger(__name__)

PENDING_CHANGES_MAX: Final = 200_000  # names not on the grid yet; writers wait, then JournalFullError
JOURNAL_BYTES_DEFAULT: Final = 10 << 30  # or half of what is free, whichever is less
PREFIX_CHARACTERS: Final = 12
FINISH_TIMEOUT_S: Final = 30.0  # for the last flush
_KEY_TAG: Final = b"tahoefs_journal_key_v1"


@asynccontextmanager
async def open_workspace(
    client: Any,
    root: Cap,
    *,
    state_dir: Path,
    options: WorkspaceOptions | None = None,
    disk: DiskTier | None = None,
    above: Sequence[DirectoryCap] = (),
) -> AsyncIterator[Workspace]:
    """A workspace over the directory `root`, for as long as the context lasts. Needs no grid to open.

    `disk`: from `open_disk`, which outlives this; None: cached in memory only. `above`: the directories by which the
    root was found, to be found by them again without the grid while something is pinned.

    Leaving it leaves what is not on the grid in the journal, for whoever opens the same root again: `drain` first if
    that is not wanted. Raises WrongKindError when `root` is no directory, NodeDirectoryError when `state_dir` cannot
    be used.
    """
    options = options or WorkspaceOptions()
    if not isinstance(root, DirectoryCap) or root.is_verifier:
        raise WrongKindError("only a directory can be mounted")
    failure: BaseException | None = None
    with ExitStack() as stack:
        local = await trio.to_thread.run_sync(partial(_Local, state_dir, root, options))
        stack.callback(local.close)
        async with trio.open_nursery() as nursery:
            try:
                journal = Journal(PENDING_CHANGES_MAX, local.store)
                workspace = Workspace(nursery, client, root, local.spool, journal, disk, options)
                await _resume(workspace, journal, local)
                if disk is not None and (pins := await trio.to_thread.run_sync(_pins_of, state_dir, root)) is not None:
                    stack.callback(pins.close)
                    workspace.keep_pins(pins, b2a(root.storage_index or b"")[:PREFIX_CHARACTERS], above)
                yield workspace
            except trio.Cancelled:
                raise
            except BaseException as error:  # noqa: BLE001  raised again below, not in a group
                failure = error
            nursery.cancel_scope.cancel()
        with trio.move_on_after(FINISH_TIMEOUT_S, shield=True):
            await _finish(journal, local.spool)
    if failure is not None:
        raise failure


def _pins_of(state_dir: Path, root: DirectoryCap) -> PinList | None:
    """What is pinned of `root`; None for a root of which nothing is on the grid. Raises NodeDirectoryError."""
    key = read_key(root)
    if key is None or root.storage_index is None:
        return None
    pins = PinList(state_dir, b2a(root.storage_index)[:PREFIX_CHARACTERS], key)
    try:
        pins.load()
    except OSError as error:
        raise NodeDirectoryError(f"cannot read what is pinned, in {state_dir}/pins: {error.strerror}") from None
    return pins


async def _finish(journal: Journal, spool: Spool) -> None:
    spool.let_go()
    try:
        await journal.flush()
    except (GridError, OSError) as error:
        log.error("the journal cannot be written: %s", error)


class _Local:
    """This process's journal and spool, with what was found in them. All of it blocks."""

    def __init__(self, state_dir: Path, root: DirectoryCap, options: WorkspaceOptions) -> None:
        """Raises NodeDirectoryError."""
        self.store: JournalStore | None = None
        self.rows: dict[int, Row] = {}
        self.damaged: list[int] = []
        if (writekey := getattr(root.file, "writekey", None)) is not None and root.storage_index is not None:
            self._where = (state_dir, b2a(root.storage_index)[:PREFIX_CHARACTERS], tagged_hash(_KEY_TAG, writekey))
            self.store = open_store(*self._where)
            self.rows, self.damaged = self.store.load()
        files = self.store.files if self.store is not None else None
        limit_bytes = options.journal_bytes
        if limit_bytes is None:
            limit_bytes = JOURNAL_BYTES_DEFAULT
            if files is not None:
                limit_bytes = min(limit_bytes, shutil.disk_usage(files).free // 2)
        self.spool = Spool(files, limit_bytes=limit_bytes, keep_bytes=min(options.keep_bytes, limit_bytes // 2))

    def close(self) -> None:
        if self.store is not None:
            self.store.close()

    def abandoned(self) -> list[JournalStore]:
        """The journals of other mounts of this directory, whose processes are dead."""
        return [] if self.store is None else abandoned_stores(*self._where)


async def _resume(workspace: Workspace, journal: Journal, local: _Local) -> None:
    """Have the workspace go on with its own journal, and with those that dead processes left beside it."""
    if local.store is None:
        return

    def replay(store: JournalStore, rows: Mapping[int, Row], adopted: Path | None) -> Restored:
        opener = workspace.open_base
        replay = Replay(rows, local.spool, workspace.encoding, opener, same_boot=store.same_boot, adopted=adopted)
        return replay.run()

    restored = await trio.to_thread.run_sync(replay, local.store, local.rows, None)
    local.spool.sweep({file.file.number for file in restored.files})
    _tell(restored, local.damaged, local.store)
    workspace.resume(restored)
    for store in await trio.to_thread.run_sync(local.abandoned):
        try:
            rows, damaged = await trio.to_thread.run_sync(store.load)
            restored = await trio.to_thread.run_sync(replay, store, rows, store.files)
            _tell(restored, damaged, store)
            workspace.adopt(restored)
            await journal.flush()
            await store.clear()
        finally:
            store.close()


def _tell(restored: Restored, damaged: list[int], store: JournalStore) -> None:
    """Of what was lost. Nothing can be done about it any more."""
    if store.missing:
        restored.lost.append(f"the last {store.missing} groups of changes that were kept: the journal's end is damaged")
    if damaged:
        restored.lost.append(f"{len(damaged)} damaged entries")
        restored.stale += damaged
    for lost in restored.lost:
        log.error("the journal: could not be restored: %s", lost)
