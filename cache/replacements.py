"""New contents for mutable files, on their way: the latest for each file counts, one publish of a file at a time.

A file that keeps changing is published when it rests (`cache/settling.py`), or when somebody waits for it.

No locks: what is pending changes between awaits only. A publish that has begun is not cancelled when newer contents
come, since half a publish would leave the file in two versions; the newer ones follow it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any, Final

import trio

from cache.journal import Journal
from cache.options import WorkspaceOptions
from cache.pending import Replacement
from cache.sealed import SealedFile
from cache.settling import Settling
from cache.uploads import read_all
from grid.errors import GridError
from grid.operations.changes import Changes

log = logging.getLogger(__name__)

AT_ONCE: Final = 4
TIMEOUT_S: Final = 600.0  # of one publish, all its tries included; and more for a large file:
SLOW_BYTES_PER_S: Final = 64 << 10


class Replacements:
    """By storage index."""

    def __init__(
        self,
        nursery: trio.Nursery,
        client: Any,
        journal: Journal,
        options: WorkspaceOptions,
        retry_delay_s: Callable[[int], float],
        is_awaited: Callable[[Replacement], bool],
    ) -> None:
        self._nursery = nursery
        self._client = client
        self._journal = journal
        self._retry_delay_s = retry_delay_s
        self._is_awaited = is_awaited
        self._settling = Settling(options.settle_s, options.settle_latest_s, trio.current_time)
        self._due: dict[bytes, float] = {}  # when each may be published: it rests until then
        self._latest: dict[bytes, Replacement] = {}
        self._busy: set[bytes] = set()  # a task sees to these
        self._turns = trio.CapacityLimiter(AT_ONCE)
        self._retry = trio.Event()
        self.failing: dict[Replacement, None] = {}

    def __iter__(self) -> Iterator[Replacement]:
        return iter(self._latest.values())

    def find(self, storage_index: bytes) -> Replacement | None:
        """The contents this file will have."""
        return self._latest.get(storage_index)

    def add(self, replacement: Replacement) -> None:
        storage_index = replacement.cap.storage_index
        assert storage_index is not None, "of a mutable file"
        old = self._latest.get(storage_index)
        if old is not None:
            replacement.position = min(replacement.position, old.position)
        self._journal.add(replacement)
        self._latest[storage_index] = replacement
        self._due[storage_index], _ = self._settling.note_name(storage_index)
        if old is not None:
            self._let_go(old)
        if storage_index not in self._busy:
            self._busy.add(storage_index)
            self._nursery.start_soon(self._see_to, storage_index)

    def hurry(self) -> None:
        """Somebody waits: what failed is tried again, and what he waits for rests no longer."""
        self._retry.set()
        self._retry = trio.Event()

    def _let_go(self, replacement: Replacement) -> None:
        self.failing.pop(replacement, None)
        replacement.done = True
        self._journal.settle(replacement)
        replacement.sealed.release()

    async def _see_to(self, storage_index: bytes) -> None:
        """Publish this file's contents until there are none newer."""
        try:
            while storage_index in self._latest:
                await self._rest(storage_index)
                async with self._turns:
                    replacement = self._latest[storage_index]
                    replacement.sending = True
                    try:
                        with trio.fail_after(TIMEOUT_S + replacement.size / SLOW_BYTES_PER_S):
                            await self._publish(replacement)
                    except Exception as error:  # noqa: BLE001  logged there; whatever it is, others must go on
                        failure: Exception | None = error
                    else:
                        failure = None
                    finally:
                        replacement.sending = False
                if self._latest[storage_index] is not replacement:
                    continue
                if failure is None:
                    self._settling.sent_name(storage_index)
                    del self._latest[storage_index]
                    self._let_go(replacement)
                    continue
                self._failed(replacement, failure)
                with trio.move_on_after(self._retry_delay_s(replacement.attempts)):
                    await self._retry.wait()
        finally:
            self._busy.discard(storage_index)
            del self._due[storage_index]

    async def _rest(self, storage_index: bytes) -> None:
        """Until it has rested, however often it is changed meanwhile, or somebody waits for it."""
        while trio.current_time() < self._due[storage_index] and not self._is_awaited(self._latest[storage_index]):
            with trio.move_on_at(self._due[storage_index]):
                await self._retry.wait()

    async def _publish(self, replacement: Replacement) -> None:
        sealed, cap = replacement.sealed.retain(), replacement.cap
        node = self._client.create_node_from_uri(cap)
        try:
            await sealed.check()
            if cap.kind == "sdmf":
                await node.replace(await read_all(sealed))
            else:
                await self._change(node, replacement, sealed)
        finally:
            sealed.release()

    async def _change(self, node: Any, replacement: Replacement, sealed: SealedFile) -> None:
        """In place: where it was written, and to its size; whatever others wrote elsewhere meanwhile stays."""
        contents = sealed.open()
        try:
            await node.apply(Changes(replacement.written(), contents.read, sealed.size))
        finally:
            contents.close()

    def _failed(self, replacement: Replacement, error: Exception) -> None:
        replacement.attempts += 1
        replacement.error = error
        self.failing[replacement] = None
        self._journal.wake()
        if isinstance(error, GridError | OSError | trio.TooSlowError):
            log.warning("replacing a mutable file failed, attempt %d: %s", replacement.attempts, error)
        else:
            log.error("replacing a mutable file failed in an unforeseen way", exc_info=error)
