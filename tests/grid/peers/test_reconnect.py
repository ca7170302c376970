"""Back-off, on a virtual clock."""

from __future__ import annotations

import math
import random

import pytest
import trio
import trio.testing

from grid.peers.reconnect import DELAY_MAX_S, FACTOR, STABLE_S, Backoff, Reconnector


class NoJitter(random.Random):
    def normalvariate(self, mu: float = 0.0, sigma: float = 1.0) -> float:
        return mu


async def waited(backoff: Backoff) -> float:
    started = trio.current_time()
    await backoff.wait()
    return trio.current_time() - started


async def test_delays_grow_to_the_cap(autojump_clock: trio.testing.MockClock) -> None:
    backoff = Reconnector(NoJitter()).join()
    delays = [await waited(backoff) for _ in range(8)]
    assert delays == pytest.approx([min(FACTOR**n, DELAY_MAX_S) for n in range(8)])


async def test_jitter_spreads_but_keeps_a_floor(autojump_clock: trio.testing.MockClock) -> None:
    reconnector = Reconnector(random.Random(1))
    delays = [reconnector.jittered(10.0) for _ in range(500)]
    assert len(set(delays)) == 500
    assert math.isclose(sum(delays) / 500, 10.0, rel_tol=0.05)
    assert min(Reconnector(random.Random(1)).jittered(0.0) for _ in range(9)) > 0


async def test_a_lasting_connection_starts_over(autojump_clock: trio.testing.MockClock) -> None:
    backoff = Reconnector(NoJitter()).join()
    for _ in range(5):
        await backoff.wait()
    backoff.connected()
    await trio.sleep(STABLE_S + 1)
    assert await waited(backoff) == pytest.approx(1.0)


async def test_a_flapping_peer_is_not_dialled_faster_and_faster(autojump_clock: trio.testing.MockClock) -> None:
    reconnector = Reconnector(NoJitter())
    flapping, other = reconnector.join(), reconnector.join()
    for _ in range(5):
        flapping.connected()
        await flapping.wait()
    for _ in range(5):
        await other.wait()
    times: list[float] = []

    async def wait_for(backoff: Backoff) -> None:
        times.append(await waited(backoff))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait_for, other)
        await trio.sleep(1)
        flapping.connected()  # must not wake the other any more
        nursery.start_soon(wait_for, flapping)
    assert times == pytest.approx([DELAY_MAX_S, DELAY_MAX_S])


async def test_a_connection_wakes_the_others(autojump_clock: trio.testing.MockClock) -> None:
    reconnector = Reconnector(NoJitter())
    lucky, waiting, gone = reconnector.join(), reconnector.join(), reconnector.join()
    reconnector.leave(gone)
    for backoff in (waiting, gone):
        for _ in range(5):
            await backoff.wait()
    times: dict[str, float] = {}
    started = trio.current_time()

    async def wait(name: str, backoff: Backoff) -> None:
        await backoff.wait()
        times[name] = trio.current_time() - started

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait, "waiting", waiting)
        nursery.start_soon(wait, "gone", gone)
        await trio.sleep(5)
        lucky.connected()
    assert times == pytest.approx({"waiting": 6.0, "gone": DELAY_MAX_S})
    assert await waited(waiting) == pytest.approx(1.0)
