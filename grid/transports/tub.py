"""A tub: one endpoint identity, its connections, and the objects others can reach on it.

There is at most one connection between two tubs, whoever dialled it, and all FURLs of one tub share it.
`run()` owns every connection; when it is cancelled they all end.

    tub = Tub(make_tub_identity())
    await nursery.start(tub.run)
    server = await tub.get_reference(furl)
    version = await server.call("get_version", timeout_s=30)
"""

from __future__ import annotations

import logging
import secrets
import weakref
from collections.abc import Callable
from typing import Final

import trio
from attrs import define, field

from grid.crypto import TubIdentity
from grid.errors import ConnectionLostError, NegotiationError, PeerError, PeerTimeoutError
from grid.formats import base32
from grid.formats.furl import Furl
from grid.transports.connection import Connection, PendingCall, RemoteReference
from grid.transports.handshake import Handshaker
from grid.transports.tls import TubTLS
from grid.transports.tls_stream import TLSStream
from grid.wire.duplicates import ConnectionRecords, DuplicateConnectionError
from grid.wire.negotiation import Agreement
from grid.wire.references import Referenceable

__all__ = ["PendingCall", "Referenceable", "RemoteReference", "Tub"]

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S: Final = 120.0  # one whole attempt: all hints, down to the agreement
DUPLICATE_WAIT_S: Final = 10.0  # for the connection a peer prefers to ours, after it told us so
NEGOTIATIONS_MAX: Final = 200  # inbound, at a time; more have to wait
SWISSNUM_BYTES: Final = 20
KEEPALIVE_S: Final = 240.0


@define
class _Dial:
    """One attempt to connect to a tub, shared by all who want it."""

    scope: trio.CancelScope
    done: trio.Event = field(factory=trio.Event)
    error: PeerError | None = None


class Tub:
    def __init__(self, identity: TubIdentity, *, keepalive_s: float = KEEPALIVE_S, location: str | None = None) -> None:
        """`location` is a FURL's hints, `tcp:HOST:PORT[,…]`: where others can dial us. None: nowhere."""
        self.tub_id = identity.tub_id
        self._location = location
        self._keepalive_s = keepalive_s
        self._records = ConnectionRecords(secrets.token_hex(8))
        self._handshaker = Handshaker(self.tub_id, TubTLS(identity), self._records)
        self._connections: dict[str, Connection] = {}  # by the peer's tub id
        self._dials: dict[str, _Dial] = {}
        self._registered: dict[str, Referenceable] = {}
        self._minted: weakref.WeakValueDictionary[str, Referenceable] = weakref.WeakValueDictionary()
        self._accepting = trio.CapacityLimiter(NEGOTIATIONS_MAX)
        self._nursery: trio.Nursery | None = None
        self._draining = False

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own the connections until cancelled."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                task_status.started()
                await trio.sleep_forever()
        finally:
            self._nursery = None
            for connection in list(self._connections.values()):
                connection.close("tub stopped")

    async def drain(self) -> None:
        """Accept nobody new, answer the calls that came, end all connections. The caller sets the deadline."""
        self._draining = True
        async with trio.open_nursery() as nursery:
            for connection in list(self._connections.values()):
                nursery.start_soon(connection.drain)

    # --- objects of ours

    def register(self, referenceable: Referenceable, name: str | None = None) -> str:
        """Keep an object for whoever knows its FURL, which is returned: a secret."""
        name = name or base32.b2a(secrets.token_bytes(SWISSNUM_BYTES))
        self._registered[name] = referenceable
        self._names_of(referenceable)[self.tub_id] = name
        return f"pb://{self.tub_id}@{self._location or ''}/{name}"

    def object_by_name(self, name: str) -> Referenceable | None:
        return self._registered.get(name) or self._minted.get(name)

    def furl_of(self, target: Referenceable) -> str | None:
        if self._location is None:
            return None
        names = self._names_of(target)
        name = names.get(self.tub_id)
        if name is None:
            name = names[self.tub_id] = base32.b2a(secrets.token_bytes(SWISSNUM_BYTES))
            self._minted[name] = target
        return f"pb://{self.tub_id}@{self._location}/{name}"

    @staticmethod
    def _names_of(target: Referenceable) -> dict[str, str]:
        # Kept on the object itself, by tub: it may be unhashable, and must not be kept alive for its name.
        names: dict[str, str] = vars(target).setdefault("_names_by_tub", {})
        return names

    # --- connections

    async def get_reference(self, furl: Furl | str, *, timeout_s: float = CONNECT_TIMEOUT_S) -> RemoteReference:
        """The object a FURL names; dials if there is no connection to its tub yet.

        Raises FormatError for a malformed FURL, PeerTimeoutError, ConnectionLostError (also when nobody
        answers at any hint), NegotiationError, or RemoteFailure when the tub has no such object.
        """
        if isinstance(furl, str):
            furl = Furl.parse(furl)
        deadline_s = trio.current_time() + timeout_s
        connection = None
        with trio.move_on_at(deadline_s):
            connection = await self._connection_to(furl)
        if connection is None:
            raise PeerTimeoutError(f"no connection within {timeout_s:g} s")
        call = connection.get_reference_by_name(furl.name)
        reference = await call.result(max(0.0, deadline_s - trio.current_time()))
        if not isinstance(reference, RemoteReference):
            raise NegotiationError("the peer's answer is not a reference")
        return reference

    async def _connection_to(self, furl: Furl) -> Connection:
        tub_id = furl.tub_id
        while True:
            await trio.lowlevel.checkpoint()
            connection = self._connections.get(tub_id)
            if connection is not None and not connection.is_lost:
                return connection
            dial = self._dials.get(tub_id)
            if dial is None:
                if self._nursery is None:
                    raise ConnectionLostError("tub is not running")
                dial = self._dials[tub_id] = _Dial(trio.CancelScope())
                self._nursery.start_soon(self._dial, furl, dial)
            await dial.done.wait()
            if dial.error is not None:
                raise type(dial.error)(*dial.error.args)

    async def _dial(self, furl: Furl, dial: _Dial) -> None:
        """Try all hints at once. The first connection to that tub, also an inbound one, ends it: see _adopt."""
        hints = furl.tcp_hints()
        errors: list[PeerError] = []
        dial.error = ConnectionLostError("tub stopped")
        dial.scope.deadline = trio.current_time() + CONNECT_TIMEOUT_S
        try:
            with dial.scope:
                async with trio.open_nursery() as nursery:
                    for host, port in hints:
                        nursery.start_soon(self._attempt, furl.tub_id, host, port, errors)
                if any(isinstance(error, DuplicateConnectionError) for error in errors):
                    # The connection the peer prefers is here, or on its way.
                    await trio.sleep(0 if self._is_connected(furl.tub_id) else DUPLICATE_WAIT_S)
            if self._is_connected(furl.tub_id):
                dial.error = None
            elif dial.scope.cancelled_caught:
                dial.error = PeerTimeoutError(f"no connection within {CONNECT_TIMEOUT_S:g} s")
            elif errors:
                # What a peer said is more telling than that another address does not answer.
                dial.error = max(errors, key=lambda error: isinstance(error, NegotiationError))
            else:
                dial.error = ConnectionLostError("connection closed" if hints else "no location hints")
        finally:
            del self._dials[furl.tub_id]
            dial.done.set()

    async def _attempt(self, tub_id: str, host: str, port: int, errors: list[PeerError]) -> None:
        try:
            stream, agreement = await self._handshaker.dial(tub_id, host, port)
        except PeerError as error:
            log.debug("dialling %s at %s:%d: %s", tub_id[:8], host, port, error)
            errors.append(error)
            return
        connection = self._adopt(stream, agreement)
        assert self._nursery is not None
        self._nursery.start_soon(self._serve, connection)

    async def accept(
        self, stream: trio.abc.Stream, received: bytes = b"", *, welcomed: Callable[[], object] = lambda: None
    ) -> None:
        """Serve one inbound TCP connection for its whole life. Raises nothing but Cancelled.

        `received` is what a listener that serves several protocols has read of it already; `welcomed` is called once
        the peer has negotiated.
        """
        if self._draining:
            await trio.aclose_forcefully(stream)
            return
        try:
            with trio.fail_after(CONNECT_TIMEOUT_S):
                async with self._accepting:
                    tls_stream, agreement = await self._handshaker.accept(stream, received)
        except (PeerError, trio.TooSlowError) as error:
            await trio.aclose_forcefully(stream)
            log.info("inbound connection refused: %s", error or "too slow")
            return
        welcomed()
        await self._serve(self._adopt(tls_stream, agreement))

    def _is_connected(self, tub_id: str) -> bool:
        connection = self._connections.get(tub_id)
        return connection is not None and not connection.is_lost

    def _adopt(self, stream: TLSStream, agreement: Agreement) -> Connection:
        """The master has chosen this one: an older connection to the same tub ends."""
        connection = Connection(stream, agreement, self, keepalive_s=self._keepalive_s)
        older = self._connections.get(agreement.peer_tub_id)
        self._connections[agreement.peer_tub_id] = connection
        if older is not None:
            older.close("replaced by a newer connection")
        if (dial := self._dials.get(agreement.peer_tub_id)) is not None:
            dial.scope.cancel()
        log.debug("connected to %s", agreement.peer_tub_id[:8])
        return connection

    async def _serve(self, connection: Connection) -> None:
        try:
            await connection.run()
        finally:
            tub_id = connection.peer_tub_id
            if connection.agreement.is_master:
                self._records.forget_live(tub_id, connection.agreement.connection_number)
            if self._connections.get(tub_id) is connection:
                del self._connections[tub_id]
            log.debug("connection to %s ended", tub_id[:8])
