"""One live connection between two tubs: a stream, the protocol core, and the tasks that join them.

    reader     stream -> core -> answers to whoever waits, calls to handlers
    writer     the core's queue -> stream, first in first out; the only one who sends
    keepalive  asks a silent peer for a sign of life, and ends the connection when there is none

Encoding a message and queueing it is one step without an await, so what the core numbers goes out in that order.
Handlers start in the order their calls came in: each runs up to its first await before the next one starts.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Final

import trio

from grid import stats
from grid.errors import ConnectionLostError, GridError, PeerError, PeerTimeoutError, RemoteProtocolError, Violation
from grid.transports.tls_stream import TLSStream
from grid.wire.banana import PING, ping_token
from grid.wire.calls import RELEASES_BATCH, Answered, Broker, Failed, InboundCall
from grid.wire.negotiation import Agreement
from grid.wire.reference_tables import BROKER_CLID, Names
from grid.wire.references import Releases, RemoteHandle

log = logging.getLogger(__name__)

SERVED_SECONDS: Final = stats.histograms(
    "foolscap_request_seconds", "Seconds a peer's call over Foolscap took us, by method.", label="method"
)

PONG_TIMEOUT_S: Final = 120.0  # a peer that was silent must answer our PING within this
HANDLERS_MAX: Final = 256  # calls of one peer we work on at a time; then we stop reading
UNANSWERED_MAX: Final = 10_000  # calls of ours: who gave up waiting for them cannot make the peer forget them
UNHEARD_BYTES_MAX: Final = 2048  # sent by a master before its slave has shown that it reads banana
CALLS_IN_TURN_MAX: Final = 32  # answered without giving way to other tasks
REPLY_BYTES_MAX: Final = 16 << 20  # replies queued for a peer that does not read; then we stop reading


class PendingCall:
    """A call that was sent. Its answer is kept until somebody asks for it; several may."""

    def __init__(self) -> None:
        self._done = trio.Event()
        self._value: Any = None
        self._error: PeerError | None = None

    async def result(self, timeout_s: float) -> Any:
        """Raises RemoteFailure, ConnectionLostError, PeerTimeoutError, or Violation for an unacceptable answer."""
        with trio.move_on_after(timeout_s):
            await self._done.wait()
        if not self._done.is_set():
            raise PeerTimeoutError(f"no answer within {timeout_s:g} s")
        if self._error is not None:
            # Each waiter gets an exception of its own: tracebacks pile up on one that is raised twice.
            raise type(self._error)(*_arguments_of(self._error))
        return self._value

    @property
    def is_done(self) -> bool:
        return self._done.is_set()

    def _succeed(self, value: Any) -> None:
        self._value = value
        self._done.set()

    def _fail(self, error: PeerError) -> None:
        self._error = error
        self._done.set()


def _arguments_of(error: PeerError) -> tuple[object, ...]:
    names = getattr(error, "__attrs_attrs__", None)
    return tuple(getattr(error, a.name) for a in names) if names is not None else error.args


class RemoteReference(RemoteHandle):
    """One of the peer's objects. Forgetting it, or release(), lets the peer forget it too."""

    __slots__ = ("_connection",)

    def __init__(self, clid: int, interface_name: str, releases: Releases, connection: Connection) -> None:
        super().__init__(clid, interface_name, releases)
        self._connection = connection

    @property
    def tub_id(self) -> str:
        return self._connection.peer_tub_id

    @property
    def connection(self) -> object:
        """What this reference lives on: one and the same for all references that came over one connection."""
        return self._connection

    @property
    def is_lost(self) -> bool:
        return self._connection.is_lost

    async def wait_lost(self) -> None:
        """Return once the connection has ended, and this reference with it."""
        await self._connection.wait_lost()

    def send(self, method: str, *args: object) -> PendingCall:
        """Queue a call, at once and in order; never blocks, so the caller bounds the bytes in flight.

        Large bytes-like arguments are not copied and must not change until the answer is there.
        Raises Violation for arguments that cannot be sent. A lost connection shows in the result.
        """
        return self._connection.send_call(self.clid, self.interface_name, method, args)

    async def call(self, method: str, *args: object, timeout_s: float) -> Any:
        """As send(), and wait for the result."""
        return await self.send(method, *args).result(timeout_s)


class Connection:
    """Made when two tubs have agreed; lives while run() runs."""

    def __init__(self, stream: TLSStream, agreement: Agreement, names: Names, *, keepalive_s: float) -> None:
        self.peer_tub_id = agreement.peer_tub_id
        self.agreement = agreement
        self._stream = stream
        self._keepalive_s = keepalive_s
        self._broker = Broker(
            vocabulary_index=agreement.vocabulary_index,
            peer_tub_id=agreement.peer_tub_id,
            names=names,
            make_handle=partial(RemoteReference, connection=self),
        )
        self._pending: dict[int, PendingCall] = {}
        self._lost = trio.Event()
        self._lost_reason = "connection closed"
        self._scope = trio.CancelScope()
        self._to_write = trio.lowlevel.ParkingLot()
        self._written = trio.lowlevel.ParkingLot()
        self._handler_slots = trio.Semaphore(HANDLERS_MAX)
        self._calls_in_turn = 0
        self._last_received_s = 0.0
        self._heard = trio.Event()  # the peer has sent banana
        self._reading: trio.CancelScope | None = None
        self._draining = False
        self._sending = False

    @property
    def is_lost(self) -> bool:
        return self._lost.is_set()

    async def wait_lost(self) -> None:
        await self._lost.wait()

    def close(self, reason: str) -> None:
        """End the connection soon; run() returns then. New calls fail from now on."""
        if not self._lost.is_set():
            self._lost_reason = reason
            self._lose()
        self._scope.cancel()

    async def drain(self) -> None:
        """Look at nothing more the peer sends, answer the calls that came, and end. Returns when that is done."""
        self._draining = True
        if self._reading is not None:
            self._reading.cancel()
        await self._lost.wait()

    def send_call(
        self,
        clid: int,
        interface_name: str,
        method: str,
        args: Sequence[object],
        keywords: Mapping[str, object] | None = None,
    ) -> PendingCall:
        pending = PendingCall()
        if self._lost.is_set():
            pending._fail(ConnectionLostError(self._lost_reason))
            return pending
        if len(self._pending) >= UNANSWERED_MAX:
            self.close("peer leaves too many calls unanswered")
            return self.send_call(clid, interface_name, method, args, keywords)
        reqid = self._broker.send_call(clid, interface_name, method, args, keywords)
        self._pending[reqid] = pending
        self._to_write.unpark_all()
        return pending

    def get_reference_by_name(self, name: str) -> PendingCall:
        return self.send_call(BROKER_CLID, "", "getReferenceByName", (), {"name": name.encode()})

    async def run(self) -> None:
        """Serve the connection until it ends, then close the stream. Raises nothing but Cancelled."""
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    self._last_received_s = trio.current_time()
                    nursery.start_soon(self._write)
                    nursery.start_soon(self._keep_alive)
                    await self._read(nursery)
                    nursery.cancel_scope.cancel()
        except Exception:
            # A mistake of ours: it costs this connection, and nothing else.
            log.exception("connection to %s failed", self.peer_tub_id[:8])
        finally:
            self._lose()
            with trio.CancelScope(shield=True):
                await self._stream.aclose()  # has a deadline of its own

    def _lose(self) -> None:
        if self._lost.is_set():
            return
        self._lost.set()
        pending, self._pending = self._pending, {}
        for call in pending.values():
            call._fail(ConnectionLostError(self._lost_reason))

    # --- reading

    async def _read(self, nursery: trio.Nursery) -> None:
        try:
            if self.agreement.rest or not self.agreement.is_master:
                self._heard.set()
            await self._receive([self.agreement.rest], nursery)
            while pieces := await self._receive_pieces():
                self._last_received_s = trio.current_time()
                self._heard.set()
                await self._receive(pieces, nursery)
            while self._draining and (
                self._handler_slots.value < HANDLERS_MAX or self._broker.outgoing_bytes or self._sending
            ):
                await self._written.park()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self._lost_reason = "connection broke"
        except RemoteProtocolError as error:
            self._lost_reason = str(error)
            log.warning("dropping connection to %s: %s", self.peer_tub_id[:8], error)
            await self._say_why()

    async def _receive_pieces(self) -> list[bytes]:
        """Empty at the end, also when we are the ones who want it."""
        pieces: list[bytes] = []
        with trio.CancelScope() as self._reading:
            if not self._draining:
                pieces = await self._stream.receive_pieces(self._broker.body_missing)
        self._reading = None
        return pieces

    async def _receive(self, pieces: Sequence[bytes], nursery: trio.Nursery) -> None:
        for event in self._broker.receive_data(*pieces):
            if isinstance(event, InboundCall):
                await self._start_handler(event, nursery)
            elif (call := self._pending.pop(event.reqid, None)) is None:
                continue
            elif isinstance(event, Answered):
                call._succeed(event.value)
            elif isinstance(event, Failed):
                call._fail(event.error)
        if self._broker.releases_waiting >= RELEASES_BATCH:
            self._broker.flush_releases()
        if self._broker.outgoing_bytes:
            self._to_write.unpark_all()
        while self._broker.reply_bytes > REPLY_BYTES_MAX:
            await self._written.park()

    async def _say_why(self) -> None:
        """Give the ERROR token, queued last, a moment to get out."""
        with trio.move_on_after(1.0):
            self._to_write.unpark_all()
            while self._broker.outgoing_bytes:
                await self._written.park()

    # --- calls to our objects

    async def _start_handler(self, call: InboundCall, nursery: trio.Nursery) -> None:
        while self._broker.reply_bytes > REPLY_BYTES_MAX:  # many small calls may ask for large answers
            await self._written.park()
        if call.target.in_turn:
            await self._answer(call)
            self._calls_in_turn += 1
            if self._calls_in_turn % CALLS_IN_TURN_MAX == 0:
                self._to_write.unpark_all()
                await trio.lowlevel.checkpoint()
            return
        await self._handler_slots.acquire()
        started = trio.Event()
        nursery.start_soon(self._handle, call, started)
        # trio starts tasks in any order: the next call must not be looked at before this one has begun.
        await started.wait()

    async def _handle(self, call: InboundCall, started: trio.Event) -> None:
        started.set()  # whoever waits for this runs only when we await something
        try:
            await self._answer(call)
        finally:
            self._handler_slots.release()
        self._to_write.unpark_all()

    async def _answer(self, call: InboundCall) -> None:
        began = trio.current_time()
        try:
            handler = getattr(call.target, f"remote_{call.method}", None)
            if handler is None:
                raise Violation("method not defined")
            value = await handler(*call.arguments, **call.keywords)
        except GridError as error:
            self._broker.send_error(call.reqid, error)
        except Exception as error:
            log.exception("%s.remote_%s failed", type(call.target).__name__, call.method[:80])
            self._broker.send_error(call.reqid, error)
        else:
            self._broker.send_answer(call.reqid, value)
            SERVED_SECONDS.of(call.method).observe(trio.current_time() - began)

    # --- writing

    async def _write(self) -> None:
        try:
            while True:
                while not self._broker.outgoing_bytes:
                    await self._to_write.park()
                if self._broker.outgoing_bytes > UNHEARD_BYTES_MAX and not self._heard.is_set():
                    # Until it has read our decision, a slave takes what follows for text, and not much of that.
                    await self._stream.send_all(ping_token(PING, 0))
                    await self._heard.wait()
                self._sending = True
                await self._stream.send_buffers(self._broker.data_to_send())
                self._sending = False
                self._written.unpark_all()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self.close("connection broke")

    async def _keep_alive(self) -> None:
        while True:
            await trio.sleep_until(self._last_received_s + self._keepalive_s)
            self._broker.flush_releases()
            silent_since_s = self._last_received_s
            if trio.current_time() >= silent_since_s + self._keepalive_s:
                self._broker.send_ping()
                self._to_write.unpark_all()
                await trio.sleep(PONG_TIMEOUT_S)
                if self._last_received_s == silent_since_s:
                    self.close("peer does not answer")
            self._to_write.unpark_all()
