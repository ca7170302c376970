"""The URI extension block (UEB): what a CHK cap's hash vouches for, one at the end of every share.

    for each key, ascending:   key ":" netstring(value)

Numbers are decimal ASCII, hashes 32 raw bytes. Eleven keys are written, always: the bytes are hashed into
the cap, so two uploaders agree on a cap only if they agree on every byte here. Of those, a download needs
`segment_size` and the two root hashes; k, N and size come from the cap, the rest is arithmetic.

Source: the UEB as Tahoe-LAFS 1.20 writes it. Its verifier refuses one of 2000 bytes or more; the limits on
segments are ours.
"""

from __future__ import annotations

import hmac
import re
from typing import Final, Self

from attrs import field, frozen

from grid.errors import FormatError
from grid.formats.hashutil import HASH_BYTES, uri_extension_hash
from grid.formats.netstring import netstring, read_netstring
from grid.formats.segments import Segmentation

UEB_BYTES_MAX: Final = 2000
SHARES_MAX: Final = 256
SEGMENT_BYTES_MAX: Final = 64 << 20  # ours: a segment is held whole in memory, and the uploader chose its size
SEGMENTS_MAX: Final = 1 << 20  # ours: 1 TiB in usual segments; each costs two hash tree nodes per share in memory

_KEY = re.compile(rb"([a-zA-Z_-]{1,64}):")
_NUMBER = re.compile(rb"[0-9]{1,20}")


@frozen
class URIExtension:
    """One file's UEB. Sizes in bytes, `segment_size` a multiple of `k`; hashes are 32 bytes.

    `crypttext_hash` (of the whole ciphertext) is None when a UEB that was read has none: downloads do
    without it.
    """

    size: int
    segment_size: int
    k: int
    n: int
    num_segments: int
    crypttext_hash: bytes | None = field(repr=False)
    crypttext_root_hash: bytes = field(repr=False)
    share_root_hash: bytes = field(repr=False)

    @property
    def segmentation(self) -> Segmentation:
        return Segmentation(size=self.size, k=self.k, segment_size=self.segment_size)

    def pack(self) -> bytes:
        """The exact bytes every share holds."""
        if self.crypttext_hash is None:
            raise ValueError("a UEB is written with its crypttext_hash")
        return b"".join(key.encode() + b":" + netstring(value) for key, value in sorted(self.fields().items()))

    def fields(self) -> dict[str, bytes]:
        """{key: value as it stands in the UEB}; no `crypttext_hash` when there is none."""
        hashes = {
            b"crypttext_root_hash": self.crypttext_root_hash,
            b"share_root_hash": self.share_root_hash,
        }
        if self.crypttext_hash is not None:
            hashes[b"crypttext_hash"] = self.crypttext_hash
        return {key.decode("ascii"): value for key, value in (hashes | self._derived_values()).items()}

    def hash(self) -> bytes:
        """32 bytes: what goes into the cap."""
        return uri_extension_hash(self.pack())

    def _derived_values(self) -> dict[bytes, bytes]:
        """The keys that follow from the cap and the segment size."""
        return {
            b"codec_name": b"crs",
            b"codec_params": b"%d-%d-%d" % (self.segment_size, self.k, self.n),
            b"needed_shares": b"%d" % self.k,
            b"num_segments": b"%d" % self.num_segments,
            b"segment_size": b"%d" % self.segment_size,
            b"size": b"%d" % self.size,
            b"tail_codec_params": b"%d-%d-%d" % (self.segmentation.tail_padded, self.k, self.n),
            b"total_shares": b"%d" % self.n,
        }

    @classmethod
    def unpack(
        cls, data: bytes | memoryview, *, ueb_hash: bytes, k: int, n: int, size: int, strict: bool = False
    ) -> Self:
        """Read a UEB, which must hash to `ueb_hash`; `k`, `n` and `size` are the cap's.

        `strict` is for verifying a file: what a download does not look at must agree with the cap too,
        where it is present. Raises FormatError.
        """
        if len(data) >= UEB_BYTES_MAX:
            raise FormatError(f"UEB of {UEB_BYTES_MAX} bytes or more")
        if not hmac.compare_digest(uri_extension_hash(data), ueb_hash):
            raise FormatError("UEB does not hash to what the cap says")
        if not (1 <= k <= n <= SHARES_MAX and size >= 1):
            raise FormatError("the cap's k, N or size is impossible")
        values = _split(bytes(data))
        segment_size = _read_segment_size(values, k=k, size=size)
        extension = cls(
            size=size,
            segment_size=segment_size,
            k=k,
            n=n,
            num_segments=-(-size // segment_size),
            crypttext_hash=_read_hash(values, b"crypttext_hash") if b"crypttext_hash" in values else None,
            crypttext_root_hash=_read_hash(values, b"crypttext_root_hash"),
            share_root_hash=_read_hash(values, b"share_root_hash"),
        )
        if strict:
            for key, expected in extension._derived_values().items():
                if values.get(key, expected) != expected:
                    raise FormatError(f"UEB contradicts itself or its cap in {key.decode('ascii')}")
        return extension


def read_unproven(data: bytes | memoryview) -> URIExtension:
    """A UEB by its own word alone, for who has no cap: what it says of k, N and size must agree with the rest of it.

    Raises FormatError.
    """
    if len(data) >= UEB_BYTES_MAX:
        raise FormatError(f"UEB of {UEB_BYTES_MAX} bytes or more")
    values = _split(bytes(data))
    k, n, size = (_read_number(values, key) for key in (b"needed_shares", b"total_shares", b"size"))
    return URIExtension.unpack(data, ueb_hash=uri_extension_hash(data), k=k, n=n, size=size, strict=True)


def expected_ueb_size(segmentation: Segmentation, n: int) -> int:
    """Bytes the UEB of such a file takes: an upload must know before it has encoded anything."""
    blank = bytes(HASH_BYTES)
    extension = URIExtension(
        size=segmentation.size,
        segment_size=segmentation.segment_size,
        k=segmentation.k,
        n=n,
        num_segments=segmentation.num_segments,
        crypttext_hash=blank,
        crypttext_root_hash=blank,
        share_root_hash=blank,
    )
    return len(extension.pack())


def _split(data: bytes) -> dict[bytes, bytes]:
    values: dict[bytes, bytes] = {}
    position = 0
    while position < len(data):
        match = _KEY.match(data, position)
        if match is None:
            raise FormatError("UEB has no key where one should be")
        value, position = read_netstring(data, match.end())
        if match[1] in values:
            raise FormatError("UEB has a key twice")
        values[match[1]] = bytes(value)
    return values


def _read_hash(values: dict[bytes, bytes], key: bytes) -> bytes:
    value = values.get(key, b"")
    if len(value) != HASH_BYTES:
        raise FormatError(f"UEB lacks a usable {key.decode('ascii')}")
    return value


def _read_number(values: dict[bytes, bytes], key: bytes) -> int:
    text = values.get(key, b"")
    if not _NUMBER.fullmatch(text):
        raise FormatError(f"UEB lacks a usable {key.decode('ascii')}")
    return int(text)


def _read_segment_size(values: dict[bytes, bytes], *, k: int, size: int) -> int:
    segment_size = _read_number(values, b"segment_size")
    if not 1 <= segment_size <= SEGMENT_BYTES_MAX or segment_size % k:
        raise FormatError(f"UEB has an impossible segment size for k={k}")
    if -(-size // segment_size) > SEGMENTS_MAX:
        raise FormatError(f"file has more than {SEGMENTS_MAX} segments")
    return segment_size
