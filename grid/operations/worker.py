"""Where CPU work on segments runs: in a worker thread, unless it is too small to be worth the hop; work in lanes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Final, TypeVar

import trio

T = TypeVar("T")

INLINE_BYTES_MAX: Final = 32 << 10  # hashing this much takes about as long as a hop to a thread and back


async def run_cpu_work(work: Callable[[], T], nbytes: int) -> T:
    """Run `work`, which goes over about `nbytes` bytes, without holding up the event loop. A checkpoint.

    Not abandoned on cancellation (its buffers are in use), so one piece of work should be about a segment.
    """
    if nbytes <= INLINE_BYTES_MAX:
        await trio.lowlevel.checkpoint()
        return work()
    return await trio.to_thread.run_sync(work)


async def in_lanes(lanes: int, items: Iterable[T], work: Callable[[T], Awaitable[None]]) -> None:
    """Do `work` on every item, so many at once, begun in their order. An error ends them all."""
    undone = iter(items)

    async def lane() -> None:
        for item in undone:
            await work(item)

    async with trio.open_nursery() as nursery:
        for _ in range(lanes):
            nursery.start_soon(lane)
