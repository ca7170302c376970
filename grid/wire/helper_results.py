"""What an upload helper answers when a file is on the grid: values ↔ the UploadResults copyable. Does no I/O.

    timings {text: seconds}   sharemap {share number: {server id}}   servermap {server id: {share number}}
    file_size   ciphertext_fetched   uri   preexisting_shares   pushed_shares
    uri_extension_hash (32 bytes)   uri_extension_data {text: bytes or int}   verifycapstr (after an upload)

A reader looks only at what it needs and ignores attributes it does not know. Server ids are `v0-…` texts as bytes.
Source: the answers of Tahoe-LAFS 1.20's helper.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from attrs import field, frozen

from grid.errors import RemoteProtocolError
from grid.formats.cap_kinds import CHKVerifyCap
from grid.formats.ueb import URIExtension
from grid.wire.failures import UPLOAD_RESULTS_TYPE, Copyable

SHARES_MAX: Final = 256
SERVERS_MAX: Final = 2000  # ours: named in one answer
SERVER_ID_BYTES_MAX: Final = 256
HASH_BYTES: Final = 32
_NUMBERS: Final = ("needed_shares", "total_shares", "segment_size", "size")


@frozen
class HelperResults:
    """Where a file is. `sharemap` is {share number: server ids}; sizes are in bytes."""

    ueb_hash: bytes = field(repr=False)  # 32 bytes
    k: int
    n: int
    segment_size: int
    size: int
    sharemap: Mapping[int, frozenset[str]] = field(repr=False)
    pushed_shares: int = 0
    preexisting_shares: int = 0

    @classmethod
    def parse(cls, answer: object) -> HelperResults:
        """Raises RemoteProtocolError when the answer is not one."""
        if not isinstance(answer, Copyable) or answer.type_name != UPLOAD_RESULTS_TYPE:
            raise RemoteProtocolError("the helper's answer is no upload results")
        found = answer.attributes
        ueb_hash, told = found.get(b"uri_extension_hash"), found.get(b"uri_extension_data")
        if not isinstance(ueb_hash, bytes) or len(ueb_hash) != HASH_BYTES or not isinstance(told, dict):
            raise RemoteProtocolError("the helper's answer lacks what a cap is made of")
        k, n, segment_size, size = (_number(told.get(name)) for name in _NUMBERS)
        return cls(
            ueb_hash=ueb_hash,
            k=k,
            n=n,
            segment_size=segment_size,
            size=size,
            sharemap=_sharemap(found.get(b"sharemap")),
            pushed_shares=_number(found.get(b"pushed_shares", 0)),
            preexisting_shares=_number(found.get(b"preexisting_shares", 0)),
        )


def _number(value: object) -> int:
    if type(value) is not int or not 0 <= value < 1 << 64:
        raise RemoteProtocolError("the helper's answer has something else where a number should be")
    return value


def _sharemap(value: object) -> dict[int, frozenset[str]]:
    """What does not fit is left out: it says nothing about where shares are."""
    if not isinstance(value, dict) or len(value) > SHARES_MAX:
        raise RemoteProtocolError("the helper's answer has no usable sharemap")
    sharemap = {}
    for number, servers in value.items():
        if type(number) is not int or not isinstance(servers, set | frozenset) or len(servers) > SERVERS_MAX:
            continue
        usable = [each for each in servers if isinstance(each, bytes) and len(each) <= SERVER_ID_BYTES_MAX]
        sharemap[number] = frozenset(each.decode("ascii", "replace") for each in usable)
    return sharemap


def results_to_send(
    extension: URIExtension,
    ueb_hash: bytes,
    sharemap: Mapping[int, frozenset[str]],
    *,
    pushed: int = 0,
    preexisting: int = 0,
    fetched: int | None = None,
    timings: Mapping[str, float] | None = None,
    verify_cap: CHKVerifyCap | None = None,
) -> Copyable:
    """`fetched` and `verify_cap` are None when the file was found on the grid: then less is told."""
    servermap: dict[bytes, set[int]] = {}
    for number, servers in sharemap.items():
        for server in servers:
            servermap.setdefault(server.encode(), set()).add(number)
    attributes: dict[bytes, Any] = {
        b"timings": dict(timings or {}),
        b"sharemap": {number: {server.encode() for server in servers} for number, servers in sharemap.items()},
        b"servermap": servermap if verify_cap is not None else {},
        b"file_size": extension.size if verify_cap is not None else None,
        b"ciphertext_fetched": fetched,
        b"uri": None,
        b"preexisting_shares": preexisting,
        b"pushed_shares": pushed,
        b"uri_extension_hash": ueb_hash,
        b"uri_extension_data": _extension_data(extension),
    }
    if verify_cap is not None:
        attributes[b"verifycapstr"] = str(verify_cap).encode()
    return Copyable(UPLOAD_RESULTS_TYPE, attributes)


def _extension_data(extension: URIExtension) -> dict[str, bytes | int]:
    return {
        key: int(value) if value.isdigit() and not key.endswith("hash") else value
        for key, value in extension.fields().items()
    }
