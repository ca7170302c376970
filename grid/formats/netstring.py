"""Netstrings: bytes that say how long they are.

    length in decimal ASCII  ":"  that many bytes  ","

Source: Tahoe-LAFS 1.20's hash inputs, UEB and directories. Leading zeros are read, as 1.20 reads them; the blanks
and plus signs its integer parser also lets pass are not: nothing writes any of these.
"""

from __future__ import annotations

from typing import Final

from grid.errors import FormatError

LENGTH_DIGITS_MAX: Final = 18  # ours: the reader looks no further for the colon
_COMMA: Final = ord(",")


def netstring(data: bytes) -> bytes:
    return b"%d:%b," % (len(data), data)


def read_netstring(data: bytes | memoryview, position: int = 0) -> tuple[memoryview, int]:
    """The contents of the netstring at `position`, without copying, and the position after it.

    Raises FormatError.
    """
    view = memoryview(data)
    digits, colon, _ = bytes(view[position : position + LENGTH_DIGITS_MAX + 1]).partition(b":")
    if not colon or not digits.isdigit():
        raise FormatError("not a netstring: no length")
    start = position + len(digits) + 1
    stop = start + int(digits)
    if stop >= len(view) or view[stop] != _COMMA:
        raise FormatError("not a netstring: too short, or no comma at its end")
    return view[start:stop], stop + 1
