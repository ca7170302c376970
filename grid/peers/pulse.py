"""Whether a connected server still answers.

TCP says nothing when a server hangs. So: when something was asked, and nothing at all was heard for
`SUSPECT_AFTER_S`, the server is suspect, others are asked before it, and it is probed. Any answer clears
the suspicion. A server silent for `DEAD_AFTER_S` loses its connection.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Final

import trio

from grid import stats
from grid.errors import PeerError, PeerTimeoutError, RemoteFailure, Violation

CALLS: Final = stats.counter("server_calls", "Calls to storage servers.")
FAILURES: Final = stats.counter("server_call_failures", "Calls to storage servers that got no answer, or a refusal.")
CALL_BYTES: Final = stats.counter("server_call_bytes", "Bytes of data in calls to storage servers and their answers.")
CALL_SECONDS: Final = stats.histogram("server_call_seconds", "Seconds until storage servers answered, by call.")

SUSPECT_AFTER_S: Final = 2.0
SLOW_BYTES_PER_S: Final = 64 << 10  # what is on its way may take this long: a slow line is not a dead server
DEAD_AFTER_S: Final = 60.0
DOUBT_TIMEOUT_S: Final = 5.0
REFRESH_S: Final = 600.0  # an idle server is asked now and then, also for its free space
_LATENCY_WEIGHT: Final = 0.2


class Pulse:
    """One connection's signs of life. `call()` goes around everything that is asked."""

    def __init__(self) -> None:
        self.latency_s: float | None = None  # moving average over the calls that carry little data
        self._silent_since: float | None = None  # None: every question was answered
        self._unanswered = 0
        self._bytes_moving = 0  # to or from the server, in calls that were not answered yet
        self._asked = trio.Event()
        self._doubted = False
        self._wondered = False
        self._round = trio.CancelScope()  # of watch(), which starts over when it is cancelled

    @property
    def responsive(self) -> bool:
        return self._silent_since is None or trio.current_time() < self._silent_since + self._patience_s

    @property
    def _patience_s(self) -> float:
        return SUSPECT_AFTER_S + self._moving_s

    @property
    def _moving_s(self) -> float:
        return self._bytes_moving / SLOW_BYTES_PER_S

    def asked(self, moved_bytes: int = 0) -> None:
        CALLS.add()
        CALL_BYTES.add(moved_bytes)
        self._expect(moved_bytes)

    def _expect(self, moved_bytes: int = 0) -> None:
        self._unanswered += 1
        self._bytes_moving += moved_bytes
        if self._silent_since is None:
            self._silent_since = trio.current_time()
            self._asked.set()

    def answered(self, moved_bytes: int = 0) -> None:
        self.given_up(moved_bytes)
        # there is life; if more is awaited, the clock starts anew
        self._silent_since = trio.current_time() if self._unanswered else None

    def given_up(self, moved_bytes: int = 0) -> None:
        """Nobody waits for that answer any more. That says nothing about the server."""
        self._unanswered -= 1
        self._bytes_moving -= moved_bytes

    @contextmanager
    def call(self, moved_bytes: int = 0, *, light: bool = False) -> Iterator[None]:
        """Around one call. An error that came from the peer is a sign of life as well.

        `moved_bytes` are those in its arguments or its answer; `light` calls measure the latency.
        """
        started = trio.current_time()
        heard = True
        self.asked(moved_bytes)
        try:
            yield
            took_s = trio.current_time() - started
            CALL_SECONDS.observe(took_s)
            if light:
                before = took_s if self.latency_s is None else self.latency_s
                self.latency_s = before + _LATENCY_WEIGHT * (took_s - before)
        except BaseException as error:
            heard = isinstance(error, RemoteFailure | Violation)
            if isinstance(error, PeerError):
                FAILURES.add()
            raise
        finally:
            if heard:
                self.answered(moved_bytes)
            else:
                self.given_up(moved_bytes)

    @contextmanager
    def dialling(self) -> Iterator[None]:
        """Around one more connection: no call, but a server that hangs does not answer that either."""
        self._expect()
        try:
            yield
        except BaseException:
            self.given_up()
            raise
        self.answered()

    async def watch(self, probe: Callable[[], Awaitable[None]]) -> None:
        """Run `probe` (a call that goes through `call()`) when in doubt, and every REFRESH_S when idle.

        Raises PeerTimeoutError when the server has been silent for DEAD_AFTER_S, or for DOUBT_TIMEOUT_S after doubt().
        """
        while True:
            if self._doubted:
                self._doubted = False
                await self._prove_alive(probe)
            with trio.CancelScope() as self._round:
                await self._watch_once(probe)

    def doubt(self) -> None:
        """The connection may be dead without any sign of it, as after the machine was suspended: ask at once."""
        self._doubted = True
        self._round.cancel()

    def wonder(self) -> None:
        """Others are silent: ask this one for a sign of life too, unless an answer of it is awaited anyway."""
        if self._silent_since is None:
            self._wondered = True
            self._asked.set()

    async def _prove_alive(self, probe: Callable[[], Awaitable[None]]) -> None:
        with trio.move_on_after(DOUBT_TIMEOUT_S) as scope:
            await self._probe(probe)
        if scope.cancelled_caught:
            raise PeerTimeoutError(f"no answer in {DOUBT_TIMEOUT_S:.0f} s, when it was doubted that it is there")

    async def _watch_once(self, probe: Callable[[], Awaitable[None]]) -> None:
        if self._silent_since is None:
            self._asked = trio.Event()
            with trio.move_on_after(0 if self._wondered else REFRESH_S) as idle:
                await self._asked.wait()
            if idle.cancelled_caught or self._wondered:
                self._wondered = False
                await self._probe(probe)
            return
        await trio.sleep_until(self._silent_since + self._patience_s)
        if not self.responsive:
            await self._probe(probe)
        dead_after_s = DEAD_AFTER_S + self._moving_s
        if self._silent_since is not None and trio.current_time() > self._silent_since + dead_after_s:
            raise PeerTimeoutError(f"no answer to anything in {dead_after_s:.0f} s")

    async def _probe(self, probe: Callable[[], Awaitable[None]]) -> None:
        try:
            await probe()
        except PeerTimeoutError:
            pass  # silence goes on
        except PeerError:
            await trio.sleep(SUSPECT_AFTER_S)  # an odd answer; do not ask in a tight loop
