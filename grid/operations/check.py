"""How healthy is one file: who holds which share of it (check), and is every byte of each right (verify).

    check_cap(broker, cap, verify=…)   for any cap, of files and directories; the verify cap is enough

Every connected server is asked, and believed unless all is verified. Corrupt shares are reported to their servers. A
literal is always healthy, and so is what we do not know. Shares are verified SHARES_AT_ONCE at a time, each in bounded
memory. Source: checking and verifying as Tahoe-LAFS 1.20 does; time limits are ours. One thing differs: the signature
of every mutable share is checked, not only the first of each version.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Collection
from typing import Final

import trio
from attrs import define, field

from grid.errors import CorruptShareError, PeerError, PeerTimeoutError, ShareError
from grid.formats.base32 import b2a
from grid.formats.caps import Cap, CHKReadCap, CHKVerifyCap, DirectoryCap, LiteralCap, UnknownCap
from grid.formats.mutable_share import MutableHeader
from grid.interfaces import IBucketReader, IStorageBroker, IStorageServer
from grid.operations.check_results import CheckResults, CorruptShare
from grid.operations.corruption import reports_of
from grid.operations.responsiveness import responsiveness_of
from grid.operations.servermap import (
    KNOWN_LATE,
    SHARES_PER_SERVER_MAX,
    MapMode,
    MapRequest,
    ServerMap,
    ShareKey,
    report_corrupt,
    update_servermap,
)
from grid.operations.slot_share import FoundShare
from grid.operations.verify import verify_chk_share, verify_mutable_share
from grid.operations.worker import in_lanes

log = logging.getLogger(__name__)

QUERIES_MAX: Final = 32  # servers asked at once about one file
QUERY_TIMEOUT_S: Final = 10.0
SHARES_AT_ONCE: Final = 6  # being verified, of one file
SHARE_TIMEOUT_S: Final = 3600.0  # to verify one share whole; each read has its own, shorter time
DEFAULT_K: Final = 3  # what is said to be needed where nothing at all was found of a mutable file
DEFAULT_N: Final = 10


async def check_cap(broker: IStorageBroker, cap: Cap, *, verify: bool = False) -> CheckResults:
    """Raises nothing for what is damaged or gone: look at the results."""
    file = cap.file if isinstance(cap, DirectoryCap) else cap
    if isinstance(file, LiteralCap | UnknownCap):
        await trio.lowlevel.checkpoint()
        return CheckResults()
    if isinstance(file, CHKReadCap | CHKVerifyCap):
        return await check_immutable(broker, file.verifier, verify=verify)
    servermap = await update_servermap(broker, MapRequest.of_cap(file, DEFAULT_K, DEFAULT_N), MapMode.CHECK)
    invalid = set(servermap.bad)
    if verify:
        await _verify_versions(servermap, file.storage_index, getattr(file, "writekey", None))
    return mutable_results(file.storage_index, servermap, verified=verify, invalid=invalid)


# --- immutable files


@define(eq=False)
class Holdings:
    """What every connected server says it holds of an immutable file."""

    readers: dict[ShareKey, IBucketReader] = field(factory=dict)
    servers: dict[str, IStorageServer] = field(factory=dict)  # {server id: one that answered}, in permuted order
    failures: dict[str, PeerError] = field(factory=dict)


async def ask_all_servers(broker: IStorageBroker, storage_index: bytes, n: int) -> Holdings:
    """Share numbers of `n` and more do not count."""
    holdings = Holdings()
    responsiveness = responsiveness_of(broker)
    order = broker.get_permuted_servers(storage_index)

    async def ask(server: IStorageServer) -> None:
        late = responsiveness.is_late(server.server_id)
        try:
            with trio.move_on_after(QUERY_TIMEOUT_S * (KNOWN_LATE if late else 1)) as scope:
                readers = await server.get_buckets(storage_index)
            if scope.cancelled_caught:
                responsiveness.late(server.server_id)
                raise PeerTimeoutError(f"server {server.name} did not say what it holds")
        except PeerError as error:
            log.info("server %s: %s", server.name, error)
            holdings.failures[server.server_id] = error
            return
        holdings.servers[server.server_id] = server
        for number in sorted(readers)[:SHARES_PER_SERVER_MAX]:
            if 0 <= number < n:
                holdings.readers[server.server_id, number] = readers[number]

    await in_lanes(QUERIES_MAX, order, ask)
    answered = holdings.servers
    holdings.servers = {server.server_id: server for server in order if server.server_id in answered}
    return holdings


async def check_immutable(broker: IStorageBroker, cap: CHKVerifyCap, *, verify: bool = False) -> CheckResults:
    holdings = await ask_all_servers(broker, cap.storage_index, cap.n)
    bad: dict[ShareKey, ShareError | PeerError] = {}
    if verify:
        bad = await _verify_immutable(cap, holdings)
        await _report_immutable(broker, cap, holdings, bad)
    good: dict[int, set[str]] = defaultdict(set)
    for server_id, number in holdings.readers:
        if (server_id, number) not in bad:
            good[number].add(server_id)
    return CheckResults.of_immutable(
        cap.storage_index,
        cap.k,
        cap.n,
        {number: frozenset(servers) for number, servers in good.items()},
        verified=verify,
        corrupt=_corrupt(bad),
        incompatible=tuple(
            key for key, error in sorted(bad.items(), key=lambda item: item[0]) if _is_incompatible(error)
        ),
        responding=tuple(holdings.servers),
        silent=tuple(sorted(holdings.failures)),
    )


async def _verify_immutable(cap: CHKVerifyCap, holdings: Holdings) -> dict[ShareKey, ShareError | PeerError]:
    """{share that is not good: why}."""
    bad: dict[ShareKey, ShareError | PeerError] = {}

    async def verify(key: ShareKey) -> None:
        server_id, number = key
        server = holdings.servers[server_id]
        try:
            with trio.move_on_after(SHARE_TIMEOUT_S) as scope:
                await verify_chk_share(cap, server, number, holdings.readers[key])
            if scope.cancelled_caught:
                raise PeerTimeoutError(f"share {number} on {server.name} took too long to verify")
        except (ShareError, PeerError) as error:
            log.info("verifying: %s", error)
            bad[key] = error

    await in_lanes(SHARES_AT_ONCE, holdings.readers, verify)
    return bad


async def _report_immutable(
    broker: IStorageBroker, cap: CHKVerifyCap, holdings: Holdings, bad: dict[ShareKey, ShareError | PeerError]
) -> None:
    reports = reports_of(broker)
    with trio.move_on_after(QUERY_TIMEOUT_S):
        async with trio.open_nursery() as nursery:
            for (server_id, number), error in bad.items():
                if isinstance(error, CorruptShareError) and reports.is_news(cap.storage_index, server_id, number):
                    log.warning("%s", error)
                    nursery.start_soon(holdings.readers[server_id, number].advise_corrupt_share, error.reason)


# --- mutable files


async def _verify_versions(servermap: ServerMap, storage_index: bytes, writekey: bytes | None) -> None:
    """Verify every share of the map; what is bad is so in the map afterwards."""

    async def verify(share: FoundShare) -> None:
        try:
            with trio.move_on_after(SHARE_TIMEOUT_S) as scope:
                await verify_mutable_share(share, writekey)
            if scope.cancelled_caught:
                raise PeerTimeoutError(f"share {share.number} on {share.server.name} took too long to verify")
        except ShareError as error:
            servermap.mark_bad(share, error)
        except PeerError as error:
            log.info("verifying: %s", error)
            del servermap.shares[share.server.server_id, share.number]

    before = set(servermap.bad)
    await in_lanes(SHARES_AT_ONCE, list(servermap.shares.values()), verify)
    await report_corrupt(
        servermap.reports, storage_index, [servermap.bad[key] for key in servermap.bad.keys() - before]
    )


def mutable_results(
    storage_index: bytes | None,
    servermap: ServerMap,
    *,
    verified: bool = False,
    invalid: Collection[ShareKey] | None = None,
) -> CheckResults:
    """What a map says of the file's health. It must be of every server.

    `invalid`: which bad shares have no authentic header; None: all.
    """
    invalid = servermap.bad.keys() if invalid is None else invalid
    recoverable = servermap.recoverable()
    versions = servermap.versions()
    best = recoverable[0] if recoverable else _fullest(servermap)
    good: dict[int, set[str]] = defaultdict(set)
    sharemap: dict[str, set[str]] = defaultdict(set)
    for (server_id, number), share in sorted(servermap.shares.items()):
        sharemap[_share_id(share)].add(server_id)
        if best is not None and share.header.version_key == best.version_key:
            good[number].add(server_id)
    responding = {
        *servermap.holders(),
        *servermap.empty,
        *(server for server, _ in (*servermap.bad, *servermap.incompatible)),
    }
    return CheckResults(
        storage_index=storage_index,
        mutable=True,
        verified=verified,
        needed_shares=best.k if best else DEFAULT_K,
        total_shares=best.n if best else DEFAULT_N,
        good={number: frozenset(servers) for number, servers in sorted(good.items())},
        sharemap={share_id: frozenset(servers) for share_id, servers in sharemap.items()},
        wrong_shares=len(servermap.shares) - sum(map(len, good.values())),
        recoverable_versions=len(recoverable),
        unrecoverable_versions=len(versions) - len(recoverable),
        corrupt=_corrupt({key: bad.error for key, bad in servermap.bad.items() if key not in invalid}),
        invalid=_corrupt({key: bad.error for key, bad in servermap.bad.items() if key in invalid}),
        incompatible=tuple(sorted(servermap.incompatible)),
        responding=tuple(sorted(responding - servermap.failures.keys())),
        silent=tuple(sorted(servermap.failures)),
    )


def _fullest(servermap: ServerMap) -> MutableHeader | None:
    """Of versions that cannot be recovered, the one with most shares."""
    versions = servermap.versions().values()
    headers = {len({share.number for share in shares}): shares[0].header for shares in versions}
    return headers[max(headers)] if headers else None


def _share_id(share: FoundShare) -> str:
    return f"seq{share.header.seqnum}-{b2a(share.header.root_hash)[:4]}-sh{share.number}"


def _corrupt(bad: dict[ShareKey, ShareError | PeerError]) -> tuple[CorruptShare, ...]:
    return tuple(
        CorruptShare(server_id, number, error.reason)
        for (server_id, number), error in sorted(bad.items(), key=lambda item: item[0])
        if isinstance(error, CorruptShareError)
    )


def _is_incompatible(error: ShareError | PeerError) -> bool:
    return isinstance(error, ShareError) and not isinstance(error, CorruptShareError)
