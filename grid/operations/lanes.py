"""Doing the same for many things, a few at a time."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

import trio

K = TypeVar("K")
V = TypeVar("V")


async def in_lanes(lanes: int, items: Iterable[K], function: Callable[[K], Awaitable[V]]) -> dict[K, V]:
    """{item: what `function` gave}, up to `lanes` at once. The first exception ends it, and is raised as it is."""
    found: dict[K, V] = {}
    failures: list[Exception] = []
    undone = iter(items)

    async def lane() -> None:
        for item in undone:
            try:
                found[item] = await function(item)
            except Exception as error:  # noqa: BLE001  raised below: the nursery would wrap it in a group
                failures.append(error)
                nursery.cancel_scope.cancel()
                return

    async with trio.open_nursery() as nursery:
        for _ in range(lanes):
            nursery.start_soon(lane)
    if failures:
        raise failures[0]
    return found
