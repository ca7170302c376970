"""One share of a mutable file on one server: what the first query brought of it, and reading the rest.

`FoundShare.read` answers from the first query's bytes when they suffice. What it must fetch it fetches together
with the share's checkstring, in one call: a share that another writer has replaced meanwhile is then seen to be
replaced, and not taken for a corrupt one.

Source: the order of trust of Tahoe-LAFS 1.20's mutable shares (fingerprint, public key, signature, root hash).
"""

from __future__ import annotations

import hmac
from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

from attrs import define, field

from grid import crypto
from grid.errors import CorruptShareError, FormatError, PeerError, ShareVersionError, UnknownVersionError
from grid.formats import hashutil
from grid.formats.mutable_share import MutableHeader, Range, parse_header
from grid.interfaces import IStorageServer

SIGNATURES_REMEMBERED: Final = 64  # per file; every share of a version has the same one


class ShareReplacedError(PeerError):
    """The share is no longer of the version that was mapped: map again."""


class ShareVerifier:
    """Checks the public key and signature of one file's shares, each different one once.

    `fingerprint` is the cap's: 32 bytes.
    """

    def __init__(self, fingerprint: bytes) -> None:
        self._fingerprint = fingerprint
        self._keys: dict[bytes, crypto.RSAPublicKey] = {}  # one entry: only one key has the fingerprint
        self._verified: OrderedDict[tuple[bytes, bytes], None] = OrderedDict()

    def check(self, public_der: bytes, signature: bytes, signed_prefix: bytes) -> None:
        """Raises FormatError."""
        if public_der not in self._keys:
            if not hmac.compare_digest(hashutil.fingerprint_of_public_key(public_der), self._fingerprint):
                raise FormatError("public key does not match the fingerprint")
            self._keys[public_der] = crypto.RSAPublicKey.from_der(public_der)
        key = signed_prefix, signature
        if key in self._verified:
            self._verified.move_to_end(key)
            return
        self._keys[public_der].verify_pss(signature, signed_prefix)
        self._verified[key] = None
        while len(self._verified) > SIGNATURES_REMEMBERED:
            self._verified.popitem(last=False)


@define(eq=False)
class FoundShare:
    """One share whose header is authentic. `head` is how it began when it was mapped, its first bytes."""

    server: IStorageServer
    storage_index: bytes = field(repr=False)
    number: int
    header: MutableHeader
    head: bytes = field(repr=False)
    whole: bool = field(repr=False)  # the share has no bytes beyond `head`
    public_der: bytes = field(default=b"", repr=False)

    def has(self, parts: Sequence[Range]) -> bool:
        """Whether read() of these needs no round trip."""
        return all(offset + length <= len(self.head) for offset, length in parts)

    @property
    def has_private_key(self) -> bool:
        return self.has([self.header.offsets.encrypted_private_key])

    async def read(self, parts: Sequence[Range]) -> list[bytes]:
        """The bytes of each part, all of them. Raises CorruptShareError, ShareReplacedError, PeerError."""
        found: dict[Range, bytes] = {}
        missing: list[Range] = []
        for part in parts:
            offset, length = part
            if offset + length <= len(self.head):
                found[part] = self.head[offset : offset + length]
            elif self.whole:
                raise self.corrupt("share ends too early")
            elif part not in missing:
                missing.append(part)
        if missing:
            found.update(zip(missing, await self._fetch(missing), strict=True))
        return [found[part] for part in parts]

    async def _fetch(self, parts: list[Range]) -> list[bytes]:
        checkstring = self.header.checkstring
        answer = await self.server.slot_readv(self.storage_index, [self.number], [(0, len(checkstring)), *parts])
        data = answer.get(self.number)
        if data is None or len(data) != 1 + len(parts) or data[0] != checkstring:
            raise ShareReplacedError(f"share {self.number} on {self.server.name} was replaced")
        for (_, length), got in zip(parts, data[1:], strict=True):
            if len(got) != length:
                raise self.corrupt("share ends too early")
        return data[1:]

    async def read_encrypted_private_key(self) -> bytes:
        return (await self.read([self.header.offsets.encrypted_private_key]))[0]

    def corrupt(self, reason: str) -> CorruptShareError:
        return CorruptShareError(self.server.name, self.number, reason)


async def open_share(
    server: IStorageServer, storage_index: bytes, number: int, head: bytes, *, whole: bool, verifier: ShareVerifier
) -> FoundShare:
    """Authenticate a share's header. Asks the server again only if `head` does not reach to the signature.

    Raises CorruptShareError, ShareVersionError, PeerError.
    """
    try:
        header = parse_header(head)
        if not 0 <= number < header.n:
            raise FormatError("share number beyond N")
        share = FoundShare(server, storage_index, number, header, head, whole)
        public_der, signature = await share.read([header.offsets.public_key, header.offsets.signature])
        verifier.check(public_der, signature, header.signed_prefix)
    except UnknownVersionError as error:
        raise ShareVersionError(server.name, number, error.version) from None
    except FormatError as error:
        raise CorruptShareError(server.name, number, str(error)) from None
    share.public_der = public_der
    return share
