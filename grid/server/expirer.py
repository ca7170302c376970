"""Lease expiry: walks all shares now and then, drops leases that are over, and shares with their last lease.

Off unless asked for; a dry run reports what would go and touches nothing. One cycle walks the buckets in the order of
their names, in slices of at most a second, idle nine tenths of the time; after each slice where it is gets written to
STORE/tahoefs-expirer.json, so that a restart goes on from there. One cycle begins at most every 12 hours.

    age                     expired when its time is over, or when older than `override_lease_duration_s`
    cutoff-date             expired when granted (31 days before its end) before `cutoff`

Kinds of shares not enabled never expire. A share that has no lease is counted, and kept; so is one that cannot be
read. Source: the garbage collection of Tahoe-LAFS 1.20, except for `age` without an override: that is documented there
to mean what it means here, but never expires anything.
"""

from __future__ import annotations

import json
import logging
from bisect import bisect_right
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

import trio
from attrs import asdict, define, field, frozen

from grid.atomic_file import replace_file
from grid.formats import base32
from grid.formats.container import Lease
from grid.server.errors import StorageError
from grid.server.shares import LEASE_PERIOD_S
from grid.server.storage import StorageService

log = logging.getLogger(__name__)

FIRST_START_S: Final = 6 * 60  # after the service began
CYCLE_S: Final = 12 * 3600  # from one start to the next, at least
SLICE_S: Final = 1.0
IDLE_PER_WORK: Final = 9  # nine tenths of the time
HISTORY_MAX: Final = 10  # cycles reported on
CORRUPT_MAX: Final = 1000  # shares named in a report
STATE_FILE: Final = "tahoefs-expirer.json"
STATE_BYTES_MAX: Final = 4 << 20

Kind = Literal["immutable", "mutable"]


@frozen
class ExpiryPolicy:
    """What `expire.*` in tahoe.cfg says."""

    enabled: bool = False
    mode: Literal["age", "cutoff-date"] = "age"
    override_lease_duration_s: int | None = None
    cutoff: int | None = None  # POSIX seconds
    kinds: frozenset[str] = frozenset(("immutable", "mutable"))
    dry_run: bool = False

    def __attrs_post_init__(self) -> None:
        if self.mode == "cutoff-date" and self.cutoff is None:
            raise ValueError("cutoff-date needs a date")

    def is_expired(self, kind: str, expires: int, now: float) -> bool:
        if kind not in self.kinds:
            return False
        granted = expires - LEASE_PERIOD_S
        if self.mode == "cutoff-date":
            assert self.cutoff is not None
            return granted < self.cutoff
        if self.override_lease_duration_s is not None:
            return now - granted > self.override_lease_duration_s
        return expires < now


@define
class CycleReport:
    """What one cycle found and did; in a dry run, what it would have done."""

    started: float
    finished: float | None = None
    dry_run: bool = False
    buckets: int = 0
    shares: dict[str, int] = field(factory=lambda: {"immutable": 0, "mutable": 0})
    leases: int = 0
    leases_expired: int = 0
    shares_without_lease: int = 0
    shares_deleted: int = 0
    bytes_freed: int = 0
    corrupt: list[list[Any]] = field(factory=list)  # [storage index, share number]


@define
class _State:
    last_start: float | None = None
    prefix: str = ""  # the bucket after which to go on; empty: no cycle is under way
    bucket: str = ""
    report: CycleReport | None = None
    history: list[CycleReport] = field(factory=list)


class Expirer:
    """`report` and `history` are for `status`; run() does the work."""

    def __init__(self, service: StorageService, policy: ExpiryPolicy) -> None:
        self._service = service
        self._store = service.store
        self._policy = policy
        self._path = self._store.directory / STATE_FILE
        self._state = _load(self._path)

    @property
    def report(self) -> CycleReport | None:
        """Of the cycle under way."""
        return self._state.report

    @property
    def history(self) -> Sequence[CycleReport]:
        """Of the last cycles, oldest first."""
        return self._state.history

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled; returns at once when expiry is off."""
        task_status.started()
        if not self._policy.enabled:
            return
        await trio.sleep(FIRST_START_S)
        while True:
            if self._state.report is None and self._state.last_start is not None:
                since_s = self._store.clock() - self._state.last_start
                if 0 <= since_s < CYCLE_S:
                    await trio.sleep(CYCLE_S - since_s)
            await self.run_cycle()

    async def run_cycle(self) -> CycleReport:
        """One cycle, or the rest of one that was interrupted. Paced."""
        state = self._state
        if state.report is None or state.report.dry_run != self._policy.dry_run:
            now = self._store.clock()
            state.last_start = now
            state.prefix = state.bucket = ""
            state.report = CycleReport(now, dry_run=self._policy.dry_run)
        report = state.report
        slice_began_s = trio.current_time()
        for prefix in await trio.to_thread.run_sync(self._store.prefixes):
            if prefix < state.prefix:
                continue
            buckets = await trio.to_thread.run_sync(self._store.buckets_in, prefix)
            start = bisect_right(buckets, state.bucket, key=base32.b2a) if prefix == state.prefix else 0
            for storage_index in buckets[start:]:
                async with self._service.hold(storage_index):
                    await trio.to_thread.run_sync(partial(self._examine, storage_index, report))
                state.prefix, state.bucket = prefix, base32.b2a(storage_index)
                worked_s = trio.current_time() - slice_began_s
                if worked_s >= SLICE_S:
                    await self._save()
                    await trio.sleep(IDLE_PER_WORK * worked_s)
                    slice_began_s = trio.current_time()
        report.finished = self._store.clock()
        state.report = None
        state.prefix = state.bucket = ""
        state.history = [*state.history, report][-HISTORY_MAX:]
        await self._save()
        log.info(
            "expiry%s: %d of %d leases over, %d shares deleted, %d bytes freed",
            " (dry run)" if report.dry_run else "",
            report.leases_expired,
            report.leases,
            report.shares_deleted,
            report.bytes_freed,
        )
        return report

    def _examine(self, storage_index: bytes, report: CycleReport) -> None:
        """One bucket, in a thread; its lock is held."""
        report.buckets += 1
        for number in self._store.share_numbers(storage_index):
            try:
                self._examine_share(storage_index, number, report)
            except FileNotFoundError:
                continue
            except (StorageError, OSError) as error:
                log.warning("share %d of %s cannot be examined: %s", number, base32.b2a(storage_index)[:5], error)
                if len(report.corrupt) < CORRUPT_MAX:
                    report.corrupt.append([base32.b2a(storage_index), number])

    def _examine_share(self, storage_index: bytes, number: int, report: CycleReport) -> None:
        kind = self._store.kind_of(storage_index, number)
        now = self._store.clock()
        live = 0
        expired: list[int] = []

        def choose(_version: int, leases: Sequence[Lease]) -> list[int]:
            nonlocal live
            for place, lease in enumerate(leases):
                if kind == "mutable" and not lease.owner:
                    continue
                live += 1
                if self._policy.is_expired(kind, lease.expires, now):
                    expired.append(place)
            return expired

        freed, deleted = self._service.drop_leases(storage_index, number, choose, dry_run=report.dry_run)
        report.shares[kind] += 1
        report.leases += live
        report.leases_expired += len(expired)
        report.shares_without_lease += not live
        report.shares_deleted += deleted
        report.bytes_freed += freed

    async def _save(self) -> None:
        state = json.dumps({"version": 1, **asdict(self._state)}).encode()
        try:
            await trio.to_thread.run_sync(partial(replace_file, self._path, state))
        except OSError as error:
            log.warning("the state of lease expiry cannot be kept: %s", error.strerror)


def _load(path: Path) -> _State:
    """Whatever cannot be read is a fresh start."""
    try:
        if path.stat().st_size > STATE_BYTES_MAX:
            raise ValueError("too large")
        raw = json.loads(path.read_bytes())
        if raw.pop("version") != 1:
            raise ValueError("unknown version")
        report = raw.pop("report")
        history = [_report(item) for item in raw.pop("history")][-HISTORY_MAX:]
        state = _State(**raw, report=None if report is None else _report(report), history=history)
        _check_types(state)
    except FileNotFoundError:
        return _State()
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        log.warning("the state of lease expiry is of no use, starting anew: %s", type(error).__name__)
        return _State()
    return state


def _report(raw: dict[str, Any]) -> CycleReport:
    report = CycleReport(**raw)
    counts = ("buckets", "leases", "leases_expired", "shares_without_lease", "shares_deleted", "bytes_freed")
    if not all(type(getattr(report, name)) is int for name in counts):
        raise ValueError("a count is no number")
    if set(report.shares) != {"immutable", "mutable"} or not isinstance(report.corrupt, list):
        raise ValueError("not a report")
    if not all(type(count) is int for count in report.shares.values()):
        raise ValueError("a count is no number")
    return report


def _check_types(state: _State) -> None:
    if not isinstance(state.prefix, str) or not isinstance(state.bucket, str):
        raise ValueError("no position")
    if state.last_start is not None and not isinstance(state.last_start, int | float):
        raise ValueError("no time")
