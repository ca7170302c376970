"""Announcements: what a server says of itself through an introducer, signed; and who vouches for it.

    (message, signature, key)     three byte strings
    message     JSON object in UTF-8; signed as it stands
    signature   "v0-" base32 of the 64-byte Ed25519 signature
    key         "v0-" base32 of the 32-byte public key: the server id

A grid manager's certificate, carried in the announcement, is {"certificate": JSON text, "signature": base32}; the
text holds "expires" (ISO 8601), "public_key" ("pub-" and the server id) and "version".

Source: Tahoe-LAFS 1.20's introducer protocol and grid managers. Limits are ours: anyone who knows the introducer can
write anything into these. What is merely odd is dropped; only what makes an announcement useless is an error.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any, Final, TypeAlias

from attrs import field, frozen

from grid.crypto import BadSignatureError, SigningKey, verify_ed25519
from grid.errors import FormatError
from grid.formats.base32 import a2b, b2a
from grid.formats.furl import Furl

SERVICE_STORAGE: Final = "storage"

MESSAGE_BYTES_MAX: Final = 1 << 16
MESSAGE_BRACKETS_MAX: Final = 512  # so nesting is bounded too, for all who walk through `raw`
SERVER_ID_CHARS_MAX: Final = 128
NICKNAME_CHARS_MAX: Final = 64
SEED_BYTES_MAX: Final = 256
NURLS_MAX: Final = 8
NURL_CHARS_MAX: Final = 1024
CERTIFICATES_MAX: Final = 32  # each is a signature to verify
CERTIFICATE_CHARS_MAX: Final = 2048

_KEY: Final = re.compile(r"v0-([a-z2-7]{52})")
_SIGNATURE: Final = re.compile(r"v0-([a-z2-7]{103})")

SignedAnnouncement: TypeAlias = tuple[bytes, bytes, bytes]


@frozen
class GridManagerCertificate:
    """Some key's word that a server may be uploaded to. Not verified yet."""

    certificate: str  # JSON text, as signed
    signature: bytes


@frozen
class Announcement:
    """One server's offer of one service."""

    server_id: str  # "v0-…", or free text for a server configured by hand
    service_name: str
    nickname: str  # printable, and short
    furl: Furl | None
    nurls: tuple[str, ...] = field(repr=False)  # secrets, as the FURL's name is
    permutation_seed: bytes = field(repr=False)
    seqnum: int | None
    grid_manager_certificates: tuple[GridManagerCertificate, ...] = field(repr=False)
    raw: Mapping[str, Any] = field(repr=False)  # all of it, to be kept and compared

    @property
    def short_name(self) -> str:
        """Eight characters for a log."""
        return self.server_id.removeprefix("v0-")[:8]


def parse_signed(triple: object) -> Announcement:
    """Raises FormatError, BadSignatureError among them."""
    if not isinstance(triple, tuple | list) or len(triple) != 3 or not all(isinstance(part, bytes) for part in triple):
        raise FormatError("an announcement is not three byte strings")
    message, signature_text, key_text = triple
    if len(message) > MESSAGE_BYTES_MAX:
        raise FormatError(f"an announcement of over {MESSAGE_BYTES_MAX} bytes")
    server_id = key_text.decode("ascii", "replace")
    public, signature = _binary(_KEY, server_id), _binary(_SIGNATURE, signature_text.decode("ascii", "replace"))
    verify_ed25519(public, signature, message)
    return from_mapping(server_id, _json_object(message))


def from_mapping(server_id: str, ann: Mapping[str, Any]) -> Announcement:
    """From the JSON object alone: a cache's, or one configured by hand, of which only the FURL is needed.

    Raises FormatError.
    """
    if not isinstance(ann, Mapping):
        raise FormatError("an announcement is not a mapping")
    if not 0 < len(server_id) <= SERVER_ID_CHARS_MAX or not server_id.isprintable():
        raise FormatError("not a server id")
    service_name = ann.get("service-name", SERVICE_STORAGE)
    furl, seqnum = ann.get("anonymous-storage-FURL"), ann.get("seqnum")
    if not isinstance(service_name, str) or not isinstance(furl, str | None):
        raise FormatError("an announcement's service name or FURL is not text")
    return Announcement(
        server_id,
        service_name,
        _printable(ann.get("nickname")),
        None if furl is None else Furl.parse(furl),
        _nurls(ann.get("anonymous-storage-NURLs")),
        _permutation_seed(server_id, ann.get("permutation-seed-base32")),
        seqnum if type(seqnum) is int else None,
        _certificates(ann.get("grid-manager-certificates")),
        ann,
    )


def sign_announcement(ann: Mapping[str, Any], key: SigningKey) -> SignedAnnouncement:
    """What a server publishes. The receiver never serialises it again, so order and spacing are ours to choose."""
    message = json.dumps(ann).encode("ascii")
    return message, f"v0-{b2a(key.sign(message))}".encode("ascii"), f"v0-{b2a(key.public_bytes)}".encode("ascii")


def certified_until(
    certificates: Collection[GridManagerCertificate], manager_keys: Collection[bytes], server_id: str
) -> float:
    """Until when (POSIX seconds) one of these managers vouches for this server; -inf if none does.

    `manager_keys` are Ed25519 public keys of 32 bytes. Verifying takes a good part of a millisecond: keep the answer.
    """
    return max(
        (
            _expiry(certificate, server_id)
            for certificate in certificates
            if any(_signed_by(certificate, key) for key in manager_keys)
        ),
        default=-math.inf,
    )


def _expiry(certificate: GridManagerCertificate, server_id: str) -> float:
    try:
        claims = _json_object(certificate.certificate.encode("utf-8"))
        expires = datetime.fromisoformat(str(claims.get("expires")))
        if expires.tzinfo is None:
            expires = expires.replace(tzinfo=UTC)
        return expires.timestamp() if claims.get("public_key") == f"pub-{server_id}" else -math.inf
    except (FormatError, ValueError, OverflowError):
        return -math.inf


def _signed_by(certificate: GridManagerCertificate, key: bytes) -> bool:
    try:
        verify_ed25519(key, certificate.signature, certificate.certificate.encode("utf-8"))
    except BadSignatureError:
        return False
    return True


# --- one field each -----------------------------------------------------------------------------------------


def _binary(pattern: re.Pattern[str], text: str) -> bytes:
    if (match := pattern.fullmatch(text)) is None:
        raise FormatError("an announcement's key or signature is of an unknown kind")
    return a2b(match[1])


def _json_object(message: bytes) -> dict[str, Any]:
    if message.count(b"[") + message.count(b"{") > MESSAGE_BRACKETS_MAX:
        raise FormatError("an announcement holds too much")
    try:
        parsed = json.loads(message)
        json.dumps(parsed, ensure_ascii=False).encode("utf-8")  # fails for half a surrogate pair, which no file takes
    except (ValueError, RecursionError):
        raise FormatError("an announcement is not JSON") from None
    if not isinstance(parsed, dict):
        raise FormatError("an announcement is not a JSON object")
    return parsed


def _printable(nickname: object) -> str:
    """It is shown in terminals and logs, so control characters do not pass."""
    text = nickname if isinstance(nickname, str) else ""
    return "".join(c if c.isprintable() else "?" for c in text[:NICKNAME_CHARS_MAX])


def _permutation_seed(server_id: str, announced: object) -> bytes:
    """Whatever is announced, decoded once (1.20's servers encode a text that is base32 itself); else the key."""
    if announced is not None:
        if not isinstance(announced, str):
            raise FormatError("an announcement's permutation seed is not text")
        seed = a2b(announced)
        if len(seed) > SEED_BYTES_MAX:
            raise FormatError(f"an announcement's permutation seed is over {SEED_BYTES_MAX} bytes")
        return seed
    if match := _KEY.fullmatch(server_id):
        return a2b(match[1])
    return sha256(server_id.encode("utf-8")).digest()


def _nurls(announced: object) -> tuple[str, ...]:
    nurls = announced if isinstance(announced, list) else []
    good = [nurl for nurl in nurls if isinstance(nurl, str) and len(nurl) <= NURL_CHARS_MAX and nurl.isprintable()]
    return tuple(good[:NURLS_MAX])


def _certificates(announced: object) -> tuple[GridManagerCertificate, ...]:
    found = []
    for entry in announced if isinstance(announced, list) else ():
        certificate, signature = (
            (entry.get("certificate"), entry.get("signature")) if isinstance(entry, Mapping) else (None, None)
        )
        if not isinstance(certificate, str) or len(certificate) > CERTIFICATE_CHARS_MAX or not certificate.isascii():
            continue
        if not isinstance(signature, str) or len(signature) > CERTIFICATE_CHARS_MAX:
            continue
        try:
            found.append(GridManagerCertificate(certificate, a2b(signature)))
        except FormatError:
            continue  # another one may do
    return tuple(found[:CERTIFICATES_MAX])
