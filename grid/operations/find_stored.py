"""Is a file on the grid already, whole? Answered from its storage index alone, for who has no cap: an upload helper.

Every server is asked what it holds; then the UEB is read from a share of each of several servers. It says how many
shares there should be. It is believed when those that were read agree, since there is no cap to prove it by.
"""

from __future__ import annotations

import logging
from typing import Final

import trio
from attrs import field, frozen

from grid.errors import FormatError, PeerError
from grid.formats.chk_share import HEADER_BYTES_MAX, ShareLayout
from grid.formats.hashutil import uri_extension_hash
from grid.formats.ueb import URIExtension, read_unproven
from grid.interfaces import IBucketReader, IStorageBroker, IStorageServer

log = logging.getLogger(__name__)

QUERY_TIMEOUT_S: Final = 10.0
QUERIES_MAX: Final = 32  # at a time
UEB_READS_MAX: Final = 10  # servers whose word is compared
SHARES_PER_SERVER_MAX: Final = 256


@frozen
class StoredFile:
    """A whole file on the grid. `sharemap` is {share number: server ids}."""

    extension: URIExtension
    ueb_hash: bytes = field(repr=False)
    sharemap: dict[int, frozenset[str]]
    holders: tuple[IStorageServer, ...] = field(repr=False)


async def find_stored(broker: IStorageBroker, storage_index: bytes) -> StoredFile | None:
    """None unless every share of it is on some server that answers."""
    found: dict[IStorageServer, dict[int, IBucketReader]] = {}
    limit = trio.CapacityLimiter(QUERIES_MAX)

    async def ask(server: IStorageServer) -> None:
        async with limit:
            try:
                with trio.move_on_after(QUERY_TIMEOUT_S):
                    found[server] = dict(sorted((await server.get_buckets(storage_index)).items()))
            except PeerError as error:
                log.info("server %s: %s", server.name, error)

    async with trio.open_nursery() as nursery:
        for server in broker.get_permuted_servers(storage_index):
            nursery.start_soon(ask, server)
    holders = {server: readers for server, readers in found.items() if readers}
    ueb = await _agreed_ueb([next(iter(readers.values())) for readers in holders.values()][:UEB_READS_MAX])
    if ueb is None:
        return None
    extension, ueb_hash = ueb
    sharemap: dict[int, set[str]] = {}
    for server, readers in holders.items():
        for number in list(readers)[:SHARES_PER_SERVER_MAX]:
            if 0 <= number < extension.n:
                sharemap.setdefault(number, set()).add(server.server_id)
    if len(sharemap) < extension.n:
        return None
    return StoredFile(extension, ueb_hash, {n: frozenset(ids) for n, ids in sharemap.items()}, tuple(holders))


async def _agreed_ueb(readers: list[IBucketReader]) -> tuple[URIExtension, bytes] | None:
    """None when nobody answers, when one of them is damaged, and when two differ."""
    uebs: set[bytes] = set()

    async def read(reader: IBucketReader) -> None:
        try:
            with trio.move_on_after(QUERY_TIMEOUT_S):
                uebs.add(await _read_ueb(reader))
        except FormatError as error:
            log.info("a share's UEB cannot be read: %s", error)
            uebs.add(b"")
        except PeerError as error:
            log.info("a server does not show a UEB: %s", error)

    async with trio.open_nursery() as nursery:
        for reader in readers:
            nursery.start_soon(read, reader)
    try:
        (ueb,) = uebs
        return read_unproven(ueb), uri_extension_hash(ueb)
    except (ValueError, FormatError):
        return None


async def _read_ueb(reader: IBucketReader) -> bytes:
    layout = ShareLayout.parse(await reader.read(0, HEADER_BYTES_MAX))
    length = layout.parse_ueb_size(await reader.read(layout.ueb, layout.ueb_length_bytes))
    ueb = await reader.read(layout.ueb + layout.ueb_length_bytes, length)
    if len(ueb) != length:
        raise FormatError("share ends within its UEB")
    return ueb
