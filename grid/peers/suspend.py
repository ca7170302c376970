"""Notices that the machine was suspended, since nothing else says so.

Time for trio stands still meanwhile, and TCP does not know: connections look alive, though routers and peers may
have forgotten them and our address may be another.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

import trio

LOOK_S: Final = 3.0
SUSPENDED_S: Final = 10.0  # less than that does no harm


def seconds_suspended() -> float:
    """All in all, since the machine was started: one of Linux's clocks runs on, the other does not."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) - time.clock_gettime(time.CLOCK_MONOTONIC)


async def watch_for_suspend(woken: Callable[[], None], clock: Callable[[], float] = seconds_suspended) -> None:
    """Call `woken` soon after every suspend, until cancelled."""
    before_s = clock()
    while True:
        await trio.sleep(LOOK_S)
        now_s = clock()
        if now_s - before_s > SUSPENDED_S:
            woken()
        before_s = now_s
