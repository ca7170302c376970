"""The committer: brings to the grid what the mount has done, for ever, until it is there.

    enqueue(change) ──► target on its way?  ──► upload queue ──► uploads (small: 8 at once; big: 2) ──┐
                        └── ready ◄───────────────────────────────────────────────────────────────────┘
    a directory is published, one publish at a time, with all that is ready
        when nothing of it is on its way any more and it has rested for `publish_quiet_s`,
        or when its oldest ready change has waited for `publish_latest_s` (doubling while it stays busy),
        or at once, when somebody waits for it (`urgency`) and nothing he waits for is on its way
    failures are tried again with back-off; what fails is set aside (`Directory.failing`), so others go without it

What is replaced or removed before it was sent is not sent: `discard` cancels its upload. A new directory is
published when its children are there, its parent's link to it comes after that, and so up to the root.

Who holds what over which await:
    grid_lock of a directory   over one conversation with the grid about it (here: a publish; in workspace: a read);
                               nobody holds two, and nobody awaits anything else with it
    everything else            is changed between awaits only: no other locks
All tasks live in the nursery given here. One task, `run`, starts publishes and retries when they are due.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import math
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any, Final

import trio
from attrs import define, field

from cache.backoff import delay_s
from cache.directories import Change, Directory, Kind, Target
from cache.journal import Journal
from cache.options import WorkspaceOptions
from cache.ordering import may_go
from cache.pending import PendingFile, Replacement
from cache.publishing import Published, publish
from cache.replacements import Replacements
from cache.spool import Spool
from cache.uploads import Uploads
from grid.errors import GridError, PeerTimeoutError
from grid.formats.caps import Cap

log = logging.getLogger(__name__)

PUBLISHES_MAX: Final = 4  # directories published at once
PUBLISH_TIMEOUT_S: Final = 300.0  # of one publish, all its tries included
LATEST_S_MAX: Final = 60.0  # how long a busy directory's changes may be held back
URGENT_RETRY_S_MAX: Final = 2.0  # back-off while somebody waits
WAIT_ATTEMPTS: Final = 3  # failures of one thing before whoever waits for it is told


@define(eq=False)
class _Dirty:
    """What the committer knows of a directory with pending changes."""

    changed_at: float  # trio's clock, as all times here
    first_ready_at: float | None = None  # since when something could be sent
    scheduled_at: float | None = None
    publishing: trio.CancelScope | None = None
    retry_at: float = 0.0
    attempts: int = 0
    error: Exception | None = field(default=None)


class Committer:
    """Owner of all that is on its way. See the module for how it works."""

    def __init__(
        self,
        nursery: trio.Nursery,
        client: Any,
        spool: Spool,
        journal: Journal,
        table: MutableMapping[Cap, Directory],
        options: WorkspaceOptions,
    ) -> None:
        self._nursery = nursery
        self._client = client
        self._journal = journal
        self._table = table
        self._options = options
        self._dirty: dict[Directory, _Dirty] = {}
        self._due: list[tuple[float, int, Directory]] = []
        self._numbers = itertools.count()
        self._waiting_for_a_turn: dict[Directory, None] = {}
        self._publishing = 0
        self._kick = trio.Event()
        self._urgent: dict[object, int] = {}  # waiter -> position
        self.uploads = Uploads(nursery, client, spool, options, self._uploaded, self.retry_delay_s, self._is_awaited)
        self.replacements = Replacements(nursery, client, journal, options, self.retry_delay_s, self._is_awaited)
        self.on_published: Callable[[Published], Awaitable[None]] | None = None  # somebody may want to keep it
        self.publishes = 0
        self.conflicts = 0

    # --- effects in and out; synchronous, so each operation is atomic

    def enqueue(self, change: Change) -> None:
        """A new change lies over its directory: see to it. Before `discard` of the one it takes the place of."""
        self._journal.add(change)
        target, directory = change.target, change.directory
        if isinstance(target, PendingFile | Directory):
            target.links.add(change)
        if not change.ready:
            failing = isinstance(target, PendingFile) and target.attempts > 0
            (directory.failing if failing else directory.unready).add(change)
            if isinstance(target, PendingFile):
                self.uploads.queue(target)
        now = trio.current_time()
        self._dirty.setdefault(directory, _Dirty(now)).changed_at = now
        if isinstance(target, Directory) and target.is_new and target not in self._dirty:
            self._dirty[target] = _Dirty(now, now)
            self._touch(target)
        self._touch(directory)

    def discard(self, change: Change, moved_to: Change | None = None) -> None:
        """A change is wanted no more; if its target went elsewhere, by the change `moved_to`."""
        for waited in change.hand_on(moved_to):
            self._journal.record(waited)
            self._touch(waited.directory)
        self._settle(change)
        target = change.target
        if isinstance(target, PendingFile):
            if not target.links:
                self.uploads.drop(target)
        elif isinstance(target, Directory) and not target.links and not target.linked:
            self._abandon(target)

    def _settle(self, change: Change) -> None:
        directory = change.directory
        change.done = True
        change.wait_for_nothing()
        directory.unready.discard(change)
        directory.failing.discard(change)
        if isinstance(change.target, PendingFile | Directory):
            change.target.links.discard(change)
        self._journal.settle(change)
        for waiting in change.waiting:
            if not waiting.done:
                self._touch(waiting.directory)
        change.waiting.clear()
        self._touch(directory)

    def _abandon(self, directory: Directory) -> None:
        """A new directory that nobody will see: nothing in it is sent."""
        directory.abandoned = True
        for change in list(directory.changes.values()):
            directory.take_away(change)
            self.discard(change)
        state = self._dirty.pop(directory, None)
        if state is not None and state.publishing is not None:
            state.publishing.cancel()

    def _uploaded(self, file: PendingFile) -> None:
        """An upload ended, one way or the other."""
        for change in list(file.links):
            self._journal.record(change)
            change.directory.unready.discard(change)
            change.directory.failing.discard(change)
            if file.cap is None:
                change.directory.failing.add(change)
            self._touch(change.directory)
        self._journal.wake()

    def is_publishing(self, directory: Directory) -> bool:
        state = self._dirty.get(directory)
        return state is not None and state.publishing is not None

    # --- when to publish

    def _latest_s(self, directory: Directory) -> float:
        """How long what is ready may be held back, for the sake of what comes after it."""
        if directory.is_new:
            return self._options.new_directory_latest_s
        return max(directory.hold_s, self._options.publish_latest_s)

    def _due_at(self, directory: Directory, state: _Dirty, now: float) -> float | None:
        """When to publish it next, as things are; None: when something changes."""
        ready = len(directory.changes) - len(directory.unready) - len(directory.failing)
        if ready and state.first_ready_at is None:
            state.first_ready_at = now
        elif not ready and not directory.is_new:
            state.first_ready_at = None
        if state.publishing is not None or (not ready and not directory.is_new):
            return None
        if not ready and directory.unready:
            return None  # a first publish without anything in it would be for nothing
        if state.retry_at > now:
            return state.retry_at
        if self._urgent:
            upto = max(self._urgent.values())
            effects = itertools.chain(directory.changes.values(), directory.links)
            if any(c.position <= upto for c in effects) and not any(c.position <= upto for c in directory.unready):
                return now
        latest = (now if state.first_ready_at is None else state.first_ready_at) + self._latest_s(directory)
        return latest if directory.unready else min(latest, state.changed_at + self._options.publish_quiet_s)

    def _touch(self, directory: Directory) -> None:
        """Something about it changed: look when it is due."""
        state = self._dirty.get(directory)
        if state is None:
            return
        if state.publishing is None and not directory.changes and not (directory.is_new and directory.links):
            del self._dirty[directory]
            return
        due = self._due_at(directory, state, trio.current_time())
        if due is not None and (state.scheduled_at is None or due < state.scheduled_at):
            state.scheduled_at = due
            heapq.heappush(self._due, (due, next(self._numbers), directory))
            self._kick.set()

    async def run(self) -> None:
        """Start what is due, when it is. Never returns."""
        while True:
            now = trio.current_time()
            while self._due and self._due[0][0] <= now:
                due, _, directory = heapq.heappop(self._due)
                state = self._dirty.get(directory)
                if state is not None and state.scheduled_at == due:
                    state.scheduled_at = None
                    try:
                        self._consider(directory, state, now)
                    except Exception:
                        log.exception("looking after %s failed in an unforeseen way", directory.path or "a directory")
            with trio.move_on_at(self._due[0][0] if self._due else float("inf")):
                await self._kick.wait()
            self._kick = trio.Event()

    def _consider(self, directory: Directory, state: _Dirty, now: float) -> None:
        due = self._due_at(directory, state, now)
        if due is None:
            return
        if due > now:
            self._touch(directory)
        elif self._publishing >= PUBLISHES_MAX:
            self._waiting_for_a_turn[directory] = None
        else:
            batch = [change for change in directory.changes.values() if may_go(change)]
            if batch or directory.is_new:
                for change in batch:
                    change.sent = True  # from here on: what takes its place from now on must know of it
                    self._journal.record(change)
                self._publishing += 1
                state.publishing = trio.CancelScope()
                self._nursery.start_soon(self._publish, directory, state, state.publishing, batch)

    # --- publishing

    async def _publish(self, directory: Directory, state: _Dirty, scope: trio.CancelScope, batch: list[Change]) -> None:
        try:
            with scope:
                await self._persist()
                async with directory.grid_lock:
                    with trio.fail_after(PUBLISH_TIMEOUT_S):
                        published = await publish(self._client, directory, batch)
                    if self.on_published is not None:
                        await self.on_published(published)
                    self._published(directory, state, batch, published)
        except Exception as error:  # noqa: BLE001  logged there; whatever it is, others must go on
            self._failed(directory, state, error)
        finally:
            self._publishing -= 1
            state.publishing = None
        self._touch(directory)
        self._journal.wake()
        for waiting in list(self._waiting_for_a_turn):
            if self._publishing < PUBLISHES_MAX:
                del self._waiting_for_a_turn[waiting]
                self._touch(waiting)

    async def _persist(self) -> None:
        """What will be on the grid must be known to be ours, also after a kill, or it would pass for another's."""
        try:
            await self._journal.persist()
        except (GridError, OSError) as error:  # sending makes room on a full disk: worth the small risk
            log.warning("the journal cannot be written: %s", error)

    def _published(self, directory: Directory, state: _Dirty, batch: list[Change], published: Published) -> None:
        now = trio.current_time()
        self.publishes += 1
        was_new, held_s = directory.is_new, self._latest_s(directory)
        state.attempts, state.error, state.retry_at = 0, None, 0.0
        for change in batch:
            if not change.done and change not in published.foreign:
                directory.take_away(change)
                if isinstance(change.target, Directory):
                    change.target.linked = True
                self._settle(change)
        odd = directory.rebase(published.cap, published.version, published.entries, now)
        odd += [(c, c.kind is Kind.LINK) for c in published.foreign if not any(c is seen for seen, _ in odd)]
        self.resolve(directory, odd)
        state.first_ready_at = None
        busy = directory.unready or now - state.changed_at < self._options.publish_quiet_s
        directory.hold_s = min(held_s * 2, LATEST_S_MAX) if busy else 0.0
        if was_new:
            self._table[published.cap] = directory
            for change in directory.changes.values():
                self._journal.record(change)
            for link in directory.links:
                self._journal.record(link)
                link.directory.unready.discard(link)
                self._touch(link.directory)

    def resolve(self, directory: Directory, odd: list[tuple[Change, bool]]) -> None:
        """Deal with changes that make no sense over a newer listing (`Directory.rebase`)."""
        for change, conflict in odd:
            if change.done:
                continue
            where = directory.path or "a directory"
            if not conflict:
                directory.take_away(change)
                self.discard(change)
                if change.name in directory.base:
                    log.info(
                        "%s: %r was changed elsewhere; ours to %s it is void", where, change.name, change.kind.value
                    )
                continue
            name = self.conflict_name(directory, change.name, change.when)
            assert change.target is not None
            moved, _ = directory.put(name, change.target, change.metadata or {}, change.position, change.when)
            self.enqueue(moved)
            directory.take_away(change)
            self.discard(change, moved_to=moved)
            self.conflicts += 1
            log.warning("%s: %r was changed elsewhere too; ours is now %r", where, change.name, name)

    def name_for(self, directory: Directory, name: str, over: Target | None) -> str:
        """For what was written over `over`: `name`, or one beside it if that is somebody else's by now."""
        if not directory.was_changed_elsewhere(name, over):
            return name
        beside = self.conflict_name(directory, name, time.time())
        self.conflicts += 1
        log.warning("%s: %r was changed elsewhere too; ours is now %r", directory.path or "a directory", name, beside)
        return beside

    def conflict_name(self, directory: Directory, name: str, when: float) -> str:
        """A free name beside `name`, for what was to have it at the POSIX time `when`."""
        stamp = time.strftime("%Y-%m-%d %H.%M.%S", time.localtime(when))
        return directory.free_name(name, f"conflict {stamp} {self._nickname()}")

    def _nickname(self) -> str:
        nickname = "".join(
            c for c in self._options.nickname or self._client.node.nickname if c.isprintable() and c != "/"
        )
        return nickname[:32].strip() or "tahoefs"

    def _failed(self, directory: Directory, state: _Dirty, error: Exception) -> None:
        if directory.abandoned:
            return
        state.attempts += 1
        state.error = error
        state.retry_at = trio.current_time() + self.retry_delay_s(state.attempts)
        log.warning("publishing %s failed, attempt %d: %s", directory.path or "a directory", state.attempts, error)
        if not isinstance(error, GridError | OSError | trio.TooSlowError):
            log.error("this was not foreseen", exc_info=error)

    def retry_delay_s(self, attempts: int) -> float:
        most = min(self._options.retry_most_s, URGENT_RETRY_S_MAX) if self._urgent else self._options.retry_most_s
        return delay_s(attempts, self._options.retry_first_s, most)

    # --- waiting

    async def wait(self, upto: int, stall_s: float = math.inf) -> None:
        """Return when all up to position `upto` is on the grid, linked up to the root, or wanted no more.

        Holds nothing back meanwhile, and has servers that are away dialled at once if anything failed. Raises the error
        of what has failed WAIT_ATTEMPTS times since this call, PeerTimeoutError when nothing at all has got any further
        for `stall_s`.
        """
        with self._urgency(upto):
            before = {thing: thing.attempts for thing, _ in self._failing()}
            if before:
                self._client.broker.retry_now()
            progress, moved_at = self._progress(), trio.current_time()
            while not self._journal.settled(upto):
                for thing, position in self._failing():
                    if position <= upto and thing.attempts - before.get(thing, 0) >= WAIT_ATTEMPTS and thing.error:
                        raise thing.error.with_traceback(None)
                with trio.move_on_at(moved_at + stall_s):
                    await self._journal.changed()
                if self._progress() != progress:
                    progress, moved_at = self._progress(), trio.current_time()
                elif trio.current_time() - moved_at >= stall_s:
                    raise PeerTimeoutError(f"nothing could be sent for {stall_s:g} s")

    def _progress(self) -> tuple[int, ...]:
        """Is another tuple whenever something has got further."""
        uploads = self.uploads
        return uploads.meter.total, uploads.fetched_bytes, uploads.stored, self.publishes, len(self._journal)

    @contextmanager
    def _urgency(self, upto: int) -> Iterator[None]:
        token = object()
        self._urgent[token] = upto
        self.retry_now()
        try:
            yield
        finally:
            del self._urgent[token]

    def retry_now(self) -> None:
        """What failed is tried again: somebody waits, or the grid is back."""
        for directory, state in list(self._dirty.items()):
            state.retry_at = 0.0
            self._touch(directory)
        self.uploads.hurry()
        self.replacements.hurry()

    def _is_awaited(self, pending: PendingFile | Replacement) -> bool:
        effects = pending.links if isinstance(pending, PendingFile) else (pending,)
        upto = max(self._urgent.values(), default=0)
        return any(effect.position <= upto for effect in effects)

    def linking(self) -> Iterator[PendingFile]:
        """Files that are stored, under names that are not on the grid yet."""
        for directory in self._dirty:
            for change in directory.changes.values():
                if isinstance(change.target, PendingFile) and change.target.cap is not None:
                    yield change.target

    def _failing(self) -> Iterator[tuple[Any, int]]:
        """What fails now, with the position of the oldest operation that waits for it."""
        for file in self.uploads.failing:
            yield file, min((change.position for change in file.links), default=self._journal.position)
        for directory, state in self._dirty.items():
            if state.error is not None:
                effects = itertools.chain(directory.changes.values(), directory.links)
                yield state, min((change.position for change in effects), default=self._journal.position)
        for replacement in self.replacements.failing:
            yield replacement, replacement.position

    # --- status

    @property
    def dirty_directories(self) -> int:
        return len(self._dirty)

    def errors(self) -> list[tuple[str, Exception]]:
        """(where, what) of everything that fails now."""
        found: list[tuple[str, Exception]] = []
        for file in self.uploads.failing:
            if file.error is not None:
                found.append((file.name, file.error))
        for directory, state in self._dirty.items():
            if state.error is not None:
                found.append((directory.path or "a directory", state.error))
        found += [(r.name, r.error) for r in self.replacements.failing if r.error is not None]
        return found
