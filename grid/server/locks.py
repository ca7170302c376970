"""One lock for each storage index somebody uses, for as long as somebody does."""

from __future__ import annotations

import trio
from attrs import define, field


class Locks:
    """`async with locks.hold(storage_index)`: nobody else changes that storage index meanwhile."""

    def __init__(self) -> None:
        self.table: dict[bytes, Lock] = {}

    def hold(self, storage_index: bytes) -> Lock:
        lock = self.table.get(storage_index)
        if lock is None:
            lock = self.table[storage_index] = Lock(storage_index, self.table)
        return lock


@define(eq=False)
class Lock:
    """In its table for as long as somebody holds it or waits. Entering it is no checkpoint when it is free."""

    storage_index: bytes
    table: dict[bytes, Lock] = field(repr=False)
    users: int = 0
    lock: trio.Lock = field(factory=trio.Lock)

    async def __aenter__(self) -> None:
        self.users += 1
        try:
            try:
                self.lock.acquire_nowait()
            except trio.WouldBlock:
                await self.lock.acquire()
        except BaseException:
            self._leave()
            raise

    async def __aexit__(self, *exc_info: object) -> None:
        self.lock.release()
        self._leave()

    def _leave(self) -> None:
        self.users -= 1
        if not self.users:
            del self.table[self.storage_index]
