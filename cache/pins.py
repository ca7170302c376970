"""Pinned paths of a mounted root: trees and files that are kept whole and current in the disk cache.

    pinned     the list on the local disk (`cache/pin_list.py`): any mount of the root may change it, one keeps it
    round      each pin is looked through and what is lacking fetched (`cache/pin_tree.py`); then a rest, REST_FACTOR
               times as long as looking took, and at least `poll_s`
    sweep      after a round that looked at everything: what no pin wants becomes ordinary cache (`cache/pin_store.py`)

A change of the list ends the round that is under way and begins another: what was done stays done. While the grid is
offline there are rounds only for pins that nobody has looked at yet.

No locks: `_pins` is changed between awaits only. Two tasks: `run`, and in it `_watch`, which looks at the list.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

import trio
from attrs import evolve

from cache.blocks import BlockCache
from cache.connectivity import Connectivity
from cache.disk_tier import DiskTier
from cache.kept import Kept
from cache.pin_holder import Holder
from cache.pin_list import (
    COMPLETE,
    FETCHING,
    FULL,
    INCOMPLETE,
    MISSING,
    PINS_MAX,
    WAITING,
    Path_,
    Pin,
    PinList,
)
from cache.pin_store import PinsFullError
from cache.pin_tree import PinTree, Survey
from grid.errors import GridError, GridUnreachableError, NoSuchChildError, WrongKindError
from grid.formats.caps import DirectoryCap
from grid.nodes.traversal import Agenda

log = logging.getLogger(__name__)

LOOK_S: Final = 1.0  # between looks at the list
SAVE_S: Final = 5.0  # between notes of how far it is
SWEEP_S: Final = 3600.0  # between sweeps, if something was fetched meanwhile
REST_FACTOR: Final = 4.0
FAULT_REST_S: Final = 30.0  # after a round that ended in a way nobody foresaw

Tell = Callable[[Pin], Awaitable[None]]


class Pins:
    """Of one workspace. `run` does the work."""

    def __init__(
        self,
        client: Any,
        root: DirectoryCap,
        kept: Kept,
        blocks: BlockCache,
        disk: DiskTier,
        connectivity: Connectivity,
        pin_list: PinList,
        *,
        owner: str,
        poll_s: float,
        above: Sequence[DirectoryCap] = (),
    ) -> None:
        """`owner` stands for the root in the pin store, and tells nothing of it. `above`: directories by which the
        root is found, whose listings are held too while anything is pinned.
        """
        self._disk = disk
        self._connectivity = connectivity
        self._list = pin_list
        self._poll_s = poll_s
        self._holder = Holder(kept, blocks, disk, owner)
        self._tree = PinTree(client, root, kept, self._holder, connectivity)
        self._above = above
        self._pins: dict[Path_, Pin] = {path: evolve(pin) for path, pin in pin_list.pins.items()}
        self._is_keeper = False
        self._sweep_due = True
        self._swept_at = -math.inf
        self._has_fetched = False  # since then
        self._due_at = -math.inf
        self._is_asked = False  # for a round, by a change of the list
        self._saved_at = -math.inf
        self._scope = trio.CancelScope()
        self._changed = trio.Event()

    # --- what is asked for

    def status(self) -> list[dict[str, Any]]:
        """By path; plain values."""
        return [self._pins[path].status() for path in sorted(self._pins)]

    def find(self, path: Sequence[str]) -> Pin | None:
        return self._pins.get(tuple(path))

    def around(self, path: Sequence[str]) -> Pin | None:
        """A pin of a directory above."""
        above = (self._pins.get(tuple(path[:length])) for length in range(len(path)))
        return next((pin for pin in above if pin is not None), None)

    async def add(self, path: Sequence[str]) -> bool:
        """Pin it, or look at it at once if it is pinned. Returns whether it is new. Raises PinsFullError, OSError."""
        wanted, is_new = tuple(path), False

        def change(pins: dict[Path_, Pin]) -> None:
            nonlocal is_new
            is_new = wanted not in pins
            if is_new and len(pins) >= PINS_MAX:
                raise PinsFullError(f"there are {PINS_MAX} pins already: pin a directory with all of it in")
            pins.setdefault(wanted, Pin(wanted)).asked += 1

        await self._change(change)
        self._tree.forget_failures()
        return is_new

    async def remove(self, path: Sequence[str]) -> bool:
        """What it held becomes ordinary cache. Returns whether it was pinned. Raises OSError."""
        was_pinned = False

        def change(pins: dict[Path_, Pin]) -> None:
            nonlocal was_pinned
            was_pinned = pins.pop(tuple(path), None) is not None

        await self._change(change)
        return was_pinned

    async def moved(self, moves: Sequence[tuple[Path_, Path_]]) -> None:
        """Directories were renamed, all of these at once: their pins go with them. Raises OSError."""
        if not any(path[: len(old)] == old for path in self._pins for old, _ in moves):
            return

        def change(pins: dict[Path_, Pin]) -> None:
            before = dict(pins)
            pins.clear()
            for path, pin in before.items():
                old, new = next((move for move in moves if path[: len(move[0])] == move[0]), ((), ()))
                pin.path = (*new, *path[len(old) :])
                pins[pin.path] = pin

        await self._change(change)

    async def settled(self, path: Sequence[str], tell: Tell) -> Pin:
        """Return once it was looked at, and what was lacking fetched, since this call; `tell` hears of the pin now
        and then. Raises NoSuchChildError when it is no longer pinned.
        """
        looks: int | None = None
        while True:
            if (pin := self.find(path)) is None:
                raise NoSuchChildError("it is no longer pinned")
            looks = pin.looks if looks is None else looks
            if pin.looks > looks and pin.settled:
                return pin
            await tell(pin)
            with trio.move_on_after(LOOK_S):
                await self._changed.wait()

    # --- the list

    async def _change(self, change: Callable[[dict[Path_, Pin]], None]) -> None:
        def run() -> bool:
            self._list.change(change)
            return self._list.try_to_keep()

        with trio.CancelScope(shield=True):
            self._is_keeper = await trio.to_thread.run_sync(run)
        self._take_over()

    def _take_over(self) -> None:
        """What the list says now. How far things are the keeper itself knows better."""
        before = {path: pin.asked for path, pin in self._pins.items()}
        for path, pin in self._list.pins.items():
            known = self._pins.get(path)
            if known is not None and self._is_keeper:
                known.asked = pin.asked
            else:
                self._pins[path] = evolve(pin)  # the list's own stays as it was read
        for path in [path for path in self._pins if path not in self._list.pins]:
            del self._pins[path]
            self._sweep_due = True
        if before != {path: pin.asked for path, pin in self._pins.items()}:
            self._due_at, self._is_asked = -math.inf, True
            self._scope.cancel()
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def _watch(self) -> None:
        while True:
            try:
                is_other, self._is_keeper = await trio.to_thread.run_sync(self._look_at_list)
                if is_other:
                    self._take_over()
                if self._is_keeper and trio.current_time() >= self._saved_at + SAVE_S:
                    await self._save()
            except OSError as error:
                log.warning("the list of pins: %s", error)
            await trio.sleep(LOOK_S)

    def _look_at_list(self) -> tuple[bool, bool]:
        return self._list.load(), self._list.try_to_keep()

    async def _save(self) -> None:
        """Note how far everything is, if that is news."""
        self._saved_at = trio.current_time()
        if all(self._list.pins.get(path) == pin for path, pin in self._pins.items()):
            return
        mine = dict(self._pins)

        def change(pins: dict[Path_, Pin]) -> None:
            for path, pin in mine.items():
                if path in pins:
                    pins[path] = evolve(pin, asked=pins[path].asked)

        await self._change(change)

    # --- the work

    async def run(self) -> None:
        """Until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch)
            while True:
                await self._until_due()
                with trio.CancelScope() as self._scope:
                    try:
                        await self._round()
                    except Exception as error:
                        log.warning("a round of pins failed: %s", error, exc_info=not isinstance(error, OSError))
                        self._due_at = trio.current_time() + FAULT_REST_S

    async def _until_due(self) -> None:
        while not self._is_due():
            with trio.move_on_after(LOOK_S):
                await self._changed.wait()
        await trio.lowlevel.checkpoint()

    def _is_due(self) -> bool:
        if not self._is_keeper or trio.current_time() < self._due_at:
            return False
        if not self._pins:
            return self._sweep_due
        return not self._connectivity.offline or self._is_asked or any(not pin.settled for pin in self._pins.values())

    async def _round(self) -> None:
        began, self._due_at = trio.current_time(), math.inf  # unless somebody asks for another one meanwhile
        self._is_asked = False
        await trio.to_thread.run_sync(self._disk.pins.notice_removal)
        full = self._sweep_due or self._disk.pins.damaged or (self._has_fetched and began > self._swept_at + SWEEP_S)
        self._sweep_due = False
        try:
            if full:
                begin, owner = self._disk.pins.begin_epoch, self._holder.owner
                self._holder.epoch = await trio.to_thread.run_sync(begin, owner)
            looking_s = await self._keep_all()
            if full:
                await self._disk.sweep(self._holder.owner, self._holder.epoch)
                self._has_fetched, self._swept_at = False, began
        except BaseException:
            self._sweep_due = self._sweep_due or full
            raise
        if self._due_at == math.inf:
            self._due_at = trio.current_time() + max(self._poll_s, REST_FACTOR * looking_s)

    async def _keep_all(self) -> float:
        """Those first that nobody has looked at. Returns how many seconds looking took."""
        looking_s = 0.0
        if self._pins:
            await self._tree.hold_listings(self._above)
        for pin in sorted(self._pins.values(), key=lambda pin: pin.settled):
            was_full = pin.state == FULL
            looking_s += await self._keep(pin)
            self._sweep_due = self._sweep_due or (pin.state == FULL and not was_full)  # that may make room
            await self._save()
        return looking_s

    async def _keep(self, pin: Pin) -> float:
        """Look through one pin, and fetch what it lacks. Returns how many seconds looking took."""
        began = trio.current_time()
        looked_s = 0.0
        survey = Survey()
        state, message = COMPLETE, None
        try:
            with Agenda() as lacking:
                await self._tree.survey(pin, await self._tree.resolve(pin.path), lacking, survey)
                looked_s = trio.current_time() - began
                pin.files, pin.files_held = survey.files, survey.files_held
                pin.bytes, pin.bytes_held = survey.bytes, survey.bytes_held
                if survey.lacking:
                    pin.state, self._has_fetched = FETCHING, True
                    self._notify()
                    await self._require_room(survey.missing_bytes)
                    pin.files_held = pin.files - await self._tree.fill(pin, lacking, survey)
                    pin.bytes_held = pin.bytes if pin.files_held == pin.files else pin.bytes_held
            if survey.troubles or pin.files_held < pin.files:
                state = WAITING if survey.offline else INCOMPLETE
                message = survey.trouble
            else:
                message = await trio.to_thread.run_sync(self._over_the_bound)
        except (NoSuchChildError, WrongKindError) as error:
            pin.files = pin.files_held = pin.bytes = pin.bytes_held = 0
            state, message = MISSING, str(error) if isinstance(error, WrongKindError) else "nothing stands there now"
        except GridUnreachableError as error:
            state, message = WAITING, str(error)
        except PinsFullError as error:
            state, message = FULL, str(error)
        except (GridError, trio.TooSlowError) as error:
            state, message = INCOMPLETE, str(error) or "the grid did not answer in time"
        except OSError as error:
            log.warning("pins: %s", error)
            state, message = INCOMPLETE, f"the local disk: {error.strerror or error}"
        except Exception:
            log.exception("looking through what is pinned failed in an unforeseen way")
            state, message = INCOMPLETE, "it failed in an unforeseen way: see the mount's log"
        if state == INCOMPLETE and self._connectivity.offline:
            state = WAITING
        pin.state, pin.message = state, message
        pin.looks += 1
        self._notify()
        return looked_s or trio.current_time() - began

    def _over_the_bound(self) -> str | None:
        """What is to be said when a mount has a smaller `cache_size=` than those before. Raises OSError."""
        used, limit = self._disk.pins.used_bytes(), self._disk.pins.limit_bytes
        if used <= limit:
            return None
        return f"pins hold {_mib(used)}, and may take {_mib(limit)} of this cache: mount with a larger cache_size="

    async def _require_room(self, missing_bytes: int) -> None:
        """Raises PinsFullError, OSError."""
        room = await trio.to_thread.run_sync(self._disk.pins.room_bytes)
        if missing_bytes > room:
            limit = self._disk.pins.limit_bytes
            raise PinsFullError(
                f"it takes {_mib(missing_bytes)} more, and pins may take {_mib(limit)} of the cache, of which "
                f"{_mib(max(room, 0))} are left: mount with a larger cache_size="
            )


def _mib(count: int) -> str:
    return f"{count / (1 << 20):.1f} MiB"
