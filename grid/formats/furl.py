"""FURLs: where a Foolscap object is, who serves it, and the secret name that grants the right to call it.

    pb:// tub id @ hint , hint … / name           tub id: base32(SHA1(certificate DER)), 32 characters

Hints say where to dial: `tcp:HOST:PORT`, or `HOST:PORT` as old nodes write it; other kinds are kept and not used.
Parsing is as lenient as Foolscap's: what stands before `pb://`, what follows 32 characters of tub id, and a newline
at the end are dropped; no hints at all is legal. Source: Foolscap's FURLs.
"""

from __future__ import annotations

import re
from typing import Final, Self

from attrs import field, frozen

from grid.errors import FormatError
from grid.formats.base32 import a2b

TUB_ID_CHARS: Final = 32
FURL_CHARS_MAX: Final = 8192  # ours
TCP_HINTS_MAX: Final = 16  # ours: all are dialled at once, and a stranger wrote them

_FURL: Final = re.compile(r"pb://([^@/\n]+)@([^/\n]*)/([^\n]+)\n?\Z")
_TUB_ID: Final = re.compile(r"[a-zA-Z2-7]+")  # upper case parses, but no peer will ever answer to it
_NAME_HOST: Final = r"[A-Za-z0-9.-]+"
_IPV6: Final = r"\[[0-9A-Fa-f:.]+(?:%[0-9A-Za-z._-]+)?\]"
_TCP: Final = re.compile(rf"tcp:({_NAME_HOST}|{_IPV6}):([0-9]{{1,5}})")
_LEGACY_TCP: Final = re.compile(rf"({_NAME_HOST}):([0-9]{{1,5}})")
_PORT_MAX: Final = 65535


@frozen
class Furl:
    """Two FURLs mean the same object when tub id and name agree; hints only say where to look."""

    tub_id: str
    hints: tuple[str, ...]
    name: str = field(repr=False)  # the swissnum: whoever knows it may call the object

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises FormatError, which never repeats `text`."""
        if len(text) > FURL_CHARS_MAX:
            raise FormatError(f"a FURL of over {FURL_CHARS_MAX} characters")
        if (match := _FURL.search(text)) is None:
            raise FormatError("not a FURL: pb://TUBID@HINTS/NAME")
        tub_id, hints, name = match.groups()
        tub_id = tub_id[:TUB_ID_CHARS]
        if not _TUB_ID.fullmatch(tub_id):
            raise FormatError("a FURL's tub id is not base32")
        all_hints = tuple(hints.split(",")) if hints else ()
        if not all(all_hints):
            raise FormatError("a FURL has an empty connection hint")
        return cls(tub_id, all_hints, name)

    def __str__(self) -> str:
        return f"pb://{self.tub_id}@{','.join(self.hints)}/{self.name}"

    @property
    def tub_id_bytes(self) -> bytes:
        """20 bytes, as lease secrets and write enablers want it. Raises FormatError."""
        if len(self.tub_id) != TUB_ID_CHARS:
            raise FormatError(f"a FURL's tub id has not {TUB_ID_CHARS} characters")
        return a2b(self.tub_id)

    def tcp_hints(self) -> list[tuple[str, int]]:
        """(host, port) of the first hints that plain TCP can dial; IPv6 addresses without brackets."""
        places = []
        for hint in self.hints:
            match = _LEGACY_TCP.fullmatch(hint) or _TCP.fullmatch(hint)
            if match is not None and 0 < (port := int(match[2])) <= _PORT_MAX:
                places.append((match[1].strip("[]"), port))
        return list(dict.fromkeys(places))[:TCP_HINTS_MAX]
