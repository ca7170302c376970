"""`make bench`, servers: our storage server against the real one, under the same client (ours).

    upload      one file of 256 MiB, 3-of-3, all shares to one server
    download    the same file, in a new session
    small up    1,000 files of 4 KiB, 1-of-1, ten at a time
    small down  the same

Over HTTP and over Foolscap. What counts are the CPU seconds of the server's process, ours by theirs: below 0.5 we use
less than half. Wall time is mostly the client's, and is there for orientation. Ours and theirs run in turn, each first
in every other round; after each round the medians so far are told.

A virtual machine may give free memory back to its host, and who touches it next pays for that: 0.5 s for the 256 MiB of
page cache that an upload fills, as much as all else it costs, or nothing, as chance has it. So that much is touched and
freed before each upload, by this process.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import trio
import yaml
from attrs import frozen

import grid
from tests.real.our_grid import SERVER_ID, StorageNode
from tests.real.tahoe_grid import OUR_PROGRAM

LARGE_BYTES = 256 << 20
SMALL_FILES, SMALL_BYTES = 1000, 4096
AT_ONCE = 10
LARGE_SHARES = (3, 1, 3)
SMALL_SHARES = (1, 1, 1)
PIECE_BYTES = 1 << 20
PROTOCOLS = {"HTTP": True, "Foolscap": False}


@frozen
class Cost:
    wall_s: float
    cpu_s: float  # of the server


Costs = dict[str, list[Cost]]  # by what was done


class Sink:
    """A download target that only counts."""

    def __init__(self) -> None:
        self.size = 0

    def open(self, size: int) -> None: ...

    async def write(self, data: bytes | memoryview) -> None:
        self.size += len(data)

    def close(self) -> None: ...

    def fail(self, why: BaseException) -> None: ...

    def register_canceller(self, canceller: Callable[[], None]) -> None: ...

    def finish(self) -> int:
        return self.size


@asynccontextmanager
async def joined(
    scratch: Path, server: StorageNode, shares: tuple[int, int, int], http: bool
) -> AsyncIterator[grid.GridClient]:
    path = scratch / f"client{random.getrandbits(64):x}"
    grid.create_client_directory(path, introducers=[], shares=shares)
    servers = {"storage": {SERVER_ID: {"ann": server.announced(http=http)}}}
    (path / "private" / "servers.yaml").write_text(yaml.safe_dump(servers))
    async with grid.join_grid(grid.NodeDirectory.open(path)) as client:
        await client.need_servers(1)
        yield client


async def for_all(work: Callable[[int], Awaitable[None]]) -> None:
    numbers = iter(range(SMALL_FILES))

    async def worker() -> None:
        for number in numbers:
            await work(number)

    async with trio.open_nursery() as nursery:
        for _ in range(AT_ONCE):
            nursery.start_soon(worker)


def touch_page_cache(scratch: Path) -> None:
    """Twice as much of it as an upload fills."""
    with tempfile.TemporaryFile(dir=scratch) as file:
        for _ in range(2 * LARGE_BYTES // PIECE_BYTES):
            file.write(bytes(PIECE_BYTES))


class Measured:
    """One server, one protocol, one round of everything."""

    def __init__(self, scratch: Path, server: StorageNode, http: bool, costs: Costs) -> None:
        self.scratch, self.server, self.http, self.costs = scratch, server, http, costs

    async def note(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        cpu_s, began = self.server.cpu_seconds(), time.perf_counter()
        await work()
        cost = Cost(time.perf_counter() - began, self.server.cpu_seconds() - cpu_s)
        self.costs.setdefault(name, []).append(cost)

    async def large(self, file: Path) -> None:
        uri = ""

        async def upload() -> None:
            nonlocal uri
            with file.open("rb") as opened:
                uri = (await client.upload(grid.FileUploadable(opened))).uri

        async def download() -> None:
            if await client.download(uri, Sink()) != LARGE_BYTES:
                raise AssertionError("a download is short")

        async with joined(self.scratch, self.server, LARGE_SHARES, self.http) as client:
            touch_page_cache(self.scratch)
            await self.note("upload", upload)
        async with joined(self.scratch, self.server, LARGE_SHARES, self.http) as client:
            await self.note("download", download)

    async def small(self) -> None:
        data = [random.randbytes(SMALL_BYTES) for _ in range(SMALL_FILES)]
        uris = [""] * SMALL_FILES

        async def upload(number: int) -> None:
            uris[number] = (await client.upload(grid.DataUploadable(data[number]))).uri

        async def download(number: int) -> None:
            if await client.create_node_from_uri(uris[number]).download_to_data() != data[number]:
                raise AssertionError("a download differs")

        async with joined(self.scratch, self.server, SMALL_SHARES, self.http) as client:
            await self.note("small up", lambda: for_all(upload))
        async with joined(self.scratch, self.server, SMALL_SHARES, self.http) as client:
            await self.note("small down", lambda: for_all(download))


def run(scratch: Path, runs: int, tahoe: Path) -> None:
    programs: dict[str, Sequence[str | Path]] = {"ours": OUR_PROGRAM, "theirs": (tahoe, "run", "--allow-stdin-close")}
    nodes = {name: StorageNode(scratch / f"storage-{name}", program=program) for name, program in programs.items()}
    costs: dict[tuple[str, str], Costs] = {}
    large = scratch / "large"
    try:
        for node in nodes.values():
            node.start()
        for number in range(1, runs + 1):
            with large.open("wb") as file:
                for _ in range(LARGE_BYTES // PIECE_BYTES):
                    file.write(random.randbytes(PIECE_BYTES))
            for protocol, http in PROTOCOLS.items():
                for name in sorted(nodes, reverse=not number % 2):
                    measured = Measured(scratch, nodes[name], http, costs.setdefault((protocol, name), {}))
                    trio.run(measured.large, large)
                    trio.run(measured.small)
            print(f"after {number} of {runs} rounds")
            report(costs)
    finally:
        for node in nodes.values():
            node.kill()


def report(costs: dict[tuple[str, str], Costs]) -> None:
    heads = ("CPU ratio", "our CPU s", "their CPU s", "wall ratio", "our s", "their s")
    print(f"{'server':22}" + "".join(f"{head:>13}" for head in heads))
    for protocol in PROTOCOLS:
        ours, theirs = costs[protocol, "ours"], costs[protocol, "theirs"]
        for name in ours:
            our_cpu, their_cpu = (statistics.median(cost.cpu_s for cost in each[name]) for each in (ours, theirs))
            our_s, their_s = (statistics.median(cost.wall_s for cost in each[name]) for each in (ours, theirs))
            figures = (our_cpu / their_cpu, our_cpu, their_cpu, our_s / their_s, our_s, their_s)
            print(f"{name + ' ' + protocol:22}" + "".join(f"{figure:>13.2f}" for figure in figures), flush=True)
