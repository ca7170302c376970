"""SIGTERM and SIGINT: the first asks to stop, the second insists."""

from __future__ import annotations

import logging
import signal

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
