"""How fast each server answers, as seen from here: who to ask first, and when an answer counts as late.

One for each grid, so that a server found hanging by one read is avoided by the next, whatever the file.
"""

from __future__ import annotations

import math
from typing import Final
from weakref import WeakKeyDictionary

import trio
from attrs import define, field

from grid.interfaces import IStorageBroker

HEDGE_FIRST_S: Final = 0.8  # while nothing is known: an answer that takes longer is late, another server is asked
HEDGE_MIN_S: Final = 0.5
HEDGE_MAX_S: Final = 10.0
HEDGE_FACTOR: Final = 4.0  # times the usual answer: on a slow line asking twice makes it slower still
AVOID_S: Final = 30.0  # a server that was late is asked last for this long, or until it answers
WEIGHT: Final = 0.3  # of the newest observation in the running averages
FASTEST_S: Final = 0.001  # differences below this are noise


@define(eq=False)
class Responsiveness:
    _latency_s: dict[str, float] = field(factory=dict)  # {server id: running average}
    _late_until: dict[str, float] = field(factory=dict)  # {server id: trio time}
    _usual_s: float | None = None

    def said_what_it_holds(self, server_id: str, seconds: float) -> None:
        """A first impression. One that was late with data may still be: its disk hangs, or its line is full."""
        self._latency_s.setdefault(server_id, seconds)

    def answered(self, server_id: str, seconds: float) -> None:
        """The server sent what was wanted: it is no longer avoided."""
        self._late_until.pop(server_id, None)
        before = self._latency_s.get(server_id, seconds)
        self._latency_s[server_id] = before + WEIGHT * (seconds - before)
        usual = seconds if self._usual_s is None else self._usual_s
        self._usual_s = usual + WEIGHT * (seconds - usual)

    def late(self, server_id: str) -> None:
        self._late_until[server_id] = trio.current_time() + AVOID_S

    def is_late(self, server_id: str) -> bool:
        return self._late_until.get(server_id, -math.inf) > trio.current_time()

    def speed_class(self, server_id: str) -> int:
        """Servers within a factor of about two are the same; smaller is faster."""
        return round(math.log2(max(self._latency_s.get(server_id, FASTEST_S), FASTEST_S)))

    @property
    def hedge_delay_s(self) -> float:
        """An answer is late after this long."""
        if self._usual_s is None:
            return HEDGE_FIRST_S
        return max(HEDGE_MIN_S, min(HEDGE_MAX_S, HEDGE_FACTOR * self._usual_s))


_BY_BROKER: WeakKeyDictionary[IStorageBroker, Responsiveness] = WeakKeyDictionary()


def responsiveness_of(broker: IStorageBroker) -> Responsiveness:
    """The one shared by everything that reads through this broker."""
    return _BY_BROKER.setdefault(broker, Responsiveness())


class Bell:
    """Wakes whoever waits now; ringing twice before anyone looks is ringing once."""

    def __init__(self) -> None:
        self._event = trio.Event()

    def ring(self) -> None:
        self._event.set()

    async def wait_until(self, deadline: float) -> None:
        """Return when rung since the last return, or at `deadline` (trio time)."""
        with trio.CancelScope(deadline=deadline):
            await self._event.wait()
        self._event = trio.Event()
