"""Measuring a grid: how fast each server answers, how fast files go there and back.

`ping` asks every known server for its version, several times; `speed_test` stores files of random bytes and reads them
back. Mutable files of a test are deleted again, by their write enablers. An immutable one cannot be: no server lets go
of a lease before its time any more, so its shares stay until their leases are over (31 days), where servers expire
them.
Source: what the control interface of Tahoe-LAFS up to 1.16 measured.
"""

from __future__ import annotations

import logging
import secrets
import statistics
from collections.abc import Callable, Sequence
from typing import Final, Literal

import trio
from attrs import define, field, frozen

from grid.client import GridClient
from grid.errors import FormatError, GridError, PeerError
from grid.formats.caps import parse_known_cap
from grid.interfaces import IStorageServer, SlotWrite
from grid.nodes.mutable import MutableFileNode
from grid.operations.upload import DataUploadable
from grid.peers.gbs_storage import GBSStorageServer

log = logging.getLogger(__name__)

ROUNDS: Final = 5
ROUND_TIMEOUT_S: Final = 5.0  # for each answer
SERVERS_AT_ONCE: Final = 32
FILE_BYTES_MAX: Final = 64 << 20  # held in memory, twice
FILES_MAX: Final = 1000
CLEANUP_TIMEOUT_S: Final = 30.0

Kind = Literal["immutable", "create", "upload"]


@define
class ServerTimes:
    """One server. `seconds`: of each answer; `failure`: why there are none, or not all."""

    server_id: str
    name: str
    nickname: str
    protocol: Literal["http", "foolscap"]
    version: str
    seconds: list[float] = field(factory=list)
    failure: str | None = None

    @property
    def median_s(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None


async def ping(
    servers: Sequence[IStorageServer], *, rounds: int = ROUNDS, timeout_s: float = ROUND_TIMEOUT_S
) -> list[ServerTimes]:
    """Every server's times, in the order given; at most `rounds` times `timeout_s` for each. Silence is no error."""
    limit = trio.CapacityLimiter(SERVERS_AT_ONCE)

    async def ask(server: IStorageServer, times: ServerTimes) -> None:
        async with limit:
            for _ in range(rounds):
                began = trio.current_time()
                try:
                    with trio.fail_after(timeout_s):
                        await server.get_version()
                except trio.TooSlowError:
                    times.failure = f"silent for {timeout_s:g} s"
                    return
                except PeerError as error:
                    times.failure = str(error)
                    return
                times.seconds.append(trio.current_time() - began)
                times.version = getattr(server, "application_version", "")

    found = [_times_of(server) for server in servers]
    async with trio.open_nursery() as nursery:
        for server, times in zip(servers, found, strict=True):
            if server.connected:
                nursery.start_soon(ask, server, times)
            else:
                times.failure = getattr(server, "last_failure", None) or "silent: it does not answer to being dialled"
    return found


def _times_of(server: IStorageServer) -> ServerTimes:
    return ServerTimes(
        server.server_id,
        server.name,
        server.nickname,
        "http" if isinstance(server, GBSStorageServer) else "foolscap",
        getattr(server, "application_version", ""),
    )


@frozen
class Speed:
    """Of `count` files of `size` bytes, one after the other."""

    kind: Kind
    count: int
    size: int
    upload_s: float
    download_s: float
    deleted: int  # files whose shares were all deleted again

    @property
    def upload_bytes_per_s(self) -> float:
        return self.count * self.size / max(self.upload_s, 1e-9)

    @property
    def download_bytes_per_s(self) -> float:
        return self.count * self.size / max(self.download_s, 1e-9)


async def speed_test(
    client: GridClient, *, count: int, size: int, kind: Kind = "immutable", done: Callable[[int], None] = lambda _: None
) -> Speed:
    """Store and read back. `kind`: immutable files, mutable ones made with their contents (`create`), or made empty and
    then written (`upload`); `done` is told after each file how many there are. Raises what storing and reading raise;
    ValueError for numbers out of bounds.
    """
    if not (1 <= count <= FILES_MAX and 1 <= size <= FILE_BYTES_MAX):
        raise ValueError(f"1 to {FILES_MAX} files of 1 to {FILE_BYTES_MAX} bytes")
    contents, caps = secrets.token_bytes(size), list[str]()
    deleted = 0
    try:
        if kind == "upload":
            caps = [await client.create_mutable_file() for _ in range(count)]
        began = trio.current_time()
        for number in range(count):
            data = number.to_bytes(8, "big")[-size:] + contents[8:]  # no two alike
            if kind == "upload":
                await client.create_node_from_uri(caps[number]).replace(data)
            elif kind == "create":
                caps.append(await client.create_mutable_file(data))
            else:
                caps.append((await client.upload(DataUploadable(data))).uri)
            done(number + 1)
        uploaded = trio.current_time()
        for cap in caps:
            await client.create_node_from_uri(cap).download_to_data()
        downloaded = trio.current_time()
    finally:
        if kind != "immutable":
            with trio.CancelScope(shield=True, deadline=trio.current_time() + CLEANUP_TIMEOUT_S):
                for cap in caps:
                    deleted += await _delete(client, cap)
    return Speed(kind, count, size, uploaded - began, downloaded - uploaded, deleted)


async def _delete(client: GridClient, cap: str) -> bool:
    """Remove a mutable file's shares from every connected server; whether that was possible."""
    node = client.create_node_from_uri(cap)
    storage_index = parse_known_cap(cap).storage_index
    writekey = node.get_writekey() if isinstance(node, MutableFileNode) else None
    if storage_index is None or writekey is None:
        raise FormatError("only mutable files can be deleted")
    failed = False

    async def delete(server: IStorageServer) -> None:
        nonlocal failed
        try:
            held = await server.slot_readv(storage_index, (), [(0, 1)])
            if held:
                shares = {number: SlotWrite((), (), 0) for number in held}
                secret = client.slot_secrets(writekey, storage_index, server)
                await server.slot_testv_and_readv_and_writev(storage_index, secret, shares, [])
        except GridError as error:
            log.info("server %s keeps shares of a test file: %s", server.name, error)
            failed = True

    async with trio.open_nursery() as nursery:
        for server in client.broker.get_permuted_servers(storage_index):
            nursery.start_soon(delete, server)
    return not failed
