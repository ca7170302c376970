"""That a suspend is noticed, and no other jump of a clock is taken for one."""

from __future__ import annotations

import trio
import trio.testing

from grid.peers.suspend import LOOK_S, SUSPENDED_S, seconds_suspended, watch_for_suspend


async def test_each_suspend_is_noticed_once(autojump_clock: trio.testing.MockClock) -> None:
    suspended_s = 100.0
    woken: list[float] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch_for_suspend, lambda: woken.append(suspended_s), lambda: suspended_s)
        await trio.sleep(20 * LOOK_S)
        assert woken == []
        suspended_s += SUSPENDED_S / 2
        await trio.sleep(20 * LOOK_S)
        assert woken == []
        for _ in range(2):
            suspended_s += SUSPENDED_S + 1
            await trio.sleep(20 * LOOK_S)
        assert woken == [suspended_s - SUSPENDED_S - 1, suspended_s]
        nursery.cancel_scope.cancel()


def test_the_clocks_are_there() -> None:
    assert seconds_suspended() > -1.0
