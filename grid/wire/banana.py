"""Foolscap's banana tokens: bytes in, tokens out, and back. Does no I/O.

    token  = header (base 128, least digit first, each byte < 0x80)  type (one byte >= 0x80)  [body]

`header` is an INT's value, the length in bytes of a STRING's body, the index of a VOCAB word, or the number
of an OPEN or CLOSE. Long bodies are collected piece by piece as they arrive, and joined once if at all: a long STRING
that did not come at once is handed on in its pieces.
Source: the banana of foolscap 24.9, version 3, as spoken by Tahoe-LAFS 1.20. Limits marked "ours" are in no
specification.
"""

from __future__ import annotations

import hashlib
import struct
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar

from attrs import field, frozen

from grid.errors import RemoteProtocolError

INT: Final = 0x81
STRING: Final = 0x82
NEG: Final = 0x83
FLOAT: Final = 0x84
LONGINT: Final = 0x85
LONGNEG: Final = 0x86
VOCAB: Final = 0x87
OPEN: Final = 0x88
CLOSE: Final = 0x89
ABORT: Final = 0x8A
ERROR: Final = 0x8D
PING: Final = 0x8E
PONG: Final = 0x8F

HEADER_BYTES_MAX: Final = 64
FLOAT_BYTES: Final = 8
ERROR_BYTES_MAX: Final = 1000
LONGINT_BYTES_MAX: Final = 1024
PIECES_BYTES_MIN: Final = 64 << 10  # shorter strings are always joined
STRING_BYTES_MAX: Final = 32 << 20  # ours: a peer must not choose how much memory we use
INT_MAX: Final = (1 << 31) - 1  # larger ones are sent as LONGINT

# The word tables both sides know from the start; peers agree on an index, and on the hash of its words.
VOCABULARIES: Final[tuple[tuple[bytes, ...], ...]] = (
    (),
    (
        *(b"none", b"boolean", b"reference", b"dict", b"list", b"tuple", b"set", b"immutable-set", b"unicode"),
        *(b"set-vocab", b"add-vocab", b"call", b"arguments", b"answer", b"error"),
        *(b"my-reference", b"your-reference", b"their-reference", b"copyable", b"instance"),
        *(b"module", b"class", b"method", b"function", b"attrdict"),
    ),
)

_BODY_BYTES_MAX: Final = {
    STRING: STRING_BYTES_MAX,  # or less, see TokenReader
    LONGINT: LONGINT_BYTES_MAX,
    LONGNEG: LONGINT_BYTES_MAX,
    ERROR: ERROR_BYTES_MAX,
}
_BARE_KINDS: Final = frozenset((INT, NEG, OPEN, CLOSE, ABORT, PING, PONG))

T = TypeVar("T")
Token = tuple[int, Any]  # (kind, its number or body); VOCAB comes out as STRING, LONGNEG as LONGINT


@frozen
class Pieces:
    """A long byte string as it arrived. Whoever writes it to a file need not join it first; `bytes()` does."""

    parts: Sequence[bytes | memoryview] = field(repr=False)
    size: int  # bytes

    def __len__(self) -> int:
        return self.size

    def __bytes__(self) -> bytes:
        return b"".join(self.parts)


def vocabulary_hash(index: int) -> str:
    """The first four hex digits of the SHA-1 of a word table, as told in the decision block."""
    return hashlib.sha1(b"\0".join(VOCABULARIES[index]), usedforsecurity=False).hexdigest()[:4]


class TokenReader:
    """Give it bytes with receive_data(), then take tokens with next_token() until that returns None.

    Raises RemoteProtocolError and nothing else; the connection is of no use after it.
    """

    def __init__(self, vocabulary: Sequence[bytes] = ()) -> None:
        self.vocabulary = vocabulary
        self.string_bytes_max = STRING_BYTES_MAX  # may be changed at any time
        self._data = b""  # being parsed; never more than one header beyond a piece that was given
        self._position = 0
        self._later: deque[bytes] = deque()  # pieces after that
        self._body: list[bytes | memoryview] = []  # pieces of a body that is not in one of them
        self._body_kind = 0  # of which type, or 0 when no body is under way
        self._body_bytes = 0  # all of it
        self._body_missing = 0  # bytes

    @property
    def body_missing(self) -> int:
        """Bytes, of a long body that has begun to arrive."""
        return self._body_missing

    def receive_data(self, *pieces: bytes) -> None:
        """What came, in order."""
        if self._body_missing and not self._later and (size := sum(map(len, pieces))) <= self._body_missing:
            self._body += pieces
            self._body_missing -= size
        else:
            self._later += pieces

    def take(self, read: Callable[[bytes, int], tuple[T, int] | None]) -> T | None:
        """What `read` finds at the place where the next token begins; it says where it ends, too."""
        if self._body_kind or (self._position >= len(self._data) and not self._next_piece()):
            return None
        if (found := read(self._data, self._position)) is None:
            return None
        taken, self._position = found
        return taken

    def next_token(self) -> Token | None:
        if self._body_kind:
            return self._collected_body()
        while True:
            data, position = self._data, self._position
            end = len(data)
            header = shift = 0
            while position < end:
                if (kind := data[position]) >= 0x80:
                    return self._token(kind, header, position + 1)
                header |= kind << shift
                shift += 7
                position += 1
                if shift > 7 * HEADER_BYTES_MAX:
                    raise RemoteProtocolError(f"token prefix is limited to {HEADER_BYTES_MAX} bytes")
            if not self._next_piece():
                return None

    def _next_piece(self) -> bool:
        """Go on to it, when the one at hand ends within a header; whether there is one."""
        if not self._later:
            return False
        rest = self._data[self._position :]
        piece = self._later.popleft()
        self._data, self._position = (rest + piece if rest else piece), 0
        return True

    def _token(self, kind: int, header: int, position: int) -> Token | None:
        """The one whose header ended before `position`; None when its body is not all there."""
        if kind in _BARE_KINDS:
            self._position = position
            return kind, (-header if kind == NEG else header)
        if kind == VOCAB:
            self._position = position
            if header >= len(self.vocabulary):
                raise RemoteProtocolError("unknown word in VOCAB token")
            return STRING, self.vocabulary[header]
        return self._take_body(kind, header, position)

    def _take_body(self, kind: int, header: int, position: int) -> Token | None:
        length = header
        if kind == FLOAT:
            length = FLOAT_BYTES
        elif kind not in _BODY_BYTES_MAX:
            raise RemoteProtocolError(f"unknown token type {kind:#x}")
        else:
            most = self.string_bytes_max if kind == STRING else _BODY_BYTES_MAX[kind]
            if length > most:
                raise RemoteProtocolError(f"token of type {kind:#x} is too large: {length}>{most}")
        stop = position + length
        if stop <= len(self._data):
            self._position = stop
            return _token_of_body(kind, self._data[position:stop])
        self._body_kind, self._body_bytes, self._body_missing = kind, length, stop - len(self._data)
        self._body = [memoryview(self._data)[position:]]
        self._data, self._position = b"", 0
        return self._collected_body()

    def _collected_body(self) -> Token | None:
        """The one under way. Its pieces are kept as they come, so that no byte is looked at twice."""
        while self._body_missing and self._later:
            piece = self._later.popleft()
            if len(piece) > self._body_missing:
                self._body.append(memoryview(piece)[: self._body_missing])
                self._data, self._position = piece, self._body_missing
                self._body_missing = 0
            else:
                self._body.append(piece)
                self._body_missing -= len(piece)
        if self._body_missing:
            return None
        kind, body = self._body_kind, Pieces(self._body, self._body_bytes)
        self._body_kind, self._body = 0, []
        if kind == STRING and len(body) >= PIECES_BYTES_MIN:
            return kind, body
        return _token_of_body(kind, bytes(body))


def _token_of_body(kind: int, body: bytes) -> Token:
    if kind in (STRING, ERROR):
        return kind, body
    if kind == FLOAT:
        return FLOAT, struct.unpack(">d", body)[0]
    magnitude = int.from_bytes(body, "big")
    return LONGINT, (magnitude if kind == LONGINT else -magnitude)


_SHORT_HEADERS: Final = tuple(bytes((number,)) for number in range(0x80))


def header(number: int) -> bytes:
    """The header bytes of a non-negative number; zero is one zero byte."""
    if number < 0x80:
        return _SHORT_HEADERS[number]
    if number < 0x4000:
        return bytes((number & 0x7F, number >> 7))
    digits = bytearray()
    while number:
        digits.append(number & 0x7F)
        number >>= 7
    return bytes(digits)


def integer_token(value: int) -> bytes:
    if 0 <= value <= INT_MAX:
        return header(value) + b"\x81"
    if -INT_MAX - 1 <= value < 0:
        return header(-value) + b"\x83"
    kind, magnitude = (b"\x85", value) if value > 0 else (b"\x86", -value)
    body = magnitude.to_bytes((magnitude.bit_length() + 7) // 8, "big")
    if len(body) > LONGINT_BYTES_MAX:
        raise ValueError(f"integers over {LONGINT_BYTES_MAX} bytes cannot be sent")
    return header(len(body)) + kind + body


def float_token(value: float) -> bytes:
    return b"\x84" + struct.pack(">d", value)


def error_token(text: str) -> bytes:
    """What is sent just before we drop a connection for a protocol error."""
    body = text.encode("utf-8", "replace")[:ERROR_BYTES_MAX]
    return header(len(body)) + b"\x8d" + body


def ping_token(kind: int, number: int) -> bytes:
    """PING or PONG: unlike elsewhere, the number zero has no header byte."""
    return (header(number) if number else b"") + bytes((kind,))
