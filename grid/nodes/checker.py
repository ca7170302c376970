"""Checker: checks, verifies, repairs, and renews leases; remembers what it found.

    check, verify     any cap will do, a verify cap too
    repair            immutable files: a verify cap; mutable files and directories: the write cap
    renew_leases      any cap

Source: the IChecker of the 2008 interface document, with the results of Tahoe-LAFS 1.20.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from attrs import define, field

from grid.check_history import CheckHistory
from grid.errors import GridError, NotWriteableError
from grid.formats.caps import Cap, CHKReadCap, CHKVerifyCap, DirectoryCap, parse_known_cap
from grid.interfaces import IStorageBroker
from grid.nodes.nodemaker import NodeMaker
from grid.operations.check import check_cap
from grid.operations.check_results import CheckResults, RepairResults
from grid.operations.leases import Secrets, renew_leases
from grid.operations.repair import repair_immutable


@define(eq=False)
class Checker:
    """IChecker. One for each grid; `history` may be shared by several."""

    _broker: IStorageBroker
    _secrets: Secrets = field(repr=False)
    _nodemaker: NodeMaker
    _history: CheckHistory
    _clock: Callable[[], float] = time.time

    async def check(self, uri_to_check: str | Cap) -> CheckResults:
        """Who says to hold which share. Raises BadCapError."""
        return await self._check(_parsed(uri_to_check), verify=False)

    async def verify(self, uri_to_check: str | Cap) -> CheckResults:
        """The same with every byte of every share read and proven. Raises BadCapError."""
        return await self._check(_parsed(uri_to_check), verify=True)

    def checker_results_for(self, uri_to_check: str | Cap) -> list[tuple[float, dict[str, Any]]]:
        """(POSIX seconds, results as JSON) of earlier checks, oldest first. Raises BadCapError."""
        storage_index = _parsed(uri_to_check).storage_index
        return [] if storage_index is None else self._history.results_for(storage_index)

    async def _check(self, cap: Cap, *, verify: bool) -> CheckResults:
        results = await check_cap(self._broker, cap, verify=verify)
        self._remember(results)
        return results

    def _remember(self, results: CheckResults) -> None:
        if results.storage_index is not None:
            at = self._clock()
            self._history.remember(results.storage_index, at, verified=results.verified, results=results.to_json())

    async def repair(self, uri: str | Cap, *, verify: bool = False) -> RepairResults:
        """Check (or `verify`), and repair if it is not healthy. Look at the results for what could not be repaired.

        Raises BadCapError, and NotWriteableError where the cap does not allow what would have to be done.
        """
        cap = _parsed(uri)
        before = await self._check(cap, verify=verify)
        file = cap.file if isinstance(cap, DirectoryCap) else cap
        if before.healthy:
            return RepairResults(before, before, attempted=False)
        if isinstance(file, CHKReadCap | CHKVerifyCap):
            results = await repair_immutable(self._broker, self._secrets, file.verifier, before)
        else:
            results = await self._repair_mutable(cap, before)
        if results.attempted:
            self._remember(results.after)
        return results

    async def _repair_mutable(self, cap: Cap, before: CheckResults) -> RepairResults:
        if cap.is_readonly:
            raise NotWriteableError("repairing a mutable file or directory takes its write cap")
        if not before.recoverable:
            return RepairResults(before, before, attempted=False, reason="too few shares are left of any version")
        try:
            damaged = {(share.server_id, share.share_number) for share in before.corrupt}
            merged = await self._nodemaker.create_from_cap(cap).repair(damaged=damaged)
        except NotWriteableError:
            raise
        except GridError as error:
            return RepairResults(before, before, attempted=True, reason=str(error))
        after = await check_cap(self._broker, cap, verify=before.verified)
        reason = f"{merged} versions had the same number: {_MERGED[cap.is_directory]}" if merged > 1 else ""
        return RepairResults(before, after, attempted=True, reason=reason)

    async def renew_leases(self, results: CheckResults) -> tuple[int, int]:
        """On every server that holds a share of what was checked. (Servers where it worked, where it did not.)"""
        if results.storage_index is None:
            return 0, 0
        servers = self._broker.get_permuted_servers(results.storage_index)
        holders = [server for server in servers if server.server_id in results.holders]
        outcome = await renew_leases(holders, self._secrets, results.storage_index)
        renewed = sum(error is None for error in outcome.values())
        return renewed, len(outcome) - renewed


_MERGED = {True: "their children were merged", False: "the best of them stays"}


def _parsed(uri: str | Cap) -> Cap:
    return parse_known_cap(uri) if isinstance(uri, str) else uri
