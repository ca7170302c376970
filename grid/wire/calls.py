"""One connection after negotiation: calls, answers and the tables of references. Does no I/O.

    call    reqid  target clid  method name  arguments      reqid 0: no answer wanted
    answer  reqid  value
    error   reqid  failure

Bytes received come in by receive_data(), which returns what happened, in order; bytes to send gather in a
first-in first-out list that data_to_send() empties. What the connection's own object is asked
(getReferenceByName, decref) and PINGs are answered in here.
Source: foolscap 24.9's broker, as Tahoe-LAFS 1.20 uses it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from attrs import field, frozen

from grid.errors import PeerError, RemoteFailure, RemoteProtocolError, Violation
from grid.wire.banana import (
    ERROR,
    INT_MAX,
    PING,
    PONG,
    STRING_BYTES_MAX,
    VOCABULARIES,
    Pieces,
    TokenReader,
    error_token,
    ping_token,
)
from grid.wire.failures import failure_to_send, shown
from grid.wire.plain_calls import PlainCall, read_plain_call
from grid.wire.reference_tables import BROKER_CLID, Names, ReferenceTables
from grid.wire.references import Referenceable, Releases, RemoteHandle
from grid.wire.remote_interfaces import INTERFACES, RIBroker
from grid.wire.schemas import ANY, RemoteInterface, Schema
from grid.wire.slicers import Buffer, MessageWriter
from grid.wire.unslicers import Arguments, Message, MessageReader, SpoiledMessage

log = logging.getLogger(__name__)

BUFFER_BYTES: Final = 64  # what a buffer costs beside its contents: a PONG has one byte of those
STRANGER_STRING_BYTES_MAX: Final = 64 << 10  # from a peer that named no object of ours, and of which we asked nothing
RELEASES_BATCH: Final = 32  # clids released before we tell the peer without being asked to


@frozen
class InboundCall:
    """A peer calls one of our objects; give the result to send_answer() or send_error(), unless reqid is 0."""

    reqid: int
    target: Referenceable
    method: str
    arguments: tuple[Any, ...] = field(repr=False)  # secrets among them
    keywords: Mapping[str, Any] = field(repr=False)  # only for objects without an interface


@frozen
class Answered:
    reqid: int
    value: Any = field(repr=False)


@frozen
class Failed:
    """A call of ours failed: the peer said so, or its answer was not acceptable."""

    reqid: int
    error: PeerError


Event = InboundCall | Answered | Failed


class Broker:
    """Raises RemoteProtocolError from receive_data(), once: the ERROR token to send is then queued already."""

    def __init__(
        self,
        *,
        vocabulary_index: int,
        peer_tub_id: str,
        names: Names,
        make_handle: Callable[[int, str, Releases], RemoteHandle] = RemoteHandle,
    ) -> None:
        self._names = names
        self._tables = ReferenceTables(peer_tub_id, names, make_handle)
        vocabulary = VOCABULARIES[vocabulary_index]
        self._tokens = TokenReader(vocabulary)
        self._tokens.string_bytes_max = STRANGER_STRING_BYTES_MAX
        self._reader = MessageReader(self._tables)
        self._reads_plain_calls = vocabulary is VOCABULARIES[1]
        self._writer = MessageWriter(vocabulary, self._tables.slice_own, self._tables.slice_handle)
        self._outgoing: list[Buffer] = []
        self.outgoing_bytes = 0  # queued
        self.reply_bytes = 0  # of those: answers, errors and PONGs, which the peer makes us send
        self._waiting: dict[int, tuple[Schema, int, int]] = {}  # reqid -> (schema, clid and count being released)
        self._next_reqid = 1
        self._executing: set[int] = set()

    # --- receiving

    @property
    def body_missing(self) -> int:
        """Bytes that will come before anything can happen: the rest of a long string."""
        return self._tokens.body_missing

    def receive_data(self, *pieces: bytes) -> list[Event]:
        """What came, in order, means what follows."""
        events: list[Event] = []
        self._tokens.receive_data(*pieces)
        try:
            while (message := self._plain_call() or self._next_message()) is not None:
                self._dispatch(message, events)
        except _PeerReportedError:
            raise
        except RemoteProtocolError as error:
            self._queue([error_token(str(error))])
            raise
        return events

    def _plain_call(self) -> Message | None:
        """The next message, if it is a plain call; the beginning of another one goes to the reader of messages."""
        if not self._reads_plain_calls or self._reader.is_under_way:
            return None
        if (call := self._tokens.take(self._read_plain_call)) is None:
            return None
        if call.is_whole:
            self._reader.skip_call()
            return call.message()
        self._reader.begin_call(call.numbers, call.items, [call.count, *call.arguments])
        return None

    def _read_plain_call(self, data: bytes, position: int) -> tuple[PlainCall, int] | None:
        if (call := read_plain_call(data, position)) is None:
            return None
        _, clid, method = call.items
        try:
            self._tables.check_call(clid, method)
        except Violation:
            return None
        return call, call.end

    def _next_message(self) -> Message | SpoiledMessage | None:
        """None when no more of them came whole."""
        tokens, reader = self._tokens, self._reader
        while (token := tokens.next_token()) is not None:
            kind, number = token
            if kind == PING:
                self._queue([ping_token(PONG, number)], is_reply=True)
            elif kind == ERROR:
                raise _PeerReportedError(f"peer reported: {shown(number)}")
            elif kind != PONG and (message := reader.feed(token)) is not None:
                return message
        return None

    def _dispatch(self, message: Message | SpoiledMessage, events: list[Event]) -> None:
        if isinstance(message, SpoiledMessage):
            if message.opentype != b"call":
                self._finish_call(message.reqid, Violation(message.reason), events)
            elif not message.aborted:
                self._begin_executing(message.reqid)
                self.send_error(message.reqid, Violation(message.reason))
        elif message.opentype == b"call":
            reqid, clid, method, arguments = message.items
            self._dispatch_call(reqid, clid, method, arguments, events)
        else:
            reqid, result = message.items
            self._finish_call(reqid, result, events)

    def _finish_call(self, reqid: int, result: Any, events: list[Event]) -> None:
        waiting = self._waiting.pop(reqid, None)
        if waiting is None:
            return  # answered twice, or never asked
        schema, released_clid, released_count = waiting
        if released_count:
            self._tables.forget_theirs(released_clid, released_count)
            return
        if not isinstance(result, PeerError):
            try:
                schema.check(result, "result")
            except Violation as violation:
                result = violation
        events.append(Failed(reqid, result) if isinstance(result, PeerError) else Answered(reqid, result))

    def _begin_executing(self, reqid: int) -> None:
        if reqid:
            if reqid in self._executing:
                raise RemoteProtocolError("request ID is already in use")
            self._executing.add(reqid)

    def _dispatch_call(self, reqid: int, clid: int, method: bytes, arguments: Arguments, events: list[Event]) -> None:
        self._begin_executing(reqid)
        name = method.decode("utf-8", "replace")
        try:
            if clid == BROKER_CLID:
                bound = RIBroker.methods[name].bind(arguments.positional, arguments.keywords)
                self.send_answer(reqid, getattr(self, f"_remote_{name}")(*bound))
                return
            target = self._tables.target(clid)
            interface = target.remote_interface
            if interface is None:
                positional = tuple(map(_joined, arguments.positional))
                keywords = {key: _joined(value) for key, value in arguments.keywords.items()}
                events.append(InboundCall(reqid, target, name, positional, keywords))
            else:
                bound = interface.methods[name].bind(arguments.positional, arguments.keywords)
                events.append(InboundCall(reqid, target, name, bound, {}))
        except (Violation, RemoteFailure) as error:
            self.send_error(reqid, error)

    # --- what a peer may ask of the connection itself

    def _remote_getReferenceByName(self, name: bytes) -> Referenceable:
        text = name.decode("utf-8", "replace")
        target = self._names.object_by_name(text)
        if target is None:
            # Only the beginning of the name: the rest may be somebody's secret.
            raise RemoteFailure("builtins.KeyError", f"unable to find reference for name starting with {text[:2]!r}")
        self._tokens.string_bytes_max = STRING_BYTES_MAX
        return target

    def _remote_decref(self, clid: int, count: int) -> None:
        self._tables.decref(clid, count)

    def _remote_decgift(self, gift: int, count: int) -> None:
        raise Violation("no gifts are given by this Tub")

    # --- sending

    def send_call(
        self,
        clid: int,
        interface_name: str,
        method: str,
        args: Sequence[object],
        keywords: Mapping[str, object] | None = None,
    ) -> int:
        """Queue a call and return its request id. Raises Violation if it cannot be encoded; nothing is queued then."""
        if self._tables.releases_waiting >= RELEASES_BATCH:
            self.flush_releases()
        interface = RIBroker if clid == BROKER_CLID else INTERFACES.get(interface_name)
        self._tokens.string_bytes_max = STRING_BYTES_MAX  # its answer may be long
        return self._call(clid, method, args, keywords, _result_schema(interface, method), (0, 0))

    def _call(
        self,
        clid: int,
        method: str,
        args: Sequence[object],
        keywords: Mapping[str, object] | None,
        schema: Schema,
        releasing: tuple[int, int],
    ) -> int:
        reqid = self._free_reqid()
        self._encode(lambda: self._writer.call(reqid, clid, method, args, keywords))
        self._waiting[reqid] = (schema, *releasing)
        return reqid

    def _free_reqid(self) -> int:
        # A connection can live for months, and request ids must stay below 2**31.
        while True:
            reqid = self._next_reqid
            self._next_reqid = reqid + 1 if reqid < INT_MAX else 1
            if reqid not in self._waiting:
                return reqid

    def send_answer(self, reqid: int, value: object) -> None:
        """Answer an inbound call; a value that cannot be sent becomes an error at the caller."""
        if not reqid:
            return
        self._executing.discard(reqid)
        try:
            self._encode(lambda: self._writer.answer(reqid, value), is_reply=True)
        except Violation as violation:
            self.send_error(reqid, violation)

    def send_error(self, reqid: int, error: Exception) -> None:
        if not reqid:
            return
        self._executing.discard(reqid)
        self._encode(lambda: self._writer.error(reqid, failure_to_send(error)), is_reply=True)

    def send_ping(self) -> None:
        self._queue([ping_token(PING, 0)])

    def data_to_send(self) -> list[Buffer]:
        """Everything queued, in order; the queue is empty after."""
        outgoing, self._outgoing, self.outgoing_bytes, self.reply_bytes = self._outgoing, [], 0, 0
        return outgoing

    def _encode(self, write: Callable[[], list[Buffer]], is_reply: bool = False) -> None:
        self._tables.begin_message()
        try:
            buffers = write()
        except Violation:
            self._tables.roll_back_message()
            raise
        self._queue(buffers, is_reply)

    def _queue(self, buffers: list[Buffer], is_reply: bool = False) -> None:
        size = sum(map(len, buffers))
        self._outgoing += buffers
        self.outgoing_bytes += size
        if is_reply:
            self.reply_bytes += size + BUFFER_BYTES * len(buffers)

    # --- references

    @property
    def releases_waiting(self) -> int:
        return self._tables.releases_waiting

    def flush_releases(self) -> None:
        """Tell the peer which of its objects nobody here holds any more."""
        for clid, count in self._tables.take_releases():
            self._call(BROKER_CLID, "decref", (), {"clid": clid, "count": count}, ANY, (clid, count))


class _PeerReportedError(RemoteProtocolError):
    """The peer sent an ERROR token: it is closing, and wants no answer."""


def _joined(argument: Any) -> Any:
    return bytes(argument) if type(argument) is Pieces else argument


def _result_schema(interface: RemoteInterface | None, method: str) -> Schema:
    declared = interface.methods.get(method) if interface is not None else None
    return declared.result if declared is not None else ANY
