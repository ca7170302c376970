"""What is held for as long as somebody uses it: one lock for each storage index, open files."""

from __future__ import annotations

from typing import Generic, Protocol, TypeVar

import trio
from attrs import define, field

K = TypeVar("K")
K_contra = TypeVar("K_contra", contravariant=True)
V = TypeVar("V")


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


class Keeper(Protocol[K_contra, V]):
    """Who has the files."""

    def acquire(self, key: K_contra, /) -> V: ...
    def release(self, key: K_contra, held: V, /) -> None: ...


class Use(Generic[K, V]):
    """`with` it, what the keeper has under that key is acquired, and released after. Many uses are small: a context
    manager that is a generator takes longer than all the rest of them.
    """

    __slots__ = ("_held", "_keeper", "_key")

    def __init__(self, keeper: Keeper[K, V], key: K) -> None:
        self._keeper = keeper
        self._key = key

    def __enter__(self) -> V:
        self._held = self._keeper.acquire(self._key)
        return self._held

    def __exit__(self, *_: object) -> None:
        self._keeper.release(self._key, self._held)
