"""Checks many objects, such as everything below a directory: several at a time, and tells of each in their order.

    walk ── OBJECTS_AT_ONCE checks, repairs, lease renewals ── a window of WINDOW objects ── emit, in order

Memory does not grow with the tree: neither objects nor results are kept, of unhealthy ones LISTED_MAX are named at the
end. What was checked is noted in the history; an interrupted check that is resumed walks again, and takes from there
what it knows. Source: the units of Tahoe-LAFS 1.20's stream-deep-check, without caps.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any, Final

import trio
from attrs import define, field, frozen

import grid
from grid.check_history import CheckHistory
from grid.formats.base32 import b2a
from grid.nodes.checker import Checker
from grid.nodes.deep_stats import DeepStats
from grid.nodes.traversal import Visit, visit_key
from grid.operations.check_results import CheckResults, RepairResults

log = logging.getLogger(__name__)

OBJECTS_AT_ONCE: Final = 8
WINDOW: Final = 64  # objects begun and not told of yet
LISTED_MAX: Final = 1000  # unhealthy objects named in the totals

Json = dict[str, Any]


@frozen
class Wish:
    """What to do to each object."""

    verify: bool = False
    repair: bool = False
    add_lease: bool = False

    def __str__(self) -> str:
        return " ".join(name for name in ("verify", "repair", "add_lease") if getattr(self, name)) or "check"


@frozen
class Outcome:
    """Of one object: JSON as the web API has it, and what was done about leases."""

    results: CheckResults  # how things are now
    json: Json  # check-results or check-and-repair-results
    note: str = ""  # what else there is to say
    leases: tuple[int, int] = (0, 0)  # servers where it was renewed, servers where that failed


async def look_after(checker: Checker, cap: grid.Cap, wish: Wish) -> Outcome:
    """Check one object as wished. Raises NotWriteableError when a repair is called for that the cap does not allow."""
    if wish.repair:
        repaired = await checker.repair(cap, verify=wish.verify)
        json, results, note = repaired.to_json(), repaired.after, repaired.reason or _done(repaired)
    else:
        results = await (checker.verify(cap) if wish.verify else checker.check(cap))
        json, note = results.to_json(), ""
    leases = await checker.renew_leases(results) if wish.add_lease else (0, 0)
    return Outcome(results, json, note, leases)


def _done(repaired: RepairResults) -> str:
    return "repaired" if repaired.successful else ""


@define
class Totals:
    """Of a deep check so far, and of what was found before it was interrupted."""

    stats: DeepStats = field(factory=DeepStats)
    objects: int = 0  # told of, literals too
    checked: int = 0
    healthy: int = 0
    unrecoverable: int = 0
    unread: int = 0  # directories that could not be read, so nobody knows what is below
    corrupt_shares: int = 0
    repairs_attempted: int = 0
    repairs_successful: int = 0
    leases_renewed: int = 0
    leases_failed: int = 0
    unhealthy_paths: list[list[str]] = field(factory=list)

    @property
    def unhealthy(self) -> int:
        return self.checked - self.healthy

    @property
    def healthy_all(self) -> bool:
        return not self.unhealthy and not self.unread

    @property
    def recoverable_all(self) -> bool:
        return not self.unrecoverable and not self.unread

    def add(self, unit: Json) -> None:
        self.objects += 1
        self.unread += "error" in unit
        repair = unit.get("check-and-repair-results")
        before = repair.get("pre-repair-results", repair) if repair else unit.get("check-results", {})
        now = repair.get("post-repair-results", repair) if repair else before
        if not now.get("storage-index"):
            return
        self.checked += 1
        self.healthy += now["results"]["healthy"]
        self.unrecoverable += not now["results"]["recoverable"]
        self.corrupt_shares += before["results"]["count-corrupt-shares"]
        if repair:
            self.repairs_attempted += repair["repair-attempted"]
            self.repairs_successful += repair["repair-successful"]
        renewed, failed = unit.get("leases", (0, 0))
        self.leases_renewed += renewed
        self.leases_failed += failed
        if not now["results"]["healthy"] and len(self.unhealthy_paths) < LISTED_MAX:
            self.unhealthy_paths.append(unit["path"])

    def to_json(self) -> Json:
        counts = {
            "count-objects-checked": self.checked,
            "count-objects-healthy": self.healthy,
            "count-objects-unhealthy": self.unhealthy,
            "count-objects-unrecoverable": self.unrecoverable,
            "count-directories-unread": self.unread,
            "count-corrupt-shares": self.corrupt_shares,
            "count-repairs-attempted": self.repairs_attempted,
            "count-repairs-successful": self.repairs_successful,
            "count-leases-renewed": self.leases_renewed,
            "count-leases-failed": self.leases_failed,
        }
        return {"type": "totals", **counts, "list-unhealthy-files": self.unhealthy_paths}


def unit_of(visit: Visit) -> Json:
    """What every stream of Tahoe's web API says of an object, but for its caps."""
    cap, index = visit.cap, visit.cap.storage_index
    kind = "unknown" if isinstance(cap, grid.UnknownCap) else "directory" if cap.is_directory else "file"
    unit: Json = {"path": list(visit.path), "type": kind, "storage-index": b2a(index) if index else ""}
    if visit.error is not None:
        unit["error"] = str(visit.error)
    return unit


def root_key(cap: grid.Cap) -> bytes:
    """What stands for a root in the history; tells nothing of its cap."""
    return visit_key(cap) or bytes(16)


@define(eq=False)
class DeepCheck:
    """One deep check. `emit` is called with each object's unit, in the order of the walk."""

    checker: Checker
    history: CheckHistory
    wish: Wish
    emit: Callable[[Json], None]
    totals: Totals = field(factory=Totals)

    async def run(self, root: bytes, visits: AsyncGenerator[Visit, None], *, resume: bool = False) -> Totals:
        """Check all of `visits`; `resume` goes on with the last one of this `root` (16 bytes that stand for where they
        come from) and wish, if that was interrupted.
        """
        number = self.history.begin_run(root, str(self.wish), time.time(), resume=resume)
        limiter = trio.CapacityLimiter(OBJECTS_AT_ONCE)
        send, receive = trio.open_memory_channel[tuple[Visit, Json, trio.Event]](WINDOW)

        async def look(visit: Visit, unit: Json, done: trio.Event) -> None:
            async with limiter:
                await self._look(number, visit, unit)
            done.set()

        async def tell() -> None:
            async for visit, unit, done in receive:
                await done.wait()
                self.totals.stats.add(visit)
                self.totals.add(unit)
                self.emit(unit)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(tell)
            async with send, aclosing(visits):
                async for visit in visits:
                    unit, done = unit_of(visit), trio.Event()
                    await send.send((visit, unit, done))
                    nursery.start_soon(look, visit, unit, done)
        self.history.finish_run(number, time.time())
        return self.totals

    async def _look(self, number: int, visit: Visit, unit: Json) -> None:
        key = visit.key
        if key is not None and (known := self.history.checked_in(number, key)) is not None:
            unit |= known
            return
        found = await self._outcome(visit.cap)
        unit |= found
        if key is not None:
            self.history.note_checked(number, key, found)

    async def _outcome(self, cap: grid.Cap) -> Json:
        name = "check-and-repair-results" if self.wish.repair else "check-results"
        try:
            outcome = await look_after(self.checker, cap, self.wish)
        except grid.NotWriteableError as error:
            results = await self.checker.check(cap)
            unrepaired = RepairResults(results, results, attempted=False, reason=str(error))
            outcome = Outcome(results, unrepaired.to_json(), unrepaired.reason)
        found: Json = {name: outcome.json}
        if outcome.note:
            found["note"] = outcome.note
        if self.wish.add_lease:
            found["leases"] = list(outcome.leases)
        return found
