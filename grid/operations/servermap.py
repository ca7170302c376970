"""Which shares of a mutable file are where, and of which versions: the map every read and write starts from.

    update_servermap(broker, cap, mode)  ->  ServerMap
        versions: {what a share's signed header and offset table say: [the shares that say so]}
        recoverable: at least k distinct share numbers;  best: the largest (seqnum, root hash) of those

Each server is asked once for the first bytes of all its shares, which for a small file (most directories) is
all there is: the retrieve that follows then needs no further round trip. How many servers are asked, and
when to stop, depends on the mode:

    READ     the first k + k servers; stop when they answered, a version is recoverable, and nothing newer was seen
    WRITE    the first N + k; stop when k servers in a row after the last holder had none
    CHECK    every server, headers only;  REPAIR  every server

A server that does not answer within its mode's `*_SLOW_S` is passed over and others are asked in its place;
its answer still counts when it comes before the map is done. For a while after, it is given less time.

Source: the version rules of Tahoe-LAFS 1.20's mutable files. Time limits are ours.
"""

from __future__ import annotations

import enum
import logging
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from typing import Final

import trio
from attrs import define, field, frozen

from grid import stats
from grid.errors import CorruptShareError, FormatError, PeerError, PeerTimeoutError, ShareError, ShareVersionError
from grid.formats import caps
from grid.formats.mutable_share import MutableHeader
from grid.interfaces import IStorageBroker, IStorageServer
from grid.operations.corruption import CorruptionReports, reports_of
from grid.operations.happiness import happiness
from grid.operations.keys import MutableKeys
from grid.operations.responsiveness import responsiveness_of
from grid.operations.slot_share import FoundShare, ShareVerifier, open_share

log = logging.getLogger(__name__)

MAP_SECONDS: Final = stats.histogram("servermap_seconds", "Seconds it took to find a mutable file's versions.")

READ_BYTES: Final = 4000  # of each share, in the first query
CHECK_READ_BYTES: Final = 1000
QUERIES_MAX: Final = 32  # in flight for one map
QUERIES_BEYOND: Final = 5  # in flight once the mode's first servers have been asked
QUERY_TIMEOUT_S: Final = 8.0  # a server that has not answered by then is as good as gone
READ_SLOW_S: Final = 0.5
WRITE_SLOW_S: Final = 2.0
KNOWN_LATE: Final = 0.1  # part of that time given to a server that was late a short while ago
REPORT_TIMEOUT_S: Final = 1.0  # for telling servers of their corrupt shares
SHARES_PER_SERVER_MAX: Final = 256
SPECIMEN_BYTES: Final = 75  # of a bad share: what a write that replaces it must still find


class MapMode(enum.Enum):
    READ = "read"
    WRITE = "write"
    CHECK = "check"
    REPAIR = "repair"

    @property
    def every_server(self) -> bool:
        return self in (MapMode.CHECK, MapMode.REPAIR)

    @property
    def slow_s(self) -> float:
        return {MapMode.READ: READ_SLOW_S, MapMode.WRITE: WRITE_SLOW_S}.get(self, QUERY_TIMEOUT_S)


@frozen
class BadShare:
    """A share that failed a check; `specimen` is how it begins, for the write that replaces it."""

    server: IStorageServer
    number: int
    specimen: bytes = field(repr=False)
    error: ShareError


ShareKey = tuple[str, int]  # (server id, share number)
VersionKey = tuple[object, ...]


@define(eq=False)
class ServerMap:
    """What was found. Changed only while it is being made, and by mark_bad()."""

    shares: dict[ShareKey, FoundShare] = field(factory=dict)
    bad: dict[ShareKey, BadShare] = field(factory=dict)
    incompatible: dict[ShareKey, BadShare] = field(factory=dict)  # of an unknown layout: never overwritten
    empty: dict[str, IStorageServer] = field(factory=dict)  # asked, answered, held nothing
    failures: dict[str, PeerError] = field(factory=dict)  # servers that failed or were passed over
    keys: MutableKeys | None = field(default=None, repr=False)  # where the mode and the cap call for them
    made_at: float = field(factory=trio.current_time)
    mode: MapMode | None = None  # None: made by a publish
    reports: CorruptionReports = field(factory=CorruptionReports, repr=False)  # the grid's

    def versions(self) -> dict[VersionKey, list[FoundShare]]:
        found: dict[VersionKey, list[FoundShare]] = defaultdict(list)
        for share in self.shares.values():
            found[share.header.version_key].append(share)
        return dict(found)

    def recoverable(self) -> list[MutableHeader]:
        """Best first."""
        good = [
            shares[0].header
            for shares in self.versions().values()
            if len({share.number for share in shares}) >= shares[0].header.k
        ]
        return sorted(good, key=_rank, reverse=True)

    def best(self) -> MutableHeader | None:
        return next(iter(self.recoverable()), None)

    def happiness_of(self, header: MutableHeader) -> int:
        return happiness_of(key for key, s in self.shares.items() if s.header.version_key == header.version_key)

    def shares_of(self, header: MutableHeader) -> list[FoundShare]:
        return [share for share in self.shares.values() if share.header.version_key == header.version_key]

    @property
    def highest_seqnum(self) -> int:
        """Over all shares, recoverable or not; 0 if there are none."""
        return max((share.header.seqnum for share in self.shares.values()), default=0)

    @property
    def unrecoverable_newer(self) -> bool:
        """Whether something newer than the best version was seen, but too few shares of it."""
        best = self.best()
        return self.highest_seqnum > (best.seqnum if best else 0)

    @property
    def needs_merge(self) -> bool:
        """Two recoverable versions share a sequence number: two writers raced."""
        seqnums = [header.seqnum for header in self.recoverable()]
        return len(seqnums) != len(set(seqnums))

    @property
    def found(self) -> int:
        """Distinct share numbers of the version with most of them."""
        return max((len({share.number for share in shares}) for shares in self.versions().values()), default=0)

    def holders(self) -> frozenset[str]:
        """Server ids."""
        return frozenset(server_id for server_id, _ in self.shares)

    def complete(self, n: int) -> bool:
        """Whether every share number has a place."""
        return len({share.number for share in self.shares.values()}) == n

    def mark_bad(self, share: FoundShare, error: ShareError) -> None:
        key = share.server.server_id, share.number
        if self.shares.get(key) is share:
            del self.shares[key]
            self.bad[key] = BadShare(share.server, share.number, bytes(share.head[:SPECIMEN_BYTES]), error)


def happiness_of(places: Iterable[ShareKey]) -> int:
    """On how many servers a share of their own can be counted."""
    sharemap: dict[int, set[str]] = defaultdict(set)
    for server_id, number in places:
        sharemap[number].add(server_id)
    return happiness(sharemap)


def _rank(header: MutableHeader) -> tuple[int, bytes]:
    return header.seqnum, header.root_hash


@frozen
class MapRequest:
    """What to look for. `k`, `n`: the client's own, until a share has told the file's."""

    storage_index: bytes = field(repr=False)
    fingerprint: bytes = field(repr=False)
    k: int
    n: int
    writekey: bytes | None = field(default=None, repr=False)  # given: the private key is obtained too (WRITE, REPAIR)
    holders: Collection[str] = ()  # server ids known to hold shares: asked first

    @classmethod
    def of_cap(
        cls, cap: caps.Cap, k: int, n: int, *, want_key: bool = False, holders: Collection[str] = ()
    ) -> MapRequest:
        """For any mutable file cap: write, read or verify."""
        writekey = getattr(cap, "writekey", None) if want_key else None
        fingerprint: bytes = cap.fingerprint  # type: ignore[union-attr]  # mutable kinds only
        assert cap.storage_index is not None
        return cls(cap.storage_index, fingerprint, k, n, writekey, holders)


async def update_servermap(
    broker: IStorageBroker, request: MapRequest, mode: MapMode, *, verifier: ShareVerifier | None = None
) -> ServerMap:
    """Ask the servers and return what they hold. Raises nothing for what is not there: look at the map.

    `verifier` remembers what was verified before (same file), so that an unchanged version costs no RSA.
    """
    mapper = _Mapper(broker, request, mode, verifier or ShareVerifier(request.fingerprint))
    began = trio.current_time()
    await mapper.run()
    MAP_SECONDS.observe(trio.current_time() - began)
    servermap = mapper.map
    if mapper.wants_key:
        servermap.keys = await _obtain_keys(servermap, request.writekey)
    log.debug(
        "map %s: %d shares, %d bad, best %s",
        mode.value,
        len(servermap.shares),
        len(servermap.bad),
        getattr(servermap.best(), "seqnum", None),
    )
    await report_corrupt(servermap.reports, request.storage_index, servermap.bad.values())
    return servermap


async def report_corrupt(reports: CorruptionReports, storage_index: bytes, shares: Iterable[BadShare]) -> None:
    """Tell each server of its bad shares, if that is news; takes REPORT_TIMEOUT_S at most."""
    damaged = [
        share
        for share in shares
        if isinstance(share.error, CorruptShareError)
        and reports.is_news(storage_index, share.server.server_id, share.number)
    ]
    if not damaged:
        return
    with trio.move_on_after(REPORT_TIMEOUT_S):
        async with trio.open_nursery() as nursery:
            for share in damaged:
                log.warning("%s", share.error)
                nursery.start_soon(
                    share.server.advise_corrupt_share, "mutable", storage_index, share.number, str(share.error)
                )


class _Mapper:
    """One update: a coordinator (run) that starts queries, and decides after each answer or deadline."""

    def __init__(self, broker: IStorageBroker, request: MapRequest, mode: MapMode, verifier: ShareVerifier) -> None:
        self.map = ServerMap(mode=mode, reports=reports_of(broker))
        self._request = request
        self._mode = mode
        self._verifier = verifier
        order = broker.get_permuted_servers(request.storage_index)
        self._servers = sorted(order, key=lambda server: server.server_id not in request.holders)  # sort is stable
        self._responsiveness = responsiveness_of(broker)
        self._started: dict[str, float] = {}  # server id: when asked
        self._late_at: dict[str, float] = {}  # server id: when it is passed over
        self._settled: set[str] = set()  # answered or failed
        self._answered: set[str] = set()
        self._holders: set[str] = set()

    @property
    def wants_key(self) -> bool:
        return self._request.writekey is not None and self._mode in (MapMode.WRITE, MapMode.REPAIR)

    async def run(self) -> None:
        send, receive = trio.open_memory_channel[None](len(self._servers) or 1)
        async with trio.open_nursery() as nursery:
            while True:
                for server in self._to_ask():
                    self._note_start(server.server_id)
                    nursery.start_soon(self._query, server, send.send_nowait)
                if self._done():
                    break
                with trio.move_on_at(self._next_overdue()):
                    await receive.receive()
            nursery.cancel_scope.cancel()
        for server in self._servers:
            if server.server_id in self._started and server.server_id not in self._settled:
                if self._overdue(server.server_id) and not self._responsiveness.is_late(server.server_id):
                    self._responsiveness.late(server.server_id)
                self.map.failures[server.server_id] = PeerTimeoutError(f"{server.name}: passed over, too slow")

    def _note_start(self, server_id: str) -> None:
        late = self._responsiveness.is_late(server_id)
        self._started[server_id] = trio.current_time()
        self._late_at[server_id] = trio.current_time() + self._mode.slow_s * (KNOWN_LATE if late else 1)

    async def _query(self, server: IStorageServer, tell: Callable[[None], None]) -> None:
        read_bytes = CHECK_READ_BYTES if self._mode is MapMode.CHECK else READ_BYTES
        try:
            with trio.fail_after(QUERY_TIMEOUT_S):
                answer = await server.slot_readv(self._request.storage_index, [], [(0, read_bytes)])
                self._responsiveness.answered(server.server_id, trio.current_time() - self._started[server.server_id])
                for number, data in sorted(answer.items())[:SHARES_PER_SERVER_MAX]:
                    await self._take(server, number, data[0], whole=len(data[0]) < read_bytes)
            if answer:
                self._holders.add(server.server_id)
            else:
                self.map.empty[server.server_id] = server
            self._answered.add(server.server_id)
        except PeerError as error:
            self.map.failures[server.server_id] = error
        except trio.TooSlowError:
            self.map.failures[server.server_id] = PeerTimeoutError(
                f"{server.name}: no answer in {QUERY_TIMEOUT_S:.0f} s"
            )
        self._settled.add(server.server_id)
        tell(None)

    async def _take(self, server: IStorageServer, number: int, head: bytes, *, whole: bool) -> None:
        key = server.server_id, number
        try:
            self.map.shares[key] = await open_share(
                server, self._request.storage_index, number, head, whole=whole, verifier=self._verifier
            )
        except ShareVersionError as error:
            self.map.incompatible[key] = BadShare(server, number, head[:SPECIMEN_BYTES], error)
        except ShareError as error:
            self.map.bad[key] = BadShare(server, number, head[:SPECIMEN_BYTES], error)

    # --- decisions

    def _overdue(self, server_id: str) -> bool:
        return trio.current_time() >= self._late_at[server_id]

    def _is_settled(self, server_id: str) -> bool:
        return server_id in self._settled or (server_id in self._started and self._overdue(server_id))

    def _next_overdue(self) -> float:
        """When the next waiting query becomes overdue: time then to ask another server, or to be content."""
        waiting = [late_at for server_id, late_at in self._late_at.items() if not self._is_settled(server_id)]
        return min(waiting, default=trio.current_time() + QUERY_TIMEOUT_S)

    def _kn(self) -> tuple[int, int]:
        best = self.map.best()
        return (best.k, best.n) if best else (self._request.k, self._request.n)

    def _first_count(self) -> int:
        if self._mode.every_server:
            return len(self._servers)
        k, n = self._kn()
        return k + k if self._mode is MapMode.READ else max(n + k, len(self._request.holders))

    def _to_ask(self) -> list[IStorageServer]:
        """The servers to ask now."""
        unasked = [server for server in self._servers if server.server_id not in self._started]
        waiting = sum(not self._is_settled(server_id) for server_id in self._started)
        room = QUERIES_MAX - waiting
        initial = self._first_count() - len(self._started)
        if initial > 0:
            return unasked[: min(initial, room)]
        if self._content():
            return []
        return unasked[: min(QUERIES_BEYOND - waiting, room)] if waiting < QUERIES_BEYOND else []

    def _done(self) -> bool:
        if all(server.server_id in self._settled for server in self._servers):
            return True
        return self._content()

    def _content(self) -> bool:
        """Whether the servers not heard from are not worth waiting for."""
        first = self._servers[: self._first_count()]
        if not all(self._is_settled(server.server_id) for server in first):
            return False
        if self._mode.every_server:
            return True
        if self.map.best() is None or self.map.unrecoverable_newer:
            return False
        return self._mode is MapMode.READ or self._end_of_holders_seen()

    def _end_of_holders_seen(self) -> bool:
        """k empty servers in a row after the last holder, and all before them settled; or no servers left."""
        wanted = self._kn()[0]
        empty = 0
        for server in self._servers:
            if not self._is_settled(server.server_id):
                return False
            if server.server_id in self._holders:
                empty = 0
            elif server.server_id in self.map.empty:
                empty += 1
            if empty >= wanted and not self._holder_beyond(server.server_id):
                return True
        return True

    def _holder_beyond(self, server_id: str) -> bool:
        position = [server.server_id for server in self._servers].index(server_id)
        return any(server.server_id in self._holders for server in self._servers[position + 1 :])


async def _obtain_keys(servermap: ServerMap, writekey: bytes | None) -> MutableKeys | None:
    """The private key, from whichever share has it intact; those read already are tried first."""
    assert writekey is not None
    shares = sorted(servermap.shares.values(), key=lambda share: (not share.has_private_key, -share.header.seqnum))
    for share in shares:
        try:
            with trio.fail_after(WRITE_SLOW_S):
                encrypted = await share.read_encrypted_private_key()
            return MutableKeys.from_share(encrypted, writekey=writekey, public_der=share.public_der)
        except FormatError as error:
            servermap.mark_bad(share, CorruptShareError(share.server.name, share.number, str(error)))
        except ShareError as error:
            servermap.mark_bad(share, error)
        except (PeerError, trio.TooSlowError) as error:
            log.info("private key from %s: %s", share.server.name, error)
    return None
