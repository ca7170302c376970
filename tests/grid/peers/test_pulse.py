"""Noticing a server that hangs, on a virtual clock."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from grid.errors import ConnectionLostError, PeerTimeoutError, RemoteFailure
from grid.peers.pulse import DEAD_AFTER_S, REFRESH_S, SLOW_BYTES_PER_S, SUSPECT_AFTER_S, Pulse


class Server:
    """Answers after `delay_s`, or not at all while `hung`."""

    def __init__(self, pulse: Pulse) -> None:
        self.pulse = pulse
        self.delay_s = 0.1
        self.probes = 0
        self.awake = trio.Event()
        self.awake.set()

    def hang(self) -> None:
        self.awake = trio.Event()

    async def call(self, *, light: bool = False) -> None:
        with self.pulse.call(light=light):
            await trio.sleep(self.delay_s)
            await self.awake.wait()

    async def probe(self) -> None:
        self.probes += 1
        with self.pulse.call():
            with trio.move_on_after(30):
                await trio.sleep(self.delay_s)
                await self.awake.wait()
                return
            raise PeerTimeoutError("late")


async def test_an_idle_server_that_hangs_is_found_out_when_somebody_wonders(
    autojump_clock: trio.testing.MockClock,
) -> None:
    pulse = Pulse()
    server = Server(pulse)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pulse.watch, server.probe)
        for _ in range(2):  # it lives
            pulse.wonder()
            await trio.sleep(SUSPECT_AFTER_S + 1)
            assert pulse.responsive
        assert server.probes == 2
        server.hang()
        await trio.sleep(10)
        assert pulse.responsive  # nobody can know
        pulse.wonder()
        await trio.sleep(SUSPECT_AFTER_S + 0.1)
        assert not pulse.responsive
        pulse.wonder()  # an answer is awaited already
        server.awake.set()
        await trio.testing.wait_all_tasks_blocked()
        assert pulse.responsive
        await trio.sleep(10)
        assert server.probes <= 4
        nursery.cancel_scope.cancel()


async def test_a_silent_server_is_suspect_and_recovers_by_itself(autojump_clock: trio.testing.MockClock) -> None:
    pulse = Pulse()
    server = Server(pulse)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pulse.watch, server.probe)
        await server.call()
        await trio.sleep(100)
        assert pulse.responsive  # silent, but nothing was asked
        server.hang()
        nursery.start_soon(server.call)
        await trio.sleep(SUSPECT_AFTER_S * 0.9)
        assert pulse.responsive
        await trio.sleep(SUSPECT_AFTER_S * 0.2)
        assert not pulse.responsive
        server.awake.set()
        await trio.testing.wait_all_tasks_blocked()
        assert pulse.responsive
        assert server.probes == 1
        nursery.cancel_scope.cancel()


async def test_a_call_given_up_is_not_forgotten(autojump_clock: trio.testing.MockClock) -> None:
    """The asker goes elsewhere after a second; the server is found out all the same, and its coming back too."""
    pulse = Pulse()
    server = Server(pulse)
    server.hang()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pulse.watch, server.probe)
        with trio.move_on_after(1):
            await server.call()
        await trio.sleep(SUSPECT_AFTER_S)
        assert not pulse.responsive
        await trio.sleep(DEAD_AFTER_S / 2)
        assert not pulse.responsive
        server.awake.set()
        await trio.sleep(1)
        assert pulse.responsive
        nursery.cancel_scope.cancel()


async def test_a_server_silent_too_long_loses_its_connection(autojump_clock: trio.testing.MockClock) -> None:
    pulse = Pulse()
    server = Server(pulse)
    server.hang()
    with pulse.call(), pytest.raises(PeerTimeoutError):
        await pulse.watch(server.probe)
    assert DEAD_AFTER_S < trio.current_time() < DEAD_AFTER_S + 60


async def test_an_idle_server_is_asked_now_and_then(autojump_clock: trio.testing.MockClock) -> None:
    pulse = Pulse()
    server = Server(pulse)
    with trio.move_on_after(REFRESH_S * 3.5):
        await pulse.watch(server.probe)
    assert server.probes == 3


async def test_a_slow_line_is_not_a_dead_server(autojump_clock: trio.testing.MockClock) -> None:
    pulse = Pulse()
    with pulse.call(10 * SLOW_BYTES_PER_S):
        await trio.sleep(SUSPECT_AFTER_S + 9)
        assert pulse.responsive
        await trio.sleep(2)
        assert not pulse.responsive
    assert pulse.responsive


async def test_errors_from_the_server_are_signs_of_life(autojump_clock: trio.testing.MockClock) -> None:
    pulse = Pulse()
    with pytest.raises(RemoteFailure), pulse.call():
        await trio.sleep(SUSPECT_AFTER_S + 1)
        raise RemoteFailure("builtins.KeyError", "x")
    assert pulse.responsive
    with pytest.raises(ConnectionLostError), pulse.call():
        await trio.sleep(SUSPECT_AFTER_S + 1)
        raise ConnectionLostError("x")
    assert not pulse.responsive


async def test_one_answer_of_two_restarts_the_clock(autojump_clock: trio.testing.MockClock) -> None:
    pulse = Pulse()
    pulse.asked()
    await trio.sleep(1)
    pulse.asked()
    await trio.sleep(0.9)
    pulse.answered()
    await trio.sleep(SUSPECT_AFTER_S * 0.9)
    assert pulse.responsive
    await trio.sleep(SUSPECT_AFTER_S * 0.2)
    assert not pulse.responsive
    pulse.answered()
    assert pulse.responsive


async def test_latency_follows_light_calls_only(autojump_clock: trio.testing.MockClock) -> None:
    pulse = Pulse()
    server = Server(pulse)
    await server.call()
    assert pulse.latency_s is None
    await server.call(light=True)
    assert pulse.latency_s == pytest.approx(0.1)
    server.delay_s = 1.0
    await server.call(light=True)
    assert 0.1 < pulse.latency_s < 1.0
