"""Objects that can be passed by reference over a connection: ours, and the peer's.

Ours are subclasses of `Referenceable`; the peer's reach us as a `RemoteHandle` (which the transport extends
with calls). Each arrival of a my-reference makes one handle of its own, so that whoever got it can release it
without asking who else holds another.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Protocol

if TYPE_CHECKING:
    from grid.wire.schemas import RemoteInterface


class Referenceable:
    """One of our objects that a peer may call: `async def remote_<method>(self, *args)`.

    Plain `Referenceable()` is a canary: an object without methods or interface, passed so that the peer can
    notice the end of the connection.
    """

    remote_interface: ClassVar[RemoteInterface | None] = None

    # Set by objects whose methods never wait for the peer: calls are then answered one after another, without a task
    # for each. While one is at work nothing more is read from that connection, which bounds what it can ask for.
    in_turn: ClassVar[bool] = False


class RemoteHandle:
    """The right to call one of the peer's objects, for as long as the connection lives."""

    __slots__ = ("__weakref__", "_released", "_releases", "clid", "interface_name")

    def __init__(self, clid: int, interface_name: str, releases: Releases) -> None:
        self.clid = clid
        self.interface_name = interface_name
        self._releases = releases
        self._released = False

    def release(self) -> None:
        """Tell the peer, some time soon, that this handle is no longer wanted. Harmless when repeated."""
        if not self._released:
            self._released = True
            self._releases.append(self.clid)

    def belongs_to(self, releases: Releases) -> bool:
        """Whether this handle, unreleased, is of the connection that has this list of releases."""
        return self._releases is releases and not self._released

    def __del__(self) -> None:
        # A handle that was simply forgotten must not keep the peer's object alive for a month. Appending to
        # a deque is all that is safe here: this may run in the middle of anything, in any thread.
        self.release()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.clid} {self.interface_name or '(untyped)'}>"


class Releases(Protocol):
    """Where released clids wait to be told to the peer: a deque."""

    def append(self, clid: int, /) -> None: ...
