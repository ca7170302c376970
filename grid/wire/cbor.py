"""CBOR, as much of it as the HTTP storage protocol needs: both ways, without I/O.

    head: 3 bits of type, 5 bits of value (24, 25, 26, 27: the value is in the next 1, 2, 4, 8 bytes; 31: no length)
    0 unsigned   2 bytes   3 text   4 array   5 map   6 tag (258, a set, and no other)   7 false, true, null

Source: RFC 8949, of which negative numbers, floats and all other tags are refused.

General decoders build whatever they are told to before anyone can check it: megabytes of empty arrays become
gigabytes of objects, and tags call for big numbers or regular expressions. Here the number of items, the entries
of a map (whose keys a peer could choose to collide) and the depth are bounded, and byte strings are not copied.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from attrs import frozen

from grid.errors import FormatError

ITEMS_MAX: Final = 1 << 18  # in one message, unless the caller allows fewer
MAP_ENTRIES_MAX: Final = 512
DEPTH_MAX: Final = 8
TEXT_BYTES_MAX: Final = 1 << 16
NUMBER_MAX: Final = (1 << 64) - 1
JOIN_BYTES: Final = 4096  # byte strings up to here are joined with what stands around them

_UNSIGNED, _NEGATIVE, _BYTES, _TEXT, _ARRAY, _MAP, _TAG, _SIMPLE = range(8)
_INDEFINITE: Final = 31
_BREAK: Final = 0xFF
_SIMPLE_VALUES: Final = {20: False, 21: True, 22: None}
_SET_TAG: Final = 258
_SET_HEAD: Final = b"\xd9\x01\x02"

Buffer = bytes | bytearray | memoryview


@frozen
class TaggedSet:
    """An array under tag 258. Duplicates are the reader's to drop."""

    items: list[Any]


# --- decoding -----------------------------------------------------------------------------------------------


def decode(data: Buffer, *, items_max: int = ITEMS_MAX) -> Any:
    """The first item of `data`; what follows it is not looked at.

    Byte strings come as views of `data`, as map keys as bytes; sets as TaggedSet. Raises FormatError.
    """
    return _Decoder(memoryview(data).toreadonly(), items_max).item(DEPTH_MAX)


class _Decoder:
    def __init__(self, data: memoryview, items_max: int) -> None:
        self._data = data
        self._position = 0
        self._items_left = items_max

    def item(self, depth_left: int) -> Any:
        self._items_left -= 1
        if self._items_left < 0 or depth_left < 0:
            raise FormatError("CBOR of too many items, or nested too deeply")
        major, length = self._head()
        if major == _UNSIGNED and length is not None:
            return length
        if major == _BYTES:
            return self._string(_BYTES, length)
        if major == _TEXT:
            return self._text(length)
        if major == _ARRAY:
            return self._array(length, depth_left)
        if major == _MAP:
            return self._map(length, depth_left)
        if major == _TAG and length == _SET_TAG:
            items = self.item(depth_left)  # a tag is no level of its own, but it is an item
            if type(items) is list:
                return TaggedSet(items)
        if major == _SIMPLE and length in _SIMPLE_VALUES:
            return _SIMPLE_VALUES[length]
        raise FormatError("CBOR of a kind that is not used here")

    def _take(self, length: int) -> memoryview:
        start, self._position = self._position, self._position + length
        if self._position > len(self._data):
            raise FormatError("CBOR ends too early")
        return self._data[start : self._position]

    def _head(self) -> tuple[int, int | None]:
        """(type, value); no value for an indefinite length."""
        first = self._take(1)[0]
        major, low = first >> 5, first & 31
        if low < 24:
            return major, low
        if low <= 27:
            value = int.from_bytes(self._take(1 << low - 24), "big")
            if major == _SIMPLE:
                raise FormatError("CBOR floats are not used here")
            return major, value
        if low == _INDEFINITE and major in (_BYTES, _TEXT, _ARRAY, _MAP):
            return major, None
        raise FormatError("malformed CBOR")

    def _at_break(self) -> bool:
        if self._position >= len(self._data):
            raise FormatError("CBOR ends too early")
        if self._data[self._position] != _BREAK:
            return False
        self._position += 1
        return True

    def _string(self, major: int, length: int | None) -> memoryview:
        if length is not None:
            return self._take(length)
        pieces = []
        while not self._at_break():
            self._items_left -= 1
            piece_major, piece_length = self._head()
            if piece_major != major or piece_length is None or self._items_left < 0:
                raise FormatError("malformed CBOR string")
            pieces.append(self._take(piece_length))
        return memoryview(b"".join(pieces))

    def _text(self, length: int | None) -> str:
        raw = self._string(_TEXT, length)
        if len(raw) > TEXT_BYTES_MAX:
            raise FormatError(f"CBOR text of over {TEXT_BYTES_MAX} bytes")
        try:
            return str(raw, "utf-8")
        except UnicodeDecodeError:
            raise FormatError("CBOR text is not UTF-8") from None

    def _array(self, length: int | None, depth_left: int) -> list[Any]:
        if length is None:
            items = []
            while not self._at_break():
                items.append(self.item(depth_left - 1))
            return items
        if length > self._items_left:
            raise FormatError("CBOR of too many items")
        return [self.item(depth_left - 1) for _ in range(length)]

    def _map(self, length: int | None, depth_left: int) -> dict[Any, Any]:
        entries: dict[Any, Any] = {}
        count = 0
        while count < length if length is not None else not self._at_break():
            count += 1
            if count > MAP_ENTRIES_MAX:
                raise FormatError(f"CBOR map of over {MAP_ENTRIES_MAX} entries")
            key = self.item(depth_left - 1)
            if type(key) is memoryview:
                key = bytes(key)
            if type(key) not in (int, str, bytes):
                raise FormatError("CBOR map key of a kind that is not used here")
            entries[key] = self.item(depth_left - 1)
        return entries


# --- encoding -----------------------------------------------------------------------------------------------


def encode(value: Any) -> list[Buffer]:
    """Buffers to send one after the other; long byte strings are in there as they are, not copied.

    Takes int, bytes and other buffers, str, bool, None, list and tuple, dict, and (under tag 258, sorted) sets.
    """
    buffers: list[Buffer] = []
    small = bytearray()

    def put(value: Any) -> None:
        nonlocal small
        if value is None or isinstance(value, bool):
            small.append(0xF6 if value is None else 0xF4 + value)
        elif isinstance(value, int):
            small.extend(_packed_head(_UNSIGNED, value))
        elif isinstance(value, bytes | bytearray | memoryview):
            small.extend(_packed_head(_BYTES, len(value)))
            if len(value) <= JOIN_BYTES:
                small.extend(value)
            else:
                buffers.extend((small, value))
                small = bytearray()
        elif isinstance(value, str):
            raw = value.encode("utf-8")
            small.extend(_packed_head(_TEXT, len(raw)) + raw)
        elif isinstance(value, Mapping):
            small.extend(_packed_head(_MAP, len(value)))
            for key, item in value.items():
                put(key)
                put(item)
        elif isinstance(value, list | tuple | set | frozenset):
            is_set = isinstance(value, set | frozenset)
            small.extend((_SET_HEAD if is_set else b"") + _packed_head(_ARRAY, len(value)))
            for item in sorted(value) if is_set else value:
                put(item)
        else:
            raise TypeError(f"no CBOR for {type(value).__name__}")

    put(value)
    buffers.append(small)
    return [buffer for buffer in buffers if buffer]


def _packed_head(major: int, value: int) -> bytes:
    if not 0 <= value <= NUMBER_MAX:
        raise ValueError("a number that CBOR's unsigned integers do not hold")
    if value < 24:
        return bytes((major << 5 | value,))
    for low, size in ((24, 1), (25, 2), (26, 4), (27, 8)):
        if value < 1 << 8 * size:
            return bytes((major << 5 | low,)) + value.to_bytes(size, "big")
    raise AssertionError("unreachable")
