"""Where CPU work on segments runs: in a worker thread, unless it is too small to be worth the hop."""

from __future__ import annotations

from collections.abc import Callable
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
