"""Which of two connections between the same pair of tubs lives on. Does no I/O.

Only the master (the side with the greater tub id) decides, on what the other side's hello says of earlier
connections; the other side keeps what it was told, and tells it when it dials again.

    master gives every connection to a tub the next number, and remembers it for the one that is live;
    slave  remembers (master's incarnation, number) of the last one, and sends it as `last-connection`.

Source: foolscap 24.9's duplicate handling.
"""

from __future__ import annotations

from typing import Any, Final

from attrs import define, field

from grid.errors import NegotiationError

LastConnection = tuple[str, int]  # (incarnation, number); the incarnation is "none" at first
NEVER: Final[LastConnection] = ("none", 0)
PEERS_MAX: Final = 10_000  # ours: strangers may come under ever new tub ids; the oldest are forgotten


class DuplicateConnectionError(NegotiationError):
    """The master already has a connection between these two tubs that it prefers."""


@define
class _Live:
    incarnation: str | None  # the peer's, as its hello told
    number: int


@define
class ConnectionRecords:
    """What one tub remembers of its connections, for as long as the process lives."""

    incarnation: str  # ours: 16 hex digits, random per process
    _live: dict[str, _Live] = field(factory=dict, init=False)  # by peer's tub id; where we are the master
    _last_given: dict[str, int] = field(factory=dict, init=False)  # where we are the master
    _last_told: dict[str, LastConnection] = field(factory=dict, init=False)  # where we are the slave

    def last_told(self, peer_tub_id: str) -> LastConnection:
        return self._last_told.get(peer_tub_id, NEVER)

    def remember_told(self, peer_tub_id: str, last: LastConnection) -> None:
        self._last_told[peer_tub_id] = last
        _bound(self._last_told)

    def accept(self, peer_tub_id: str, incarnation: str | None, last: LastConnection | None) -> int:
        """As master: the number of the new connection, or DuplicateConnectionError if the old one stays.

        None for what the peer's hello did not say.
        """
        live = self._live.get(peer_tub_id)
        if live is not None and not self._replaces(live, incarnation, last):
            raise DuplicateConnectionError("Duplicate connection")
        number = self._last_given.get(peer_tub_id, 0) + 1
        self._last_given[peer_tub_id] = number
        _bound(self._last_given)
        self._live[peer_tub_id] = _Live(incarnation, number)
        return number

    def _replaces(self, live: _Live, incarnation: str | None, last: LastConnection | None) -> bool:
        if incarnation is None or last is None:
            return False
        if incarnation != live.incarnation:
            return True  # the peer was restarted
        if last[0] == "none":
            return False  # one of several attempts made at once
        if last[0] != self.incarnation:
            return True  # the peer remembers an earlier life of ours
        return last[1] == live.number  # it knows of the live one and dials all the same: that one is dead there

    def forget_live(self, peer_tub_id: str, number: int) -> None:
        """As master: the connection of that number has ended."""
        live = self._live.get(peer_tub_id)
        if live is not None and live.number == number:
            del self._live[peer_tub_id]


def _bound(by_peer: dict[str, Any]) -> None:
    while len(by_peer) > PEERS_MAX:
        del by_peer[next(iter(by_peer))]
