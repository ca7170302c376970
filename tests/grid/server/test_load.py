"""One storage server, as a process of its own, under load: nothing is lost, and its memory stays within bounds.

Here a tenth of it; TAHOEFS_SOAK=1 (`make soak`) asks for all: 200 uploads of 1 MiB at once, and 5,000 requests from 50
connections, which should take less than a minute. Half of the clients speak HTTP, half Foolscap.
"""

from __future__ import annotations

import os
import random
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import trio

from grid.interfaces import IStorageServer, LeaseSecrets, SlotSecrets, SlotWrite, TestVector
from tests.real.our_grid import StorageNode

SOAK = bool(os.environ.get("TAHOEFS_SOAK"))
UPLOADS = 200 if SOAK else 20
UPLOAD_BYTES = 1 << 20
CONNECTIONS = 50 if SOAK else 6
REQUESTS = 100 if SOAK else 80  # of each connection, one after the other
MEMORY_BYTES_MAX = 200 << 20
LEASE = LeaseSecrets(b"r" * 32, b"c" * 32)
SECRETS = SlotSecrets(b"w" * 32, LEASE)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[StorageNode]:
    node = StorageNode(tmp_path / "node")
    try:
        node.start()
        yield node
    finally:
        node.kill()


@asynccontextmanager
async def clients(node: StorageNode, count: int) -> AsyncIterator[list[IStorageServer]]:
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(node.joined(http=bool(number % 2))) for number in range(count)]


def content(name: str, size: int) -> bytes:
    return random.Random(name).randbytes(size)


def storage_index(name: str) -> bytes:
    return sha256(name.encode()).digest()[:16]


async def all_at_once(works: list[Callable[[], Any]]) -> None:
    async with trio.open_nursery() as nursery:
        for work in works:
            nursery.start_soon(work)


def check_memory(node: StorageNode, what: str) -> None:
    peak = node.rss_bytes(peak=True)
    print(f"{what}: at most {peak >> 20} MiB")
    assert peak < MEMORY_BYTES_MAX


async def test_many_uploads_at_once(node: StorageNode) -> None:
    """All are allocated before the first one is written, so that all are under way at the same time."""
    begun, all_begun = 0, trio.Event()

    async def upload(client: IStorageServer, name: str) -> None:
        nonlocal begun
        data = content(name, UPLOAD_BYTES)
        _, writers = await client.allocate_buckets(storage_index(name), LEASE, frozenset({3}), len(data))
        begun += 1
        if begun == UPLOADS:
            all_begun.set()
        await all_begun.wait()
        for start, end in pairwise((0, 36, 150_000, 500_001, UPLOAD_BYTES)):
            await writers[3].write(start, data[start:end])
        await writers[3].close()

    async with clients(node, UPLOADS // 4) as servers:
        names = [(servers[number % len(servers)], f"upload {number}") for number in range(UPLOADS)]
        await all_at_once([lambda each=each: upload(*each) for each in names])  # type: ignore[misc]
        for number, (_, name) in enumerate(names):
            readers = await servers[number % 2].get_buckets(storage_index(name))
            assert await readers[3].read(0, UPLOAD_BYTES + 1) == content(name, UPLOAD_BYTES)
    check_memory(node, f"{UPLOADS} uploads at once")
    assert not list((node.storage / "shares" / "incoming").glob("*/*/*"))


class Caller:
    """One connection's own shares and slots, and what they should hold."""

    def __init__(self, client: IStorageServer, number: int) -> None:
        self.client, self.name = client, f"caller {number}"
        self.rng = random.Random(number)
        self.shares: dict[str, bytes] = {}
        self.slot = b""

    async def run(self) -> None:
        requests = 0
        while requests < REQUESTS:
            requests += await self.rng.choice((self.store, self.write_slot, self.read, self.read_slot, self.renew))()

    async def store(self) -> int:
        name = f"{self.name} share {len(self.shares)}"
        data = content(name, self.rng.randrange(1, 5000))
        _, writers = await self.client.allocate_buckets(storage_index(name), LEASE, frozenset({0}), len(data))
        await writers[0].write(0, data)
        await writers[0].close()
        self.shares[name] = data
        return 2

    async def write_slot(self) -> int:
        """Only over what it holds: a lost or doubled write would be seen."""
        new = self.rng.randbytes(self.rng.randrange(1, 3000))
        write = SlotWrite([TestVector(0, 5000, self.slot)], [(0, new)], len(new))
        passed, old = await self.client.slot_testv_and_readv_and_writev(
            storage_index(self.name), SECRETS, {0: write}, [(0, 5000)]
        )
        assert passed and old == ({0: [self.slot]} if self.slot else {})
        self.slot = new
        return 1

    async def read(self) -> int:
        if not self.shares:
            return 0
        name, data = self.rng.choice(list(self.shares.items()))
        readers = await self.client.get_buckets(storage_index(name))
        assert await readers[0].read(10, 3000) == data[10:3010]
        return 2

    async def read_slot(self) -> int:
        read = await self.client.slot_readv(storage_index(self.name), [0], [(0, 5000)])
        assert read == ({0: [self.slot]} if self.slot else {})
        return 1

    async def renew(self) -> int:
        await self.client.add_lease(storage_index(self.name), LEASE)
        return 1


async def test_many_requests_from_many_connections(node: StorageNode) -> None:
    async with clients(node, CONNECTIONS) as servers:
        callers = [Caller(server, number) for number, server in enumerate(servers)]
        began = trio.current_time()
        await all_at_once([caller.run for caller in callers])
        took_s = trio.current_time() - began
        print(f"{CONNECTIONS * REQUESTS / took_s * 60:.0f} requests a minute from {CONNECTIONS} connections")
    check_memory(node, "requests")
    assert node.terminate() == 0
    node.start()
    async with clients(node, 2) as servers:
        for number, caller in enumerate(callers):
            server = servers[number % 2]
            for name, data in caller.shares.items():
                readers = await server.get_buckets(storage_index(name))
                assert await readers[0].read(0, 6000) == data
            read = await server.slot_readv(storage_index(caller.name), [0], [(0, 5000)])
            assert read == ({0: [caller.slot]} if caller.slot else {})
