"""Chooses the servers for one upload and gets a bucket writer from each.

Small shares skip the question who holds what: share i is offered to permuted server i at once, and what the
answers say about shares already there is folded in. Larger ones first ask the first 2N servers, so that a
file already stored is recognised. Then rounds: place, allocate, and place again what was refused, elsewhere.
Source: server selection for immutable files, as Tahoe-LAFS documents it; limits marked ours.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final, TypeVar

import trio
from attrs import define, field, frozen

from grid.errors import ConnectionLostError, NotEnoughServersError, PeerError, PeerTimeoutError, refused_for_space
from grid.interfaces import IBucketWriter, IStorageBroker, IStorageServer
from grid.operations.happiness import happiness, invert, place_shares
from grid.operations.leases import Secrets
from grid.operations.push import ABORT_TIMEOUT_S

log = logging.getLogger(__name__)

T = TypeVar("T")

QUERY_TIMEOUT_S: Final = 15.0  # for one server's answer
STRAGGLER_TIMEOUT_S: Final = 4.0  # ours: more time for the slower half once half have answered
SUSPECT_S: Final = 60.0  # ours: a server that was late is left out for this long, while there are enough others
ROUNDS_MAX: Final = 20  # ours


@define
class Suspects:
    """Servers that did not answer in time, lately. Shared by all uploads to one grid."""

    _until: dict[str, float] = field(factory=dict)  # {server id: trio time}; bounded by the number of servers

    def add(self, server_id: str) -> None:
        self._until[server_id] = trio.current_time() + SUSPECT_S

    def clear(self, server_id: str) -> None:
        self._until.pop(server_id, None)

    def __contains__(self, server_id: str) -> bool:
        return self._until.get(server_id, 0.0) > trio.current_time()


@frozen
class UploadSpec:
    """What is to be placed."""

    storage_index: bytes = field(repr=False)
    share_size: int
    n: int
    happy: int


@define
class Selection:
    """Who will take what: writers by share number, each with its server; and who holds what already."""

    writers: dict[int, tuple[IStorageServer, IBucketWriter]]
    holdings: dict[str, set[int]]  # {server id: share numbers}
    servers: dict[str, IStorageServer]

    @property
    def existing(self) -> dict[int, set[str]]:
        return invert(self.holdings)


class ServerSelector:
    """One upload's selection; select() once."""

    def __init__(self, broker: IStorageBroker, secrets: Secrets, suspects: Suspects, spec: UploadSpec) -> None:
        self._secrets = secrets
        self._suspects = suspects
        self._spec = spec
        permitted = [s for s in broker.get_permuted_servers(spec.storage_index) if broker.permits_upload(s)]
        prompt = [server for server in permitted if server.server_id not in suspects]
        candidates = (prompt if len(prompt) >= spec.happy else permitted)[: 2 * spec.n]
        self._servers = {server.server_id: server for server in candidates}
        fits = {s.server_id: s.maximum_immutable_share_size >= spec.share_size for s in candidates}
        self._writeable = [server_id for server_id in self._servers if fits[server_id]]
        self._readonly = [server_id for server_id in self._servers if not fits[server_id]]
        self._refused_for_space = bool(self._readonly)
        self._queried: set[str] = set()
        self._holdings: dict[str, set[int]] = {}
        self._accepted: dict[str, dict[int, IBucketWriter]] = {}
        self._orphans: list[IBucketWriter] = []  # accepted by servers that fell silent later

    async def select(self, *, ask_first: bool) -> Selection:
        """Raises NotEnoughServersError; then, and when cancelled, nothing is left allocated."""
        try:
            if ask_first:
                await self._ask_holdings([*self._writeable, *self._readonly])
            await self._allocate_rounds()
            unneeded = self._take_out_unneeded()
            reached = self._happiness()
            if reached < self._spec.happy:
                raise self._not_enough(reached)
        except BaseException:
            accepted = [writer for writers in self._accepted.values() for writer in writers.values()]
            await abort_writers([*accepted, *self._orphans])
            raise
        writers = {
            number: (self._servers[server_id], writer)
            for server_id, accepted in self._accepted.items()
            for number, writer in accepted.items()
        }
        await abort_writers([*unneeded, *self._orphans])
        return Selection(writers, self._holdings, self._servers)

    async def _allocate_rounds(self) -> None:
        for _ in range(ROUNDS_MAX):
            wanted = self._missing()
            if wanted:
                await self._allocate(wanted)
                continue
            unqueried = [server_id for server_id in self._readonly if server_id not in self._queried]
            if not unqueried or self._all_placed():
                return
            await self._ask_holdings(unqueried)

    def _held(self) -> dict[str, set[int]]:
        """{server: shares it holds or has accepted}."""
        ids = (*self._writeable, *self._readonly)
        return {i: self._holdings.get(i, set()) | self._accepted.get(i, {}).keys() for i in ids}

    def _missing(self) -> dict[str, set[int]]:
        """{server: shares placed there that it does not hold yet}."""
        held = self._held()
        wanted: dict[str, set[int]] = {}
        for number, server_id in place_shares(self._writeable, self._readonly, self._spec.n, held).items():
            if number not in held[server_id]:
                wanted.setdefault(server_id, set()).add(number)
        return wanted

    def _happiness(self) -> int:
        return happiness(invert(self._held()))

    def _all_placed(self) -> bool:
        return self._happiness() >= self._spec.happy and len(invert(self._held()).keys()) >= self._spec.n

    def _take_out_unneeded(self) -> list[IBucketWriter]:
        """Writers for shares that exist elsewhere and without which the shares are as well spread."""
        reached = self._happiness()
        unneeded: list[IBucketWriter] = []
        for accepted in self._accepted.values():
            for number in sorted(accepted):
                if not any(number in numbers for numbers in self._holdings.values()):
                    continue
                writer = accepted.pop(number)
                if self._happiness() < reached:
                    accepted[number] = writer
                else:
                    unneeded.append(writer)
        return unneeded

    async def _ask_holdings(self, server_ids: list[str]) -> None:
        async def ask(server: IStorageServer) -> set[int]:
            return set(await server.get_buckets(self._spec.storage_index))

        self._queried.update(server_ids)
        answers = await self._ask_each(server_ids, ask)
        for server_id, answer in answers.items():
            if isinstance(answer, PeerError):
                self._discard(server_id)
            else:
                self._holdings[server_id] = {number for number in answer if 0 <= number < self._spec.n}

    async def _allocate(self, wanted: Mapping[str, set[int]]) -> None:
        async def allocate(server: IStorageServer) -> None:
            spec, numbers = self._spec, frozenset(wanted[server.server_id])
            lease = self._secrets.lease(spec.storage_index, server.tub_id)
            have, writers = await server.allocate_buckets(spec.storage_index, lease, numbers, spec.share_size)
            # Kept at once, so that whatever happens to the others these are not forgotten.
            self._accepted.setdefault(server.server_id, {}).update(writers)
            self._holdings.setdefault(server.server_id, set()).update(n for n in have if 0 <= n < spec.n)
            if numbers - have - writers.keys():
                self._refused_for_space = True
                self._make_readonly(server.server_id)

        answers = await self._ask_each(list(wanted), allocate)
        for server_id, answer in answers.items():
            if isinstance(answer, ConnectionLostError | PeerTimeoutError):
                self._discard(server_id)
            elif isinstance(answer, PeerError):
                self._refused_for_space |= refused_for_space(answer)
                self._make_readonly(server_id)

    async def _ask_each(
        self, server_ids: Sequence[str], call: Callable[[IStorageServer], Awaitable[T]]
    ) -> dict[str, T | PeerError]:
        """Every server's answer, or why there is none; all at once, each with its deadline."""
        answers: dict[str, T | PeerError] = {}

        async def ask(server_id: str) -> None:
            try:
                answers[server_id] = await call(self._servers[server_id])
                self._suspects.clear(server_id)
            except PeerError as error:
                log.info("server %s: %s", self._servers[server_id].name, error)
                answers[server_id] = error
            if 2 * len(answers) >= len(server_ids):
                scope.deadline = min(scope.deadline, trio.current_time() + STRAGGLER_TIMEOUT_S)

        with trio.move_on_after(QUERY_TIMEOUT_S) as scope:
            async with trio.open_nursery() as nursery:
                for server_id in server_ids:
                    nursery.start_soon(ask, server_id)
        for server_id in set(server_ids) - answers.keys():
            log.info("server %s did not answer in time", self._servers[server_id].name)
            answers[server_id] = PeerTimeoutError(f"{self._servers[server_id].name} did not answer in time")
        for server_id, answer in answers.items():
            if isinstance(answer, PeerTimeoutError):
                self._suspects.add(server_id)
        return answers

    def _discard(self, server_id: str) -> None:
        """A server that does not answer holds nothing we can count on."""
        self._writeable = [other for other in self._writeable if other != server_id]
        self._readonly = [other for other in self._readonly if other != server_id]
        self._holdings.pop(server_id, None)
        self._orphans += self._accepted.pop(server_id, {}).values()

    def _make_readonly(self, server_id: str) -> None:
        if server_id in self._writeable:
            self._writeable.remove(server_id)
            self._readonly.append(server_id)
            self._queried.add(server_id)  # its answer told what it holds

    def _not_enough(self, reached: int) -> NotEnoughServersError:
        # With too few servers to begin with, more room on them would not have helped.
        answered = len(self._writeable) + len(self._readonly)
        for_space = self._refused_for_space and answered >= self._spec.happy
        return NotEnoughServersError(self._spec.happy, reached, len(self._servers), for_space)


async def abort_writers(writers: list[IBucketWriter]) -> None:
    with trio.CancelScope(shield=True, deadline=trio.current_time() + ABORT_TIMEOUT_S):
        async with trio.open_nursery() as nursery:
            for writer in writers:
                nursery.start_soon(writer.abort)
