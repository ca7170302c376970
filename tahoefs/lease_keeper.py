"""Renews the leases of everything a mount can reach, now and then, so that servers do not drop it.

One walk over the tree every `renew_every_s`, one object each PACE_S at most: nobody notices. What was renewed is
noted in the check history: a mount that is stopped goes on there next time, and `status` knows the oldest lease. What
fails keeps its old date and is tried again after RETRY_S; what is gone from the tree is forgotten at the end of a walk.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable
from contextlib import aclosing
from typing import Any, Final, Self

import trio
from attrs import define, field

import grid
from grid.check_history import CheckHistory
from grid.nodes.checker import Checker
from grid.nodes.traversal import Visit, walk
from tahoefs.deep_check import root_key

log = logging.getLogger(__name__)

FIRST_AFTER_S: Final = 120.0  # a mount has better things to do when it begins
PACE_S: Final = 0.25  # between two objects
RETRY_S: Final = 6 * 3600.0
DUE_SHARE: Final = 0.5  # of `renew_every_s`: what is younger than that when a walk comes by is left for the next
OBJECT_TIMEOUT_S: Final = 120.0


@define(eq=False)
class LeaseKeeper:
    """One mount's. run() it in the mount's nursery; `status()` at any time."""

    _client: grid.GridClient
    _checker: Checker
    _history: CheckHistory
    _root: grid.Cap = field(repr=False)
    _renew_every_s: float
    _clock: Callable[[], float] = time.time  # POSIX seconds
    _walking: bool = False
    _key: bytes = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._key = root_key(self._root)

    @classmethod
    def open(cls, client: grid.GridClient, root: grid.Cap | None, renew_every_s: float | None) -> Self | None:
        """None if nothing is to be renewed, or it cannot be remembered what was: a mount must not fail for that."""
        if root is None or renew_every_s is None:
            return None
        try:
            history = CheckHistory(client.node.path)
        except grid.NodeDirectoryError as error:
            log.warning("leases are not renewed: %s", error)
            return None
        return cls(client, client.checker(history), history, root, renew_every_s)

    def status(self) -> dict[str, Any]:
        """Times in seconds; None where nothing is known yet."""
        oldest = last = None
        with contextlib.suppress(grid.NodeDirectoryError):
            oldest, last = self._history.oldest_lease(self._key), self._history.last_lease_cycle(self._key)
        now = self._clock()
        return {
            "renew_every_s": self._renew_every_s,
            "oldest_s": None if oldest is None else now - oldest,
            "last_walk_s": None if last is None else now - last,
            "walking": self._walking,
        }

    async def run(self) -> None:
        """Until cancelled; then the history is closed."""
        with self._history:
            await trio.sleep(FIRST_AFTER_S)
            while True:
                try:
                    await trio.sleep(self._wait_s())
                    failures = f"of {count} objects" if (count := await self.renew_all()) else ""
                except grid.GridError as error:
                    failures = str(error)
                if failures:
                    log.warning("leases not renewed: %s; again in %.0f h", failures, RETRY_S / 3600)
                    await trio.sleep(RETRY_S)

    def _wait_s(self) -> float:
        last = self._history.last_lease_cycle(self._key)
        return 0.0 if last is None else max(0.0, math.ceil(last + self._renew_every_s - self._clock()))

    async def renew_all(self) -> int:
        """One walk. Returns how many objects could not be renewed everywhere; 0 ends the cycle."""
        cycle, failures = self._history.lease_cycle(self._key), 0
        began = self._clock()
        self._walking = True
        try:
            async with aclosing(walk(self._client.nodemaker, self._root)) as visits:
                async for visit in visits:
                    failures += not await self._renew(visit, cycle)
        finally:
            self._walking = False
        if not failures:
            self._history.finish_lease_cycle(self._key, began, cycle)
        return failures

    async def _renew(self, visit: Visit, cycle: int) -> bool:
        """Whether there is nothing left to do about this object."""
        if (key := visit.key) is None:
            return True
        at = self._history.lease_of(self._key, key)
        if at is not None and self._clock() - at < DUE_SHARE * self._renew_every_s:
            self._history.note_lease(self._key, key, None, cycle)
            return visit.error is None
        await trio.sleep(PACE_S)
        try:
            with trio.fail_after(OBJECT_TIMEOUT_S):
                results = await self._checker.check(visit.cap)
                renewed, failed = await self._checker.renew_leases(results)
        except (grid.GridError, trio.TooSlowError) as error:
            log.info("a lease was not renewed: %s", error)
            return False
        if not renewed or failed or results.silent:
            self._history.note_lease(self._key, key, None, cycle)
            return False
        self._history.note_lease(self._key, key, self._clock(), cycle)
        return visit.error is None
