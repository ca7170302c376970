"""Makes an immutable file's missing shares again, from k good ones. The verify cap is enough: nothing is decrypted.

    check ── missing numbers ── a server for each (happiness.py) ── allocate ┐
    download: verified ciphertext by segment ── encode anew ─────────────────┴→ push, as an upload does

Only numbers that nobody holds are made, and each once: what is there stays where it is. A corrupt share cannot be
overwritten; its number goes to another server. k, N and the UEB are the file's own, so every share is byte for byte
what the uploader made; hashes that do not come to the same end the repair before any share is finished. Memory: a few
segments. Source: the repairer of Tahoe-LAFS 1.20, but for the duplicates it makes.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Final

import trio
from attrs import define, field

from grid.errors import GridError, PeerError, PeerTimeoutError
from grid.formats.caps import CHKVerifyCap
from grid.interfaces import EncodingParameters, IBucketWriter, IStorageBroker, IStorageServer
from grid.operations.check_results import CheckResults, RepairResults
from grid.operations.download import ImmutableDownload
from grid.operations.encode import Encoder
from grid.operations.happiness import place_missing
from grid.operations.leases import Secrets
from grid.operations.placement import QUERY_TIMEOUT_S, ROUNDS_MAX, abort_writers
from grid.operations.segment_encoder import SegmentEncoder
from grid.operations.share_writer import ShareWriter
from grid.operations.worker import in_lanes

log = logging.getLogger(__name__)

ALLOCATIONS_AT_ONCE: Final = 32


class CiphertextSource:
    """What an encoder needs of an IEncryptedUploadable, from the shares that are left."""

    def __init__(self, download: ImmutableDownload) -> None:
        self._download = download
        self._next = 0  # segment

    async def get_size(self) -> int:
        return self._download.file.size

    async def get_all_encoding_parameters(self) -> EncodingParameters:
        """Happy with any server: a share more is better than none."""
        file = self._download.file
        return EncodingParameters(file.k, 0, file.n, await self._download.get_segment_size())

    async def get_storage_index(self) -> bytes:
        return self._download.file.storage_index

    async def read_encrypted(self, length: int, hash_only: bool) -> Sequence[bytes | memoryview]:
        """`length` is the next segment's."""
        segment, self._next = self._next, self._next + 1
        data = await self._download.get_segment(segment)
        assert len(data) == length, "an encoder reads segment by segment"
        return [data]


async def repair_immutable(
    broker: IStorageBroker, secrets: Secrets, cap: CHKVerifyCap, before: CheckResults
) -> RepairResults:
    """`before`: a check of the file, made just now. Raises nothing for what cannot be repaired: the results say why."""
    if before.healthy:
        return RepairResults(before, before, attempted=False)
    if not before.recoverable:
        return RepairResults(before, before, attempted=False, reason="too few shares are left")
    try:
        made = await _Repair(broker, secrets, cap, before).run()
    except GridError as error:
        return RepairResults(before, before, attempted=True, reason=str(error))
    after = before.with_shares(made)
    reason = "" if after.healthy else f"{after.total_shares - len(after.good)} shares found no server"
    log.info("repaired a file: %d shares made, %d of %d there now", len(made), len(after.good), after.total_shares)
    return RepairResults(before, after, attempted=True, reason=reason)


@define(eq=False)
class _Repair:
    _broker: IStorageBroker
    _secrets: Secrets = field(repr=False)
    _cap: CHKVerifyCap
    _before: CheckResults
    _writers: dict[int, tuple[IStorageServer, IBucketWriter]] = field(factory=dict, init=False)
    _barred: set[tuple[str, int]] = field(factory=set, init=False)  # (server id, share number)
    _out: set[str] = field(factory=set, init=False)  # ids of servers that take nothing (more)

    async def run(self) -> dict[int, frozenset[str]]:
        """{share number made: server id}. Raises GridError, when nothing could be made at all."""
        download = ImmutableDownload(self._broker, self._cap)
        source = CiphertextSource(download)
        encoder = await Encoder().set_encrypted_uploadable(source)
        params = await source.get_all_encoding_parameters()
        encoder.segments = SegmentEncoder(self._cap.size, params, download.file.ueb_bytes)
        self._barred |= {(each.server_id, each.share_number) for each in self._before.corrupt}
        self._barred |= set(self._before.incompatible)
        try:
            await self._find_places(encoder.segments.share_size)
        except BaseException:
            await abort_writers([writer for _, writer in self._writers.values()])
            raise
        if not self._writers:
            return {}
        encoder.set_shareholders(
            {
                number: ShareWriter(encoder.segments.layout, number, server, writer)
                for number, (server, writer) in self._writers.items()
            }
        )
        await encoder.start()
        return {number: frozenset([self._writers[number][0].server_id]) for number in encoder.pushed}

    async def _find_places(self, share_size: int) -> None:
        order = self._broker.get_permuted_servers(self._cap.storage_index)
        silent = set(self._before.silent)  # who knows what those hold
        servers = {
            server.server_id: server
            for server in order
            if self._broker.permits_upload(server)
            and server.maximum_immutable_share_size >= share_size
            and server.server_id not in silent
        }
        for _ in range(ROUNDS_MAX):
            missing = [n for n in range(self._cap.n) if n not in self._before.good and n not in self._writers]
            writeable = [server_id for server_id in servers if server_id not in self._out]
            placed = place_missing(writeable, missing, self._held(), self._barred)
            if not placed:
                return
            wanted: dict[str, set[int]] = {}
            for number, server_id in placed.items():
                wanted.setdefault(server_id, set()).add(number)

            async def allocate(server_id: str, wanted: dict[str, set[int]] = wanted) -> None:
                await self._allocate(servers[server_id], frozenset(wanted[server_id]), share_size)

            await in_lanes(ALLOCATIONS_AT_ONCE, wanted, allocate)

    def _held(self) -> dict[str, set[int]]:
        """{server id: numbers it holds, or is about to}."""
        held: dict[str, set[int]] = {}
        for number, server_ids in self._before.good.items():
            for server_id in server_ids:
                held.setdefault(server_id, set()).add(number)
        for number, (server, _) in self._writers.items():
            held.setdefault(server.server_id, set()).add(number)
        return held

    async def _allocate(self, server: IStorageServer, numbers: frozenset[int], share_size: int) -> None:
        index = self._cap.storage_index
        try:
            with trio.move_on_after(QUERY_TIMEOUT_S) as scope:
                have, writers = await server.allocate_buckets(
                    index, self._secrets.lease(index, server.tub_id), numbers, share_size
                )
            if scope.cancelled_caught:
                raise PeerTimeoutError(f"server {server.name} did not answer in time")
        except PeerError as error:
            log.info("repair: server %s: %s", server.name, error)
            self._out.add(server.server_id)
            return
        self._writers |= {number: (server, writer) for number, writer in writers.items()}
        # One that is there though nobody saw it: damaged, or made a moment ago by somebody else. Not here, then.
        self._barred |= {(server.server_id, number) for number in have}
        if numbers - have - writers.keys():
            self._out.add(server.server_id)
