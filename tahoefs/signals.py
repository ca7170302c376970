"""SIGTERM and SIGINT: for what serves, the first asks to stop, the second insists; a command just ends."""

from __future__ import annotations

import logging
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

log = logging.getLogger(__name__)


async def stop_on_signals(
    stop: trio.Event, now: trio.CancelScope, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Set `stop` upon the first, cancel `now` upon the second; until cancelled."""
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        task_status.started()
        async for _ in signals:
            if stop.is_set():
                log.warning("stopping at once")
                now.cancel()
            else:
                log.info("stopping")
                stop.set()


@asynccontextmanager
async def until_signal() -> AsyncIterator[trio.CancelScope]:
    """Cancel what is inside upon the first; `scope.cancelled_caught` tells, after that."""

    async def watch() -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async for _ in signals:
                scope.cancel()

    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            yield scope
            nursery.cancel_scope.cancel()
