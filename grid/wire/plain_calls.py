"""Calls as storage clients make them, read without looking at each token by itself, as far as that goes. Does no I/O.

    OPEN(n) call  reqid  clid  method  OPEN(m) arguments  count  argument...  CLOSE(m)  CLOSE(n)

Token by token, such a call takes half of what answering a small read costs. What this reads, the readers of tokens and
messages read alike. It stops at what is not plain, for these to go on from there: an argument that is a container, a
reference or long, keywords, a part that has not come, a mistake.
"""

from __future__ import annotations

import re
from typing import Any, Final

from attrs import field, frozen

from grid.wire.banana import CLOSE, INT, STRING, VOCABULARIES
from grid.wire.unslicers import Arguments, Message

STRING_BYTES_MAX: Final = 16 << 10  # less than a stranger may send
INTEGER_BYTES_MAX: Final = 8  # of a LONGINT: offsets in large shares

_NUMBER: Final = rb"([\x00-\x7f]{1,5})"
_WORDS: Final = VOCABULARIES[1]
_HEAD: Final = re.compile(
    rb"%b\x88%c\x87%b\x81%b\x81%b\x82" % (_NUMBER, _WORDS.index(b"call"), _NUMBER, _NUMBER, _NUMBER)
)
_ARGUMENTS: Final = re.compile(rb"%b\x88%c\x87([\x00-\x7f])\x81" % (_NUMBER, _WORDS.index(b"arguments")))
_ARGUMENT: Final = re.compile(rb"%b([\x81\x82\x85])" % _NUMBER)
_INT, _STRING, _CLOSE = bytes((INT,)), bytes((STRING,)), bytes((CLOSE,))


@frozen
class PlainCall:
    """`items` are the request id, the clid and the method; `arguments` those before what is not plain."""

    numbers: tuple[int, int]  # of both OPENs
    items: list[Any]
    arguments: list[Any] = field(repr=False)  # secrets among them
    count: int  # of positional arguments, all in all
    is_whole: bool  # to its last CLOSE
    end: int

    def message(self) -> Message:
        """It, if it is whole."""
        return Message(b"call", [*self.items, Arguments(self.arguments, {})])


def read_plain_call(data: bytes, position: int) -> PlainCall | None:
    """The call that begins there, in the words of vocabulary 1; None when not even its arguments begin."""
    if (head := _HEAD.match(data, position)) is None:
        return None
    outer, reqid, clid, size = head.groups()
    end = head.end() + _number(size)
    method = data[head.end() : end]
    if len(method) > STRING_BYTES_MAX or (opening := _ARGUMENTS.match(data, end)) is None:
        return None
    inner, count = opening.groups()
    end = opening.end()
    values: list[Any] = []
    while len(values) < count[0] and (found := _read_argument(data, end)) is not None:
        value, end = found
        values.append(value)
    closes = inner + _CLOSE + outer + _CLOSE
    is_whole = len(values) == count[0] and data.startswith(closes, end)
    return PlainCall(
        (_number(outer), _number(inner)),
        [_number(reqid), _number(clid), method],
        values,
        count[0],
        is_whole,
        end + len(closes) if is_whole else end,
    )


def _read_argument(data: bytes, position: int) -> tuple[int | bytes, int] | None:
    """An integer or a short string, and where it ends."""
    if (match := _ARGUMENT.match(data, position)) is None:
        return None
    header, kind = match.groups()
    value, end = _number(header), match.end()
    if kind == _INT:
        return value, end
    if value > (STRING_BYTES_MAX if kind == _STRING else INTEGER_BYTES_MAX) or end + value > len(data):
        return None
    body = data[end : end + value]
    return (body if kind == _STRING else int.from_bytes(body, "big")), end + value


def _number(header: bytes) -> int:
    value = 0
    for digit in reversed(header):
        value = value << 7 | digit
    return value
