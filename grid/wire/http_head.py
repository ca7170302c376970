"""The head of a request as clients of a storage server write it, read with one pattern. Does no I/O.

    METHOD SP /TARGET SP HTTP/1.1 CRLF  (name: value CRLF)+  CRLF

h11 knows all of HTTP, and takes a third of what answering a small request costs. What this reads, h11 reads alike;
whatever is not as plain as this (a body in chunks, another version, `connection`, `expect`, bytes beyond ASCII, a
mistake) is None here, and h11's to understand or to refuse.
"""

from __future__ import annotations

import re
from typing import Final

from attrs import field, frozen

HEAD_BYTES_MAX: Final = 16 << 10
LENGTH_DIGITS_MAX: Final = 20  # of `content-length`, as h11 has it

_LINE: Final = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+:[ \t]*[!-~][ -~]*\r\n"
_HEAD: Final = re.compile(rb"([A-Z]+) (/[!-~]*) HTTP/1\.1\r\n((?:%b)+)\r\n" % _LINE)
_NOT_PLAIN: Final = frozenset((b"transfer-encoding", b"connection", b"expect", b"upgrade"))


@frozen
class Head:
    method: bytes
    target: bytes
    headers: list[tuple[bytes, bytes]] = field(repr=False)  # names in lower case; secrets among the values
    length: int  # bytes of body that follow
    size: int  # bytes of the head itself


def read_head(data: bytes) -> Head | None:
    """The head that `data` begins with; None when it is not all there, or not plain."""
    if (match := _HEAD.match(data, 0, HEAD_BYTES_MAX)) is None:
        return None
    method, target, lines = match.groups()
    headers = []
    for line in lines.split(b"\r\n")[:-1]:
        name, _, value = line.partition(b":")
        headers.append((name.lower(), value.strip(b" \t")))
    names = [name for name, _ in headers]
    if names.count(b"host") != 1 or names.count(b"content-length") > 1 or not _NOT_PLAIN.isdisjoint(names):
        return None
    length = dict(headers).get(b"content-length", b"0")
    if not length.isdigit() or len(length) > LENGTH_DIGITS_MAX:
        return None
    return Head(method, target, headers, int(length), match.end())
