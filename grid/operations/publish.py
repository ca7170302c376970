"""Putting the next version of a mutable file on the servers: every share in its place, if nobody was faster.

    one test-and-set call per server: "the share is as the servermap saw it" -> whole share, or changes to it

Every known share is replaced where it is; share numbers with no place yet go to the allowed servers with the
fewest shares, in permuted order. A test that fails, or a share nobody expected, means another writer: the
publish fails as a whole, though some servers may already hold the new version. A server that merely fails
is done without; its shares go elsewhere. At least k distinct shares must be placed, on as many servers as a file's:
a version that few servers hold could be lost with them, and readers who ask others would still see the one before.

A version that changes shares in place (MDMF) goes to the shares of its base version and to no others: what a share
lacks of the base it cannot get this way. Those are left behind, at an older version.

Source: Tahoe-LAFS 1.20's mutable publish. Time limits are ours.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Final

import trio
from attrs import define

from grid import stats
from grid.errors import (
    GridError,
    NotEnoughServersError,
    PeerError,
    PeerTimeoutError,
    UncoordinatedWriteError,
    refused_for_space,
)
from grid.formats.mutable_share import HEADER_BYTES
from grid.interfaces import IStorageBroker, IStorageServer, SlotWrite, TestVector
from grid.operations.corruption import reports_of
from grid.operations.keys import MutableKeys
from grid.operations.leases import Secrets
from grid.operations.mutable_encode import NewVersion
from grid.operations.responsiveness import responsiveness_of
from grid.operations.servermap import KNOWN_LATE, ServerMap, ShareKey, happiness_of
from grid.operations.slot_share import FoundShare

log = logging.getLogger(__name__)

FAILED: Final = stats.counter("publish_failures", "Publishes of mutable files and directories that failed.")
PUBLISH_SECONDS: Final = stats.histogram("publish_seconds", "Seconds a publish of a mutable file or directory took.")

STRAGGLER_S: Final = 3.0  # waited for the next server once one is done; or as long as those took that are
FIRST_ANSWER_S: Final = 15.0
SLOW_BYTES_PER_S: Final = 64 << 10  # a line slower than this makes stragglers
WRITE_TIMEOUT_S: Final = 120.0  # for one call: a share may be large and the line slow
CALL_BYTES_MAX: Final = 8 << 20  # of shares that go to one server in one call
CALLS_IN_FLIGHT: Final = 64
PLACEMENT_ROUNDS: Final = 3  # shares of a failed server go elsewhere so many times
WHOLE_BYTES: Final = 4000  # shares up to this size are kept in the new map

Targets = dict[ShareKey, tuple[IStorageServer, SlotWrite]]


@define(eq=False)
class _Call:
    """Some shares for one server, sent together."""

    server: IStorageServer
    writes: dict[int, SlotWrite]
    size: int = 0  # bytes of shares


async def publish(
    broker: IStorageBroker,
    secrets: Secrets,
    keys: MutableKeys,
    version: NewVersion,
    servermap: ServerMap | None,
    *,
    happy: int,
) -> ServerMap:
    """Put `version` on the servers; return the map of what was placed.

    `servermap` None is for a file that never existed: its slots are empty, so nobody need be asked. `happy` servers (n,
    if that is less) must each get a share of their own. Raises UncoordinatedWriteError; and NotEnoughServersError, as
    a rule before anything was written. When servers fail meanwhile some hold the version: it must be published anew.
    """
    publisher = _Publisher(broker, secrets, keys, servermap or ServerMap(), version, happy)
    began = trio.current_time()
    try:
        await publisher.run()
        result = publisher.result()
    except GridError:
        FAILED.add()
        raise
    PUBLISH_SECONDS.observe(trio.current_time() - began)
    return result


class _Publisher:
    """One publish: rounds of calls, the later ones for shares whose server failed."""

    def __init__(
        self,
        broker: IStorageBroker,
        secrets: Secrets,
        keys: MutableKeys,
        servermap: ServerMap,
        version: NewVersion,
        happy: int,
    ) -> None:
        self._broker = broker
        self._secrets = secrets
        self._keys = keys
        self._map = servermap
        self._version = version
        self._happy = min(happy, version.header.n)
        self._storage_index = keys.storage_index
        self._checkstring = version.header.checkstring
        self._placed: dict[ShareKey, IStorageServer] = {}
        self._failures: dict[str, PeerError] = {}
        self._surprise: str | None = None
        self._responsiveness = responsiveness_of(broker)

    async def run(self) -> None:
        targets = self._known_places()
        for turn in range(PLACEMENT_ROUNDS):
            if self._version.base is None:
                self._place_homeless(targets)
            if not turn:
                self._check_happy(key for key, (server, _) in targets.items() if server.connected)
            if not targets:
                break
            await self._send(targets)
            if self._surprise is not None:
                raise UncoordinatedWriteError(self._surprise)
            targets = {}
        self._check_enough()

    def result(self) -> ServerMap:
        """What is now known to be where: a map fit for the next publish."""
        new = ServerMap(keys=self._keys, reports=reports_of(self._broker))
        header = self._version.header
        # of an MDMF share all that is before the data: the next change in place builds on it
        kept_bytes = HEADER_BYTES if header.format == "sdmf" else sum(header.offsets.public_key)
        for key, server in self._placed.items():
            _, start = self._version.writes(key[1])[0]
            # enough of them whole to read a small file back, of the others what a test needs
            whole = len(start) == header.offsets.eof <= WHOLE_BYTES and key[1] < header.k
            head = start if whole else start[:kept_bytes]
            new.shares[key] = FoundShare(
                server, self._storage_index, key[1], header, head, whole, self._keys.public_der
            )
        new.incompatible = dict(self._map.incompatible)
        new.failures = {**self._map.failures, **self._failures}
        return new

    # --- where to

    def _known_places(self) -> Targets:
        targets: Targets = {}
        base = self._version.base
        for share in self._map.shares.values() if base is None else self._map.shares_of(base):
            test = TestVector(0, len(share.header.checkstring), share.header.checkstring)
            self._add(targets, share.server, share.number, test)
        for bad in self._map.bad.values() if base is None else ():
            self._add(targets, bad.server, bad.number, TestVector(0, len(bad.specimen) or 1, bad.specimen))
        return targets

    def _add(self, targets: Targets, server: IStorageServer, number: int, test: TestVector) -> None:
        if number in self._version.numbers:  # a share number from the time of a larger N stays as it is
            targets[server.server_id, number] = server, SlotWrite([test], self._version.writes(number))

    def _place_homeless(self, targets: Targets) -> None:
        """Give every share number without a place one, on the servers with the fewest."""
        housed = {number for _, number in (*targets, *self._placed)}
        homeless = [number for number in sorted(self._version.numbers) if number not in housed]
        if not homeless:
            return
        loads = Counter(server_id for server_id, _ in (*targets, *self._placed))
        servers = [
            server
            for server in self._broker.get_permuted_servers(self._storage_index)
            if self._broker.permits_upload(server)
            and server.server_id not in self._failures
            and server.server_id not in self._map.failures
        ]
        prompt = [server for server in servers if not self._responsiveness.is_late(server.server_id)]
        if len(prompt) >= max(self._happy, self._version.header.k):
            servers = prompt
        servers.sort(key=lambda server: loads[server.server_id])  # stable: permuted order among equals
        occupied = {*self._map.incompatible, *targets, *self._placed}
        for index, number in enumerate(homeless):
            for turn in range(len(servers)):
                server = servers[(index + turn) % len(servers)]
                if (server.server_id, number) not in occupied:
                    self._add(targets, server, number, TestVector(0, 1, b""))
                    break

    # --- sending

    async def _send(self, targets: Targets) -> None:
        calls = _group(targets)
        unsent = iter(calls)
        waiting = set(map(id, calls))
        send, receive = trio.open_memory_channel[_Call](len(calls))
        started = trio.current_time()

        async def lane() -> None:
            for call in unsent:
                await self._write(call)
                send.send_nowait(call)

        async with trio.open_nursery() as nursery:
            for _ in range(min(CALLS_IN_FLIGHT, len(calls))):
                nursery.start_soon(lane)
            while waiting:
                limit = self._straggler_limit(started, [call for call in calls if id(call) in waiting], len(calls))
                with trio.move_on_at(limit) as scope:
                    waiting.discard(id(await receive.receive()))
                if scope.cancelled_caught:
                    break
            nursery.cancel_scope.cancel()
        for call in calls:
            if id(call) in waiting:
                self._responsiveness.late(call.server.server_id)
                log.info("publish: %s is too slow, its shares go elsewhere", call.server.name)
                self._failures[call.server.server_id] = PeerTimeoutError(f"{call.server.name}: publish took too long")

    def _straggler_limit(self, started: float, waiting: Sequence[_Call], count: int) -> float:
        """As long again as the others took: a slow line is given time, a dead server is not waited for."""
        now = trio.current_time()
        grace_s = STRAGGLER_S if len(waiting) < count else FIRST_ANSWER_S
        if all(self._responsiveness.is_late(call.server.server_id) for call in waiting):
            grace_s *= KNOWN_LATE
        transfer_s = sum(call.size for call in waiting) / SLOW_BYTES_PER_S  # all may go through one slow line
        return now + max(grace_s + transfer_s, now - started)

    async def _write(self, call: _Call) -> None:
        server = call.server
        secrets = self._secrets.slot(self._keys.writekey, self._storage_index, server.tub_id)
        try:
            with trio.fail_after(WRITE_TIMEOUT_S):
                written, before = await server.slot_testv_and_readv_and_writev(
                    self._storage_index, secrets, call.writes, [(0, len(self._checkstring))]
                )
        except PeerError as error:
            log.info("publish to %s: %s", server.name, error)
            self._failures[server.server_id] = error
            return
        except trio.TooSlowError:
            self._failures[server.server_id] = PeerTimeoutError(f"{server.name}: publish took too long")
            return
        heads = {number: data[0] if data else b"" for number, data in before.items()}
        if not written and all(heads.get(number) == self._checkstring for number in call.writes):
            written = True  # an answer was lost on the way, not the write: it is our own version that is there
        if not written:
            self._surprise = f"a share on {server.name} is not as it was"
            return
        for number in call.writes:
            self._placed[server.server_id, number] = server
        for number, head in heads.items():
            if number not in call.writes and not self._expected(server.server_id, number, head):
                self._surprise = f"an unknown share {number} is on {server.name}"

    def _expected(self, server_id: str, number: int, head: bytes) -> bool:
        """Whether a share we did not write in this call is one we know of."""
        key = server_id, number
        if head == self._checkstring or key in self._placed:
            return True
        known = self._map.shares.get(key)
        if known is not None:
            expected = known.header.checkstring
            return head[: len(expected)] == expected[: len(self._checkstring)]
        other = self._map.bad.get(key) or self._map.incompatible.get(key)
        return other is not None and head[: len(other.specimen)] == other.specimen[: len(head)]

    def _check_enough(self) -> None:
        reached = len({number for _, number in self._placed})
        if reached < self._version.header.k:
            raise self._not_enough(self._version.header.k, reached)
        self._check_happy(self._placed)
        if reached < self._version.header.n:
            log.warning("publish placed %d of %d shares", reached, self._version.header.n)

    def _check_happy(self, places: Iterable[ShareKey]) -> None:
        reached = happiness_of(places)
        if reached < self._happy:
            raise self._not_enough(self._happy, reached)

    def _not_enough(self, wanted: int, reached: int) -> NotEnoughServersError:
        return NotEnoughServersError(
            happy=wanted,
            reached=reached,
            connected=len(self._broker.get_permuted_servers(self._storage_index)),
            refused_for_space=any(map(refused_for_space, self._failures.values())),
        )


def _group(targets: Targets) -> list[_Call]:
    """One call a server; more if its shares are large."""
    by_server: dict[str, list[_Call]] = defaultdict(list)
    for (server_id, number), (server, write) in sorted(targets.items(), key=lambda item: item[0]):
        size = sum(len(data) for _, data in write.data)
        calls = by_server[server_id]
        if not calls or calls[-1].size + size > CALL_BYTES_MAX:
            calls.append(_Call(server, {}))
        calls[-1].writes[number] = write
        calls[-1].size += size
    return _interleave(list(by_server.values()))


def _interleave(calls_by_server: Sequence[Sequence[_Call]]) -> list[_Call]:
    """Every server's first call first, so that a slow server does not hold up the others'."""
    longest = max((len(calls) for calls in calls_by_server), default=0)
    return [calls[turn] for turn in range(longest) for calls in calls_by_server if turn < len(calls)]
