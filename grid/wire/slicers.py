"""Values to banana: one message, encoded whole, into a list of buffers. Does no I/O.

    OPEN(n)  opentype  children...  CLOSE(n)        n counts every OPEN sent on this connection, from 0

Large byte strings are not copied: they stand in the list as they were given, and must not change until the
message was sent. Small pieces are joined. A message that cannot be encoded raises before anything was queued.
Source: foolscap 24.9's slicers for the types Tahoe-LAFS 1.20 uses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any, Final

from grid.errors import Violation
from grid.wire.banana import float_token, header, integer_token
from grid.wire.failures import Copyable
from grid.wire.references import Referenceable, RemoteHandle

Buffer = bytes | bytearray | memoryview

UNCOPIED_BYTES_MIN: Final = 8192  # byte strings from this size on are handed on as they are
DEPTH_MAX: Final = 64  # ours: nesting of what we send; anything deeper is a mistake


class MessageWriter:
    """Encodes one message after another; `opens_sent` counts on from the last one that was finished."""

    def __init__(
        self,
        vocabulary: Sequence[bytes],
        slice_own: Callable[[Referenceable], tuple[int, bytes | None, bytes | None]],
        slice_handle: Callable[[RemoteHandle], int],
    ) -> None:
        """`slice_own` gives (clid, interface name or None if told before, FURL or None) for an object of ours;
        `slice_handle` gives the clid of an object of the peer's. Both may raise Violation.
        """
        self.opens_sent = 0
        self._words = {word: header(index) + b"\x87" for index, word in enumerate(vocabulary)}
        self._slice_own = slice_own
        self._slice_handle = slice_handle
        self._open_number = 0  # next, within the message under way
        self._small = bytearray()
        self._buffers: list[Buffer] = []

    def call(
        self,
        reqid: int,
        clid: int,
        method: str,
        args: Sequence[object],
        keywords: Mapping[str, object] | None = None,
    ) -> list[Buffer]:
        """A `call` message. Raises Violation when an argument cannot be sent."""
        self._begin()
        number = self._open(b"call")
        self._small += integer_token(reqid)
        self._small += integer_token(clid)
        self._string(method.encode())
        arguments = self._open(b"arguments")
        self._small += integer_token(len(args))
        for value in args:
            self._value(value, 2)
        for name, value in sorted((keywords or {}).items()):
            self._string(name.encode())
            self._value(value, 2)
        self._close(arguments)
        self._close(number)
        return self._finish()

    def answer(self, reqid: int, value: object) -> list[Buffer]:
        """An `answer` message. Raises Violation when the value cannot be sent."""
        self._begin()
        number = self._open(b"answer")
        self._small += integer_token(reqid)
        self._value(value, 1)
        self._close(number)
        return self._finish()

    def error(self, reqid: int, failure: Copyable) -> list[Buffer]:
        """An `error` message."""
        self._begin()
        number = self._open(b"error")
        self._small += integer_token(reqid)
        self._copyable(failure, 1)
        self._close(number)
        return self._finish()

    def value(self, value: object) -> list[Buffer]:
        """One bare value, as it would stand inside a message."""
        self._begin()
        self._value(value, 0)
        return self._finish()

    # --- pieces

    def _begin(self) -> None:
        self._open_number = self.opens_sent
        self._small = bytearray()
        self._buffers = []

    def _finish(self) -> list[Buffer]:
        self.opens_sent = self._open_number
        if self._small:
            self._buffers.append(self._small)
        buffers, self._buffers, self._small = self._buffers, [], bytearray()
        return buffers

    def _open(self, opentype: bytes) -> bytes:
        """Returns the number's header, to give to _close()."""
        number = header(self._open_number)
        self._open_number += 1
        self._small += number
        self._small += b"\x88"
        self._string(opentype)
        return number

    def _close(self, number: bytes) -> None:
        self._small += number
        self._small += b"\x89"

    def _string(self, data: Buffer) -> None:
        size = len(data)
        if size < UNCOPIED_BYTES_MIN:
            word = self._words.get(data) if type(data) is bytes else self._words.get(bytes(data))
            if word is not None:
                self._small += word
                return
            self._small += header(size)
            self._small += b"\x82"
            self._small += data
            return
        self._small += header(size)
        self._small += b"\x82"
        self._buffers.append(self._small)
        self._buffers.append(data)
        self._small = bytearray()

    def _value(self, value: object, depth: int) -> None:
        if depth > DEPTH_MAX:
            raise Violation("value is nested too deeply to be sent")
        slicer = _SLICERS.get(type(value))
        if slicer is not None:
            slicer(self, value, depth)
        elif isinstance(value, Referenceable):
            self._own_reference(value)
        elif isinstance(value, RemoteHandle):
            number = self._open(b"your-reference")
            self._small += integer_token(self._slice_handle(value))
            self._close(number)
        else:
            _slice_subclass(self, value, depth)

    def _own_reference(self, value: Referenceable) -> None:
        clid, interface_name, furl = self._slice_own(value)
        number = self._open(b"my-reference")
        self._small += integer_token(clid)
        if interface_name is not None:
            self._string(interface_name)
            if furl is not None:
                self._string(furl)
        self._close(number)

    def _sequence(self, opentype: bytes, items: Iterable[object], depth: int) -> None:
        number = self._open(opentype)
        for item in items:
            self._value(item, depth + 1)
        self._close(number)

    def _integer(self, value: int, depth: int) -> None:
        try:
            self._small += integer_token(value)
        except ValueError as error:
            raise Violation(str(error)) from None

    def _float(self, value: float, depth: int) -> None:
        self._small += float_token(value)

    def _bytes(self, value: Buffer, depth: int) -> None:
        self._string(value)

    def _memoryview(self, value: memoryview, depth: int) -> None:
        self._string(value if value.nbytes == len(value) else value.cast("B"))

    def _text(self, value: str, depth: int) -> None:
        try:
            encoded = value.encode()
        except UnicodeEncodeError:
            raise Violation("text with lone surrogates cannot be sent") from None
        number = self._open(b"unicode")
        self._string(encoded)
        self._close(number)

    def _boolean(self, value: bool, depth: int) -> None:
        number = self._open(b"boolean")
        self._small += b"\x01\x81" if value else b"\x00\x81"
        self._close(number)

    def _none(self, value: None, depth: int) -> None:
        self._close(self._open(b"none"))

    def _list(self, value: list[object], depth: int) -> None:
        self._sequence(b"list", value, depth)

    def _tuple(self, value: tuple[object, ...], depth: int) -> None:
        self._sequence(b"tuple", value, depth)

    def _set(self, value: set[object], depth: int) -> None:
        self._sequence(b"set", _sorted_if_possible(value), depth)

    def _frozenset(self, value: frozenset[object], depth: int) -> None:
        self._sequence(b"immutable-set", _sorted_if_possible(value), depth)

    def _dict(self, value: Mapping[object, object], depth: int) -> None:
        number = self._open(b"dict")
        for key in _sorted_if_possible(value):
            self._value(key, depth + 1)
            self._value(value[key], depth + 1)
        self._close(number)

    def _copyable(self, value: Copyable, depth: int) -> None:
        number = self._open(b"copyable")
        self._string(value.type_name)
        for name, attribute in value.attributes.items():
            self._string(name)
            self._value(attribute, depth + 1)
        self._close(number)

    def _decimal(self, value: Decimal, depth: int) -> None:
        number = self._open(b"decimal")
        self._string(str(value).encode())
        self._close(number)


def _sorted_if_possible(items: Iterable[Any]) -> Iterable[Any]:
    # Sorting is a courtesy (bytes that can be predicted); keys of mixed types have no order.
    try:
        return sorted(items)
    except TypeError:
        return items


_SLICERS: Final[dict[type, Callable[[MessageWriter, Any, int], None]]] = {
    bytes: MessageWriter._bytes,
    bytearray: MessageWriter._bytes,
    memoryview: MessageWriter._memoryview,
    int: MessageWriter._integer,
    bool: MessageWriter._boolean,
    str: MessageWriter._text,
    type(None): MessageWriter._none,
    list: MessageWriter._list,
    tuple: MessageWriter._tuple,
    set: MessageWriter._set,
    frozenset: MessageWriter._frozenset,
    dict: MessageWriter._dict,
    float: MessageWriter._float,
    Decimal: MessageWriter._decimal,
    Copyable: MessageWriter._copyable,
}


def _slice_subclass(writer: MessageWriter, value: object, depth: int) -> None:
    for kind in type(value).__mro__:
        slicer = _SLICERS.get(kind)
        if slicer is not None:
            return slicer(writer, value, depth)
    raise Violation(f"cannot send a {type(value).__name__}")
