"""A storage server killed (SIGKILL) at random moments under write load, and started again.

What it acknowledged must be there; what is there must be whole. Shares of one slot are written in pairs and must stay
a pair. TAHOEFS_KILL_ROUNDS sets how often it is killed: a few times here, a hundred times in a soak.
"""

from __future__ import annotations

import os
import random
from collections.abc import Awaitable, Callable
from hashlib import sha256
from pathlib import Path

import pytest
import trio

from grid.errors import PeerError
from grid.interfaces import IStorageServer, LeaseSecrets, SlotSecrets, SlotWrite
from tests.real.our_grid import StorageNode

ROUNDS = int(os.environ.get("TAHOEFS_KILL_ROUNDS", "4"))
SLOTS = 4
WRITERS = 6
ROUND_S_MAX = 1.0
SECRETS = SlotSecrets(b"w" * 32, LeaseSecrets(b"r" * 32, b"c" * 32))
LEASE = LeaseSecrets(b"R" * 32, b"C" * 32)
SIZES = (1, 3000, 40_000, 700_000)


def pattern(seed: str, size: int) -> bytes:
    return (sha256(seed.encode()).digest() * (size // 32 + 1))[:size]


class Expected:
    """What was sent, and what was acknowledged."""

    def __init__(self) -> None:
        self.shares: dict[bytes, bytes] = {}  # sent
        self.acknowledged: set[bytes] = set()
        self.slots: dict[int, list[int]] = {slot: [0, 0] for slot in range(SLOTS)}  # acknowledged, sent

    @staticmethod
    def slot_index(slot: int) -> bytes:
        return sha256(f"slot {slot}".encode()).digest()[:16]

    @staticmethod
    def version(slot: int, version: int) -> bytes:
        if not version:
            return b""
        size = SIZES[version % len(SIZES)]
        return version.to_bytes(8, "big") + pattern(f"{slot}.{version}", size)


async def write_shares(client: IStorageServer, expected: Expected, rng: random.Random) -> None:
    while True:
        storage_index = rng.randbytes(16)
        data = pattern(storage_index.hex(), rng.choice(SIZES) + rng.randrange(50))
        expected.shares[storage_index] = data
        _, writers = await client.allocate_buckets(storage_index, LEASE, frozenset({0}), len(data))
        for offset in range(0, len(data), 100_000):
            await writers[0].write(offset, data[offset : offset + 100_000])
        await writers[0].close()
        expected.acknowledged.add(storage_index)
        await client.add_lease(storage_index, SECRETS.lease)


async def write_slots(client: IStorageServer, expected: Expected, slot: int) -> None:
    """Both shares at once; the second is written in three pieces, and leaves a hole for a moment."""
    versions = expected.slots[slot]
    while True:
        versions[1] += 1
        data = expected.version(slot, versions[1])
        half = len(data) // 2
        writes = {
            0: SlotWrite([], [(0, data)], len(data)),
            1: SlotWrite([], [(half, data[half:]), (0, data[:8]), (8, data[8:half])], len(data)),
        }
        secrets = SlotSecrets(SECRETS.write_enabler, LeaseSecrets(bytes([versions[1] % 7]) * 32, b"c" * 32))
        passed, _ = await client.slot_testv_and_readv_and_writev(expected.slot_index(slot), secrets, writes, [])
        assert passed
        versions[0] = versions[1]


async def check(client: IStorageServer, expected: Expected) -> None:
    for storage_index, data in expected.shares.items():
        readers = await client.get_buckets(storage_index)
        assert readers or storage_index not in expected.acknowledged, "an acknowledged share is lost"
        if readers:
            assert await readers[0].read(0, len(data) + 1000) == data, "a share is not whole"
    for slot, versions in expected.slots.items():
        read = await client.slot_readv(expected.slot_index(slot), [], [(0, 1 << 20)])
        if not read:
            assert versions[0] == 0, "an acknowledged slot is lost"
            versions[1] = 0
            continue
        ((one,), (two,)) = read[0], read[1]
        found = int.from_bytes(one[:8], "big")
        assert versions[0] <= found <= versions[1], "an acknowledged version is lost"
        assert one == two == expected.version(slot, found), "a slot is mixed"
        versions[:] = [found, found]


async def test_killed_under_load(tmp_path: Path) -> None:
    """`tahoefs run`, by HTTP and by Foolscap in turn. Only the last time it is told to stop."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    expected = Expected()
    node = StorageNode(tmp_path / "node")
    try:
        for round_number in range(ROUNDS):
            node.start()
            async with node.joined(http=bool(round_number % 2)) as client:
                await check(client, expected)
                async with trio.open_nursery() as nursery:
                    for _ in range(WRITERS):
                        nursery.start_soon(until_lost, write_shares, client, expected, random.Random(rng.random()))
                    for slot in range(SLOTS):
                        nursery.start_soon(until_lost, write_slots, client, expected, slot)
                    await trio.sleep(rng.uniform(0.05, ROUND_S_MAX))  # any moment will do: it is that of the kill
                    await trio.to_thread.run_sync(node.kill)
        node.start()
        # nothing is left over but what is served
        assert list((node.storage / "shares" / "incoming").iterdir()) == []
        for http in (True, False):
            async with node.joined(http=http) as client:
                await check(client, expected)
        assert await trio.to_thread.run_sync(node.terminate) == 0
    finally:
        node.kill()
    assert not (node.storage / "tahoefs.journal").exists()
    assert len(expected.acknowledged) >= ROUNDS and all(versions[0] for versions in expected.slots.values())
    print(f"{len(expected.acknowledged)} shares, versions {[versions[0] for versions in expected.slots.values()]}")


async def until_lost(work: Callable[..., Awaitable[None]], *args: object) -> None:
    with pytest.raises(PeerError):
        await work(*args)
