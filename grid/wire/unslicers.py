"""Banana to values: tokens in, top-level messages out. Does no I/O.

    OPEN(n)  opentype  children...  CLOSE(n)

A stack of open sequences; each gathers its children and becomes a value when its CLOSE comes. Every OPEN is
counted, also in what is thrown away, because `reference` names containers by that count.

Two kinds of trouble: what breaks the structure raises RemoteProtocolError and ends the connection; a well-formed
value that is not acceptable (a violation) spoils only its message: the rest of it is skipped, and it is
reported as spoiled when it ends.
Source: foolscap 24.9's unslicers for the types Tahoe-LAFS 1.20 uses. Limits marked "ours" are in no
specification.
"""

from __future__ import annotations

import decimal
from collections.abc import Callable
from typing import Any, Final, Protocol

from attrs import define, field, frozen

from grid.errors import RemoteFailure, RemoteProtocolError, Violation
from grid.wire.banana import ABORT, CLOSE, FLOAT, INT, LONGINT, NEG, OPEN, STRING, Pieces, Token
from grid.wire.failures import FAILURE_TYPE, KNOWN_COPYABLES, Copyable, failure_of

OPENTYPE_BYTES_MAX: Final = 15
DEPTH_MAX: Final = 100  # ours
MESSAGE_TOKENS_MAX: Final = 1 << 18  # ours: small tokens cost far more memory than bytes on the wire
MESSAGE_BYTES_MAX: Final = 64 << 20  # ours: all string bodies of one message
HASHED_ITEMS_MAX: Final = 8192  # ours: keys of one set or dict
COLLIDING_ITEMS_MAX: Final = 512  # ours: of those, ones whose hashes a peer can choose; the work is their square
MESSAGE_REFERENCES_MAX: Final = 1024  # ours
DECIMAL_BYTES_MAX: Final = 100  # ours


class ReferenceTable(Protocol):
    """What the connection knows of objects passed by reference."""

    def their_object(self, clid: int, interface_name: bytes | None, furl: bytes | None) -> object:
        """A my-reference arrived. Raises RemoteProtocolError for a FURL of another tub."""

    def my_object(self, clid: int) -> object:
        """A your-reference arrived. Raises RemoteProtocolError for a clid we never gave."""

    def check_call(self, clid: int, method: bytes) -> None:
        """Raise Violation unless this object has this method."""


@frozen
class Arguments:
    positional: list[Any] = field(repr=False)  # secrets among them
    keywords: dict[str, Any] = field(repr=False)


@frozen
class Message:
    """A top-level sequence that came whole. `items` follow the opentype; the first is the request id."""

    opentype: bytes
    items: list[Any] = field(repr=False)


@frozen
class SpoiledMessage:
    """A top-level sequence with a violation in it (or an ABORT), of which at least the request id was good."""

    opentype: bytes
    reqid: int
    reason: str
    aborted: bool


@define
class _Open:
    object_number: int  # how many OPENs came before
    open_number: int  # as the peer numbered it, to match its CLOSE
    opentype: bytes | None = None
    items: list[Any] = field(factory=list)
    container: Any = None  # the dict or set, which a `reference` inside it may already name
    tokens_left: int = 0  # of the message, when this began


class _Unfinished:
    """Stands for a tuple that something inside it refers to: it has no value yet."""


# What may stand at each place of a top-level sequence.
_ANYTHING: Final = frozenset((INT, NEG, LONGINT, STRING, FLOAT, OPEN))
_PLACES: Final[dict[bytes, tuple[frozenset[int], ...]]] = {
    b"call": (frozenset((INT,)), frozenset((INT, NEG)), frozenset((STRING,)), frozenset((OPEN,))),
    b"answer": (frozenset((INT,)), _ANYTHING),
    b"error": (frozenset((INT,)), frozenset((OPEN,))),
}


class MessageReader:
    """Give it tokens one by one (all but PING, PONG and ERROR); it returns a message when one is complete."""

    def __init__(self, table: ReferenceTable) -> None:
        self.opens_received = 0
        self._table = table
        self._stack: list[_Open] = []
        self._reset()

    @property
    def is_under_way(self) -> bool:
        """Whether a message has begun and not ended."""
        return bool(self._stack)

    def _reset(self) -> None:
        self._objects: dict[int, Any] = {}
        self._weights: dict[int, int] = {}  # tokens in each container, so that references to it cost the same
        self._violation: str | None = None
        self._aborted = False
        self._tokens_left = MESSAGE_TOKENS_MAX
        self._bytes_left = MESSAGE_BYTES_MAX
        self._references_left = MESSAGE_REFERENCES_MAX

    def skip_call(self) -> None:
        """A whole call was read elsewhere."""
        self.opens_received += 2

    def begin_call(self, numbers: tuple[int, int], items: list[Any], arguments: list[Any]) -> None:
        """As if its tokens had been fed, up to some of its arguments. The table must have agreed to the call."""
        for opentype, number, children in zip((b"call", b"arguments"), numbers, (items, arguments), strict=True):
            self._stack.append(_Open(self.opens_received, number, opentype, children, tokens_left=self._tokens_left))
            self.opens_received += 1
            self._tokens_left -= len(children)
            self._bytes_left -= sum(len(child) for child in children if type(child) is bytes)

    def feed(self, token: Token) -> Message | SpoiledMessage | None:
        """Raises RemoteProtocolError and nothing else."""
        kind, value = token
        stack = self._stack
        if kind == OPEN:
            self._feed_open(value)
            return None
        if not stack:
            if kind == ABORT:
                return None
            raise RemoteProtocolError(
                f"lost sync, got CLOSE({value}) but expecting None" if kind == CLOSE else "top-level must be OPEN"
            )
        if kind == CLOSE:
            return self._feed_close(value)
        if kind == ABORT:
            if self._violation is None:
                self._violation, self._aborted = "ABORT received", True
            return None
        top = stack[-1]
        if top.opentype is None:
            self._feed_opentype(top, kind, value)
        elif self._violation is None:
            if kind == STRING:
                self._bytes_left -= len(value)  # the tokens' own limits bound the rest
                if type(value) is Pieces and top.opentype != b"arguments":
                    value = bytes(value)  # only the arguments of a call are taken in pieces, where their schema says so
            self._deliver(top, kind, value)
        return None

    def _feed_open(self, open_number: int) -> None:
        stack = self._stack
        if stack:
            top = stack[-1]
            if top.opentype is None:
                raise RemoteProtocolError("OPEN token followed by OPEN")
            if len(stack) >= DEPTH_MAX:
                raise RemoteProtocolError(f"sequences nested over {DEPTH_MAX} deep")
            if len(stack) == 1 and self._violation is None:
                self._check_place(top, OPEN)
        stack.append(_Open(self.opens_received, open_number, tokens_left=self._tokens_left))
        self.opens_received += 1

    def _feed_opentype(self, top: _Open, kind: int, value: Any) -> None:
        # A longer one is none we know, and is not kept: a hundred of them may be open at once.
        opentype = value if kind == STRING and len(value) <= OPENTYPE_BYTES_MAX else b""
        top.opentype = opentype
        if self._violation is not None:
            return
        if len(self._stack) == 1:
            if opentype not in _PLACES:
                self._violation = "unknown top-level sequence"
            return
        if opentype == b"list":
            # The list itself gathers the items: a `reference` to it from inside works by itself.
            self._objects[top.object_number] = top.items
        elif opentype in _CONTAINERS:
            top.container = self._objects[top.object_number] = _CONTAINERS[opentype]()
        elif opentype not in _FINISHERS or (opentype == b"arguments") != self._arguments_due():
            self._violation = "unknown OPEN type"

    def _arguments_due(self) -> bool:
        parent = self._stack[-2]
        return len(self._stack) == 2 and parent.opentype == b"call" and len(parent.items) == 3

    def _check_place(self, top: _Open, kind: int) -> None:
        places = _PLACES.get(top.opentype or b"")
        if places is None:
            return
        place = len(top.items)
        if place >= len(places):
            raise RemoteProtocolError("too many items in a message")
        if kind not in places[place]:
            raise RemoteProtocolError("request ID must be an INT" if place == 0 else "wrong token in a message")

    def _deliver(self, top: _Open, kind: int, value: Any) -> None:
        """Hand a finished child to its parent."""
        self._tokens_left -= 1
        if self._tokens_left < 0 or self._bytes_left < 0:
            self._spoil("message is too large")
            return
        if len(self._stack) == 1:
            if kind != OPEN:
                self._check_place(top, kind)
            top.items.append(value)
            if len(top.items) == 3 and top.opentype == b"call":
                try:
                    self._table.check_call(top.items[1], value)
                except Violation as violation:
                    self._spoil(str(violation))
            return
        top.items.append(value)

    def _spoil(self, reason: str) -> None:
        self._violation = reason
        self._objects = {}

    def _feed_close(self, open_number: int) -> Message | SpoiledMessage | None:
        top = self._stack[-1]
        if top.open_number != open_number:
            raise RemoteProtocolError(f"lost sync, got CLOSE({open_number}) but expecting {top.open_number}")
        if len(self._stack) == 1:
            self._stack.pop()
            return self._finish_message(top)
        if self._violation is None:
            try:
                value = self._finish(top)
            except Violation as violation:
                self._spoil(str(violation))
            else:
                self._stack.pop()
                if top.object_number in self._objects:
                    self._weights[top.object_number] = top.tokens_left - self._tokens_left
                self._deliver(self._stack[-1], OPEN, value)
                return None
        self._stack.pop()
        return None

    def _finish(self, top: _Open) -> Any:
        if top.opentype == b"list":
            return top.items
        if not top.opentype:
            raise Violation("sequence without a type")
        return _FINISHERS[top.opentype](self, top)

    def _finish_message(self, top: _Open) -> Message | SpoiledMessage | None:
        violation, aborted = self._violation, self._aborted
        self._reset()
        places = _PLACES.get(top.opentype or b"")
        if places is None:
            return None
        if violation is not None:
            return SpoiledMessage(top.opentype or b"", top.items[0], violation, aborted) if top.items else None
        if len(top.items) != len(places):
            raise RemoteProtocolError(f"'{(top.opentype or b'').decode()}' sequence ended too early")
        expected = {b"call": Arguments, b"error": RemoteFailure}.get(top.opentype or b"")
        if expected is not None and not isinstance(top.items[-1], expected):
            raise RemoteProtocolError("wrong sequence in a message")
        return Message(top.opentype or b"", top.items)

    # --- one method for each opentype; children are in top.items

    def _none(self, top: _Open) -> None:
        if top.items:
            raise RemoteProtocolError("none is not empty")

    def _boolean(self, top: _Open) -> bool:
        if len(top.items) != 1 or type(top.items[0]) is not int:
            raise RemoteProtocolError("boolean is not one INT")
        return top.items[0] != 0

    def _unicode(self, top: _Open) -> str:
        (body,) = _exactly(top, bytes)
        try:
            return str(body, "utf-8")
        except UnicodeDecodeError:
            raise Violation("text is not UTF-8") from None

    def _decimal(self, top: _Open) -> decimal.Decimal:
        (body,) = _exactly(top, bytes)
        try:
            if len(body) <= DECIMAL_BYTES_MAX:
                return decimal.Decimal(body.decode("ascii"))
        except (UnicodeDecodeError, decimal.InvalidOperation):
            pass
        raise Violation("not a decimal")

    def _tuple(self, top: _Open) -> tuple[Any, ...]:
        value = self._objects[top.object_number] = tuple(top.items)
        return value

    def _set(self, top: _Open) -> set[Any]:
        container: set[Any] = top.container
        container.update(_hashable(top.items))
        return container

    def _immutable_set(self, top: _Open) -> frozenset[Any]:
        return frozenset(_hashable(top.items))

    def _dict(self, top: _Open) -> dict[Any, Any]:
        container: dict[Any, Any] = top.container
        if len(top.items) % 2:
            raise RemoteProtocolError("dict ends in a key")
        keys = _hashable(top.items[::2])
        container.update(zip(keys, top.items[1::2], strict=True))
        if len(container) != len(keys):
            # Foolscap drops the connection for this, unless the schema refused the dict before.
            raise Violation("duplicate key in dict")
        return container

    def _reference(self, top: _Open) -> Any:
        (number,) = _exactly(top, int)
        if number not in self._objects:
            raise RemoteProtocolError("reference to an unknown object")
        value = self._objects[number]
        if isinstance(value, _Unfinished):
            raise Violation("tuple that contains itself")
        # Lists of references to lists of references... must not become more work than a message may hold.
        self._tokens_left -= self._weights.get(number, 0)
        return value

    def _arguments(self, top: _Open) -> Arguments:
        items = top.items
        if not items or type(items[0]) is not int or not 0 <= items[0] < len(items):
            raise RemoteProtocolError("arguments without a proper count")
        count = items[0] + 1
        names, values = items[count::2], items[count + 1 :: 2]
        if len(names) != len(values) or not all(type(name) is bytes for name in names):
            raise RemoteProtocolError("argument name is not a string, or has no value")
        keywords = {name.decode("utf-8", "replace"): value for name, value in zip(names, values, strict=True)}
        if len(keywords) != len(names):
            raise Violation("repeated argument")
        return Arguments(items[1:count], keywords)

    def _copyable(self, top: _Open) -> Copyable | RemoteFailure:
        items = top.items
        if not items or type(items[0]) is not bytes:
            raise RemoteProtocolError("copyable without a type name")
        if items[0] not in KNOWN_COPYABLES:
            raise Violation("unknown copyable")
        names = items[1::2]
        if len(items) % 2 == 0 or not all(type(name) is bytes for name in names):
            raise RemoteProtocolError("copyable's attribute name is not a string, or has no value")
        attributes = dict(zip(names, items[2::2], strict=True))
        if len(attributes) != len(names):
            raise RemoteProtocolError("copyable with a repeated attribute")
        return failure_of(attributes) if items[0] == FAILURE_TYPE else Copyable(items[0], attributes)

    def _my_reference(self, top: _Open) -> object:
        items = top.items
        kinds = [type(item) for item in items]
        if kinds not in ([int], [int, bytes], [int, bytes, bytes]):
            raise RemoteProtocolError("malformed my-reference")
        self._references_left -= 1
        if self._references_left < 0:
            raise Violation("too many references in a message")
        return self._table.their_object(*items, *([None] * (3 - len(items))))

    def _your_reference(self, top: _Open) -> object:
        (clid,) = _exactly(top, int)
        return self._table.my_object(clid)

    def _their_reference(self, top: _Open) -> object:
        raise Violation("gifts are prohibited in this Tub")


def _exactly(top: _Open, kind: type) -> list[Any]:
    if len(top.items) != 1 or type(top.items[0]) is not kind:
        raise RemoteProtocolError(f"malformed {(top.opentype or b'').decode()} sequence")
    return top.items


def _hashable(items: list[Any]) -> list[Any]:
    if len(items) > HASHED_ITEMS_MAX:
        raise Violation(f"more than {HASHED_ITEMS_MAX} keys")
    try:
        for item in items:
            hash(item)  # no more work than the tokens it came as: see _reference
    except TypeError:
        raise Violation("a key is not hashable") from None
    if len(items) > COLLIDING_ITEMS_MAX and sum(map(_may_collide, items)) > COLLIDING_ITEMS_MAX:
        raise Violation(f"more than {COLLIDING_ITEMS_MAX} keys that are not strings")
    return items


def _may_collide(key: object) -> bool:
    """Whether its hash is the same in every process: only those of strings are not."""
    return type(key) not in (bytes, str) and not (type(key) is tuple and any(type(part) is bytes for part in key))


_CONTAINERS: Final[dict[bytes, Callable[[], Any]]] = {b"dict": dict, b"set": set, b"tuple": _Unfinished}
_FINISHERS: Final[dict[bytes, Callable[[MessageReader, _Open], Any]]] = {
    b"none": MessageReader._none,
    b"boolean": MessageReader._boolean,
    b"unicode": MessageReader._unicode,
    b"decimal": MessageReader._decimal,
    b"tuple": MessageReader._tuple,
    b"set": MessageReader._set,
    b"immutable-set": MessageReader._immutable_set,
    b"dict": MessageReader._dict,
    b"reference": MessageReader._reference,
    b"arguments": MessageReader._arguments,
    b"copyable": MessageReader._copyable,
    b"my-reference": MessageReader._my_reference,
    b"your-reference": MessageReader._your_reference,
    b"their-reference": MessageReader._their_reference,
}
