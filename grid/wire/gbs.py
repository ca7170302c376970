"""The HTTP storage protocol (GBS) without its bodies: NURLs, secrets in headers, paths, ranges. Does no I/O.

    NURL             pb://HASH@HOST:PORT/SWISSNUM#v=1     HASH: base64url(SHA-256(the certificate's public key info))
    Authorization            Tahoe-LAFS BASE64(SWISSNUM)
    X-Tahoe-Authorization    NAME BASE64                  one line for each secret
    Range, Content-Range     bytes=FIRST-LAST, bytes FIRST-LAST/*

Source: the storage protocol of Tahoe-LAFS 1.20 over HTTP, version 1. Bodies are in `grid/wire/gbs_bodies.py`.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from enum import Enum
from typing import Final, Self

from attrs import field, frozen

from grid.errors import FormatError
from grid.formats import base32
from grid.interfaces import LeaseSecrets

PREFIX: Final = "/storage/v1"
CBOR_TYPE: Final = b"application/cbor"
DATA_TYPE: Final = b"application/octet-stream"
NURL_CHARS_MAX: Final = 1024
SPKI_HASH_BYTES: Final = 32
LEASE_SECRET_BYTES: Final = 32
SHARE_NUMBER_DIGITS_MAX: Final = 20  # leading zeros are allowed
OFFSET_DIGITS_MAX: Final = 19

Headers = Sequence[tuple[bytes, bytes]]  # names in lower case

_PORT_MAX: Final = 65535
_HOST: Final = r"[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]"
_NURL: Final = re.compile(
    rf"(?P<scheme>pb|pb\+tor)://(?P<hash>[A-Za-z0-9_-]{{43}})@(?P<host>{_HOST}):(?P<port>[0-9]{{1,5}})"
    r"/(?P<swissnum>[!-.0->@-~]+)#v=1"
)  # a swissnum is one path segment: printable, neither space nor "/" nor "?"


@frozen
class Nurl:
    """Where a server is reached over HTTP, and the secret that opens it."""

    spki_hash: bytes  # 32 bytes
    host: str  # a name, IPv4, or IPv6 without its brackets
    port: int
    swissnum: str = field(repr=False)  # as it stands: never decoded
    tor: bool = False

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises FormatError, which never repeats `text`."""
        match = _NURL.fullmatch(text) if len(text) <= NURL_CHARS_MAX else None
        if match is None or not 0 < int(match["port"]) <= _PORT_MAX:
            raise FormatError("not a NURL: pb://HASH@HOST:PORT/SWISSNUM#v=1")
        if "#" in match["swissnum"]:
            raise FormatError("a NURL of an unknown version")
        spki_hash = base64.urlsafe_b64decode(match["hash"] + "=")
        if _hash_text(spki_hash) != match["hash"]:
            raise FormatError("a NURL's hash has stray bits")
        host = match["host"].strip("[]")
        return cls(spki_hash, host, int(match["port"]), match["swissnum"], match["scheme"] == "pb+tor")

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        scheme = "pb+tor" if self.tor else "pb"
        return f"{scheme}://{_hash_text(self.spki_hash)}@{host}:{self.port}/{self.swissnum}#v=1"


def _hash_text(spki_hash: bytes) -> str:
    return base64.urlsafe_b64encode(spki_hash).decode().rstrip("=")


def usable_nurls(texts: Iterable[str]) -> list[Nurl]:
    """Those we can dial: well-formed, and not through Tor."""
    found = []
    for text in texts:
        try:
            nurl = Nurl.parse(text)
        except FormatError:
            continue  # another one may do
        if not nurl.tor:
            found.append(nurl)
    return found


# --- secrets ------------------------------------------------------------------------------------------------


class Secret(Enum):
    """The names secrets go by in headers."""

    LEASE_RENEW = b"lease-renew-secret"
    LEASE_CANCEL = b"lease-cancel-secret"
    UPLOAD = b"upload-secret"
    WRITE_ENABLER = b"write-enabler"


LEASE_SECRETS: Final = frozenset({Secret.LEASE_RENEW, Secret.LEASE_CANCEL})


def authorization(swissnum: str) -> bytes:
    return b"Tahoe-LAFS " + base64.b64encode(swissnum.encode("ascii"))


def is_authorized(headers: Headers, swissnum: str) -> bool:
    """In constant time."""
    given = [value for name, value in headers if name == b"authorization"]
    return len(given) == 1 and hmac.compare_digest(given[0], authorization(swissnum))


def secret_headers(secrets: Mapping[Secret, bytes]) -> list[tuple[bytes, bytes]]:
    return [
        (b"x-tahoe-authorization", name.value + b" " + base64.b64encode(secret)) for name, secret in secrets.items()
    ]


def lease_headers(lease: LeaseSecrets) -> list[tuple[bytes, bytes]]:
    return secret_headers({Secret.LEASE_RENEW: lease.renew, Secret.LEASE_CANCEL: lease.cancel})


def read_secrets(headers: Headers, needed: Collection[Secret]) -> dict[Secret, bytes]:
    """Exactly the secrets needed. Raises FormatError, which never repeats one."""
    found: dict[Secret, bytes] = {}
    for header, line in headers:
        if header != b"x-tahoe-authorization":
            continue
        name, _, encoded = line.strip().partition(b" ")
        try:
            secret = Secret(name)
            found[secret] = base64.b64decode(encoded)  # skips what is not in the alphabet, as 1.20 does
        except (ValueError, binascii.Error):
            raise FormatError("malformed or unknown secret") from None
        if not found[secret] or (secret in LEASE_SECRETS and len(found[secret]) != LEASE_SECRET_BYTES):
            raise FormatError("a secret of the wrong length")
    if set(found) != set(needed):
        raise FormatError("missing or needless secrets")
    return found


# --- paths --------------------------------------------------------------------------------------------------


def path(kind: str, storage_index: bytes, *more: int | str) -> bytes:
    """path("immutable", si, 3) is /storage/v1/immutable/SI/3."""
    return "/".join((PREFIX, kind, base32.b2a(storage_index), *map(str, more))).encode("ascii")


VERSION_PATH: Final = f"{PREFIX}/version".encode("ascii")

_PATH: Final = re.compile(
    rf"{PREFIX}/(?P<kind>immutable|mutable|lease)"
    r"/(?P<si>[a-z2-7]{25}[aeimquy4])"  # the last character has two bits to spare
    rf"(?:/(?P<number>[0-9]{{1,{SHARE_NUMBER_DIGITS_MAX}}}))?(?:/(?P<what>[a-z-]+))?"
)
# (kind, whether there is a share number, what follows): which endpoint each method is
_ENDPOINTS: Final[Mapping[tuple[str, bool, str | None], Mapping[bytes, str]]] = {
    ("immutable", False, None): {b"POST": "allocate"},
    ("immutable", True, None): {b"PATCH": "write", b"GET": "read"},
    ("immutable", True, "abort"): {b"PUT": "abort"},
    ("immutable", False, "shares"): {b"GET": "list"},
    ("immutable", True, "corrupt"): {b"POST": "corrupt"},
    ("lease", False, None): {b"PUT": "lease"},
    ("mutable", False, "read-test-write"): {b"POST": "read_test_write"},
    ("mutable", True, None): {b"GET": "read"},
    ("mutable", False, "shares"): {b"GET": "list"},
    ("mutable", True, "corrupt"): {b"POST": "corrupt"},
}


@frozen
class Route:
    """What a path and a method ask for: `name` is the endpoint's, or None with the methods the path does take."""

    name: str | None
    kind: str = ""
    storage_index: bytes = b""
    number: int = 0
    allowed: tuple[bytes, ...] = ()


def find_route(method: bytes, target: bytes) -> Route:
    """A query is ignored; HEAD goes where GET goes."""
    text = target.partition(b"?")[0].decode("latin-1")
    asked = b"GET" if method == b"HEAD" else method
    if text.encode("latin-1") == VERSION_PATH:
        return Route("version") if asked == b"GET" else Route(None, allowed=(b"GET", b"HEAD"))
    if (match := _PATH.fullmatch(text)) is None:
        return Route(None)
    kind, storage_index, number, what = match.groups()
    names = _ENDPOINTS.get((kind, number is not None, what), {})
    if (name := names.get(asked)) is not None:
        return Route(name, kind, base32.a2b(storage_index), int(number or 0))
    return Route(None, allowed=tuple(each for taken in names for each in _asked_by(taken)))


def _asked_by(method: bytes) -> tuple[bytes, ...]:
    return (method, b"HEAD") if method == b"GET" else (method,)


# --- ranges and types ---------------------------------------------------------------------------------------

_DIGITS: Final = rf"([0-9]{{1,{OFFSET_DIGITS_MAX}}})"
_RANGE: Final = re.compile(rf"bytes={_DIGITS}-{_DIGITS}".encode())
_CONTENT_RANGE: Final = re.compile(rf"bytes {_DIGITS}-{_DIGITS}/(?:\*|{_DIGITS})".encode())


def range_header(offset: int, length: int) -> bytes:
    """For at least one byte: no range can say "none"."""
    return b"bytes=%d-%d" % (offset, offset + length - 1)


def content_range_header(offset: int, length: int) -> bytes:
    return b"bytes %d-%d/*" % (offset, offset + length - 1)


def read_range(value: bytes) -> tuple[int, int]:
    """(offset, length) of a Range header with one closed range. Raises FormatError."""
    if (match := _RANGE.fullmatch(value.strip())) is None:
        raise FormatError("not a closed range of bytes")
    first, last = int(match[1]), int(match[2])
    if last < first:
        raise FormatError("a range that ends before it begins")
    return first, last - first + 1


def read_content_range(value: bytes) -> tuple[int, int]:
    """(offset, length) of a Content-Range header. Raises FormatError."""
    if (match := _CONTENT_RANGE.fullmatch(value.strip())) is None:
        raise FormatError("not a content range of bytes")
    first, last = int(match[1]), int(match[2])
    if last < first or (match[3] is not None and int(match[3]) <= last):
        raise FormatError("a content range that ends before it begins, or beyond the total")
    return first, last - first + 1


def is_cbor(content_type: bytes | None) -> bool:
    """Parameters are allowed."""
    return content_type is not None and content_type.partition(b";")[0].strip().lower() == CBOR_TYPE


def accepts_cbor(accept: bytes | None) -> bool:
    """Whether the entry of Accept rated best is exactly CBOR: wildcards are refused, as 1.20's server does."""
    if accept is None:
        return True
    best, best_rating = b"", -1.0
    for entry in accept.split(b","):
        media_type, *parameters = (part.strip() for part in entry.split(b";"))
        rating = 1.0
        for parameter in parameters:
            name, _, value = parameter.partition(b"=")
            if name.strip().lower() == b"q":
                try:
                    rating = float(value)
                except ValueError:
                    rating = 0.0
        if rating > best_rating:
            best, best_rating = media_type.lower(), rating
    return best == CBOR_TYPE
