"""Which objects of either side a connection knows, and how often each was passed. Does no I/O.

    ours    clid -> object      counted up for every my-reference sent, down by the peer's decref; gone at zero
    theirs  clid -> interface   counted up for every my-reference received; given back with that count once
                                nobody here holds a handle on it

Numbers (clids) count from 1 in each direction and are never used again on one connection.
Source: foolscap 24.9's reference counting.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Final, Protocol

from attrs import define

from grid.errors import RemoteProtocolError, Violation
from grid.wire.references import Referenceable, Releases, RemoteHandle
from grid.wire.remote_interfaces import RIBroker

BROKER_CLID: Final = 0  # the connection's own object
THEIR_OBJECTS_MAX: Final = 100_000  # ours: references held from one peer
OUR_OBJECTS_MAX: Final = 100_000  # ours: objects a peer may keep alive


class Names(Protocol):
    """What the tub knows of its objects."""

    def object_by_name(self, name: str) -> Referenceable | None: ...

    def furl_of(self, target: Referenceable) -> str | None:
        """None when this tub has no location. Mints a name for an object that has none."""


@define
class _Ours:
    target: Referenceable
    clid: int
    sent: int = 0  # times sent, less what the peer gave back


@define
class _Theirs:
    interface_name: str
    arrivals: int = 0  # my-references received and not given back
    releasing: int = 0  # of the arrivals, those given back in a call not answered yet
    handles: int = 0  # handles on it not released yet


class ReferenceTables:
    def __init__(
        self, peer_tub_id: str, names: Names, make_handle: Callable[[int, str, Releases], RemoteHandle]
    ) -> None:
        self._furl_start = f"pb://{peer_tub_id}".encode()
        self._names = names
        self._make_handle = make_handle
        self._ours: dict[int, _Ours] = {}
        self._our_clids: dict[int, int] = {}  # id(object) -> clid; the object is kept alive by _ours
        self._next_clid = 1
        self._just_sliced: list[_Ours] = []
        self._theirs: dict[int, _Theirs] = {}
        self._releases: deque[int] = deque()

    # --- ours

    def begin_message(self) -> None:
        self._just_sliced = []

    def roll_back_message(self) -> None:
        """What was sliced since begin_message() is not sent after all."""
        for ours in self._just_sliced:
            ours.sent -= 1
            self._retire(ours)

    def slice_own(self, target: Referenceable) -> tuple[int, bytes | None, bytes | None]:
        """(clid, interface name, FURL) for a my-reference; the names only the first time."""
        clid = self._our_clids.get(id(target))
        if clid is not None:
            ours = self._ours[clid]
            ours.sent += 1
            self._just_sliced.append(ours)
            return clid, None, None
        if len(self._ours) >= OUR_OBJECTS_MAX:
            raise Violation("the peer holds too many of our objects")
        furl = self._names.furl_of(target)
        ours = _Ours(target, self._next_clid, 1)
        self._next_clid += 1
        self._ours[ours.clid] = ours
        self._our_clids[id(target)] = ours.clid
        self._just_sliced.append(ours)
        interface = target.remote_interface
        return ours.clid, interface.name.encode() if interface else b"", furl.encode() if furl else None

    def decref(self, clid: int, count: int) -> None:
        """The peer gives back `count` of what we sent. Raises Violation if it was less."""
        ours = self._ours.get(clid)
        if ours is None or not 0 < count <= ours.sent:
            raise Violation("decref of what was not sent")
        ours.sent -= count
        self._retire(ours)

    def _retire(self, ours: _Ours) -> None:
        if ours.sent <= 0 and ours.clid in self._ours:
            del self._ours[ours.clid], self._our_clids[id(ours.target)]

    def target(self, clid: int) -> Referenceable:
        """The object a call is for. Raises Violation."""
        ours = self._ours.get(clid)
        if ours is None:
            raise Violation("no such object")
        return ours.target

    def my_object(self, clid: int) -> Referenceable:
        ours = self._ours.get(clid)
        if ours is None:
            raise RemoteProtocolError("your-reference to an unknown object")
        return ours.target

    def check_call(self, clid: int, method: bytes) -> None:
        interface = RIBroker if clid == BROKER_CLID else self.target(clid).remote_interface
        if interface is not None and method.decode("utf-8", "replace") not in interface.methods:
            raise Violation(f"method not defined in {interface.name}")

    # --- theirs

    def their_object(self, clid: int, interface_name: bytes | None, furl: bytes | None) -> RemoteHandle:
        if furl is not None and not furl.startswith(self._furl_start):
            raise RemoteProtocolError("reference with a FURL of another Tub")
        theirs = self._theirs.get(clid)
        if theirs is None:
            if len(self._theirs) >= THEIR_OBJECTS_MAX:
                raise RemoteProtocolError("too many references")
            theirs = self._theirs[clid] = _Theirs((interface_name or b"").decode("utf-8", "replace"))
        theirs.arrivals += 1
        theirs.handles += 1
        return self._make_handle(clid, theirs.interface_name, self._releases)

    def slice_handle(self, handle: RemoteHandle) -> int:
        """The clid for a your-reference. Raises Violation for a handle that cannot be sent here."""
        if not handle.belongs_to(self._releases):
            raise Violation("a reference that was released, or is of another connection, cannot be sent")
        if handle.clid < 0:
            raise Violation("a bound method cannot be sent home")
        return handle.clid

    @property
    def releases_waiting(self) -> int:
        return len(self._releases)

    def take_releases(self) -> Iterator[tuple[int, int]]:
        """(clid, count) to give back now; call forget_theirs() when the peer has answered that."""
        while self._releases:
            clid = self._releases.popleft()
            theirs = self._theirs.get(clid)
            if theirs is None:
                continue
            theirs.handles -= 1
            count = theirs.arrivals - theirs.releasing
            if theirs.handles == 0 and count:
                theirs.releasing += count
                yield clid, count

    def forget_theirs(self, clid: int, count: int) -> None:
        # Only now: until the peer has answered, the object may arrive again under the same clid, without its
        # interface name.
        theirs = self._theirs[clid]
        theirs.arrivals -= count
        theirs.releasing -= count
        if theirs.arrivals <= 0:
            del self._theirs[clid]
