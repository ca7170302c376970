"""The journal: every operation gets a position, what it wants done is kept until it is, and survives a kill meanwhile.

An operation's *effects* (a name to be published in a directory, a mutable file to be replaced) are added when it is
done and settled when the grid has them, or when nobody wants them any more. An effect that takes the place of another
keeps the smaller position: who waits for what was overwritten waits for what overwrote it, since what was overwritten
will never be there.

    operations   1 link a   2 link b   3 link a again   4 unlink b
    effects      a at 1                                 (b is gone)        wait(2) waits for a, the second one

Effects, and the spool files they speak of, are *recorded*: each has a row in the store (`cache/journal_store.py`),
written anew when it has changed and deleted when it is gone.

    record    noted in memory; what is recorded between two awaits is written together, so an operation is there
              whole or not at all
    persist   written to the store: survives the end of this process
    flush     and on the disk, with its spool files: survives a power cut. Done by `run` within FLUSH_S

Waiting for the grid needs no lock: it looks, then waits for `changed`, and nothing runs between the two. `_writing` and
`_flushing` are held over one write or flush each; whoever comes meanwhile is served by the next one.
"""

from __future__ import annotations

import heapq
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Final, Protocol

import trio

from cache.journal_store import JournalStore, Row
from cache.sealed import SealedFile
from cache.spool import SpoolFullError
from grid.errors import GridError

log = logging.getLogger(__name__)

FLUSH_S: Final = 0.5  # after a change, until it is flushed; then it takes as long as the disk needs


class Numbered(Protocol):
    id: int  # in the store; 0 until it has one


class Recorded(Numbered, Protocol):
    """Something with a row of its own."""

    @property
    def parts(self) -> Iterable[SealedFile]:
        """What its row refers to, and so must be recorded too."""

    def row(self, number_of: Callable[[Numbered], int]) -> Row | None:
        """What is to be kept of it, as it is now; None when it is gone."""


class Effect(Recorded, Protocol):
    position: int


class _Nobody:
    """A row that is not needed any more."""

    parts = ()

    def __init__(self, number: int) -> None:
        self.id = number

    def row(self, number_of: Callable[[Numbered], int]) -> None:
        return None


class JournalFullError(SpoolFullError):
    """Too many operations are not on the grid yet: the mount answers ENOSPC. Nothing is dropped."""


class Journal:
    """Positions given out, effects outstanding; `limit` is how many of those there may be. No store: memory only."""

    def __init__(self, limit: int, store: JournalStore | None = None) -> None:
        self.position = 0  # of the last operation
        self._limit = limit
        self._store = store
        self.last_id = 0
        self._outstanding: dict[Effect, None] = {}
        self._heap: list[tuple[int, int, Effect]] = []
        self._pushes = 0
        self._changed = trio.Event()
        self._unwritten: dict[Recorded, None] = {}
        self._unsynced: dict[SealedFile, None] = {}
        self._gone: dict[SealedFile, None] = {}  # their rows are deleted; the files go when that is on the disk
        self._recorded = self._written = self._flushed = 0  # how often something was recorded, and what became of it
        self._writing = trio.Lock()
        self._flushing = trio.Lock()
        self._to_flush = trio.Event()
        self._failure: Exception | None = None  # of the last write
        self._unchanged = False  # see `unchanged`

    def __len__(self) -> int:
        return len(self._outstanding)

    @property
    def durable(self) -> bool:
        return self._store is not None

    # --- positions and effects

    def begin(self) -> int:
        """The next operation's position."""
        self.position += 1
        return self.position

    def add(self, effect: Effect) -> None:
        self._outstanding[effect] = None
        self._pushes += 1
        heapq.heappush(self._heap, (effect.position, self._pushes, effect))
        self.record(effect)

    def settle(self, effect: Effect) -> None:
        """It took effect, or is wanted no more. Harmless when repeated."""
        if effect in self._outstanding:
            del self._outstanding[effect]
            self.record(effect)
            self.wake()

    def wake(self) -> None:
        """Let those who wait look again."""
        self._changed.set()
        self._changed = trio.Event()

    def oldest(self) -> int | None:
        """The smallest position with an effect outstanding."""
        while self._heap and self._heap[0][2] not in self._outstanding:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def settled(self, position: int) -> bool:
        oldest = self.oldest()
        return oldest is None or oldest > position

    async def changed(self) -> None:
        """Return when something was settled, or failed, after this call."""
        await self._changed.wait()

    async def room(self, wait_s: float) -> None:
        """Return once another operation may be journalled. Raises JournalFullError, SpoolFullError, OSError."""
        if self._failure is not None:
            await self.persist()  # before anything is added to what cannot be written
        with trio.move_on_after(wait_s):
            while len(self._outstanding) >= self._limit:
                await self.changed()
            return
        raise JournalFullError(f"{len(self._outstanding)} changes are not on the grid yet")

    # --- on the disk

    def record(self, thing: Recorded) -> None:
        """It is new, has changed, or is gone: its row follows."""
        if self._store is None:
            return
        if not self._unchanged:
            self._unwritten[thing] = None
            self._recorded += 1
            self._to_flush.set()
        for part in thing.parts:
            if not part.id:
                self.record(part)
        self._number_of(thing)
        if isinstance(thing, SealedFile):
            thing.on_change = self.record
            if thing.needs_sync:
                self._unsynced[thing] = None
            else:
                self._unsynced.pop(thing, None)

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """What is recorded meanwhile has its row already: it comes from there."""
        self._unchanged = True
        try:
            yield
        finally:
            self._unchanged = False

    def forget(self, ids: Iterable[int]) -> None:
        """Rows that nobody speaks for."""
        for number in ids:
            self.record(_Nobody(number))

    def _number_of(self, thing: Numbered) -> int:
        if not thing.id:
            self.last_id += 1
            thing.id = self.last_id
        return thing.id

    async def persist(self) -> None:
        """Return once all that was recorded before would survive a kill. Raises SpoolFullError, OSError."""
        if self._store is None or self._written >= (mine := self._recorded):
            return
        async with self._writing:
            if self._written < mine:
                await self._write(self._store)

    async def _write(self, store: JournalStore) -> None:
        things, self._unwritten = self._unwritten, {}
        upto = self._recorded
        try:
            rows = {self._number_of(thing): thing.row(self._number_of) for thing in things}
            gone = [thing for thing in things if isinstance(thing, SealedFile) and thing.gone]
            try:
                await store.write(rows)
            except SpoolFullError:  # these make room: worth the small risk of being killed before they are forgotten
                self._remove([*self._gone, *gone])
                await store.write(rows)
        except BaseException as error:
            self._unwritten = things | self._unwritten
            if isinstance(error, Exception):
                self._failure = error
            raise
        self._written = upto
        self._failure = None
        self._gone.update(dict.fromkeys(gone))

    def _remove(self, files: Iterable[SealedFile]) -> None:
        for file in files:
            file.file.remove()
            self._gone.pop(file, None)

    async def flush(self) -> None:
        """Return once all that was recorded before would survive a power cut. Raises SpoolFullError, OSError."""
        store = self._store
        if store is None or self._flushed >= (mine := self._recorded):
            return
        async with self._flushing:
            if self._flushed >= mine:
                return
            # Most of the work, while others still write. What is new in the meantime is little.
            for file in list(self._unsynced):
                try:
                    await trio.to_thread.run_sync(file.sync)
                except FileNotFoundError:  # somebody removed it: its upload will say so, the others go on
                    self._unsynced.pop(file, None)
                    continue
                if not file.gone:
                    self.record(file)
            await self.persist()
            upto, gone = self._written, list(self._gone)
            await store.flush(self._sync_files)
            self._flushed = upto
            self._remove(gone)

    def _sync_files(self) -> None:
        """In a thread; these are synced again, and then noted to be."""
        for file in list(self._unsynced):
            file.sync_data()

    async def run(self) -> None:
        """Flush what is new, soon after it came. Never returns."""
        while True:
            await self._to_flush.wait()
            await trio.sleep(FLUSH_S)
            self._to_flush = trio.Event()
            try:
                await self.flush()
            except (GridError, OSError) as error:
                log.warning("the journal cannot be written: %s", error)
                self._to_flush.set()
