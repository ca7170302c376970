"""A storage server killed (SIGKILL) at random moments under write load, and started again.

What it acknowledged must be there; what is there must be whole. Shares of one slot are written in pairs and must stay
a pair. TAHOEFS_KILL_ROUNDS sets how often it is killed: a few times here, a hundred times in a soak.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from hashlib import sha256
from pathlib import Path

import pytest
import trio

from grid.errors import PeerError
from grid.formats.announcement import from_mapping
from grid.interfaces import LeaseSecrets, SlotSecrets, SlotWrite
from grid.peers.foolscap_storage import FoolscapStorageServer
from grid.peers.reconnect import Reconnector
from tests.grid.peers.loopback import until

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


async def write_shares(client: FoolscapStorageServer, expected: Expected, rng: random.Random) -> None:
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


async def write_slots(client: FoolscapStorageServer, expected: Expected, slot: int) -> None:
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


async def check(client: FoolscapStorageServer, expected: Expected) -> None:
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


@asynccontextmanager
async def child(directory: Path) -> AsyncIterator[tuple[FoolscapStorageServer, trio.Process]]:
    process = await trio.lowlevel.open_process(
        [sys.executable, "-m", "tests.grid.server.store_process", str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        furl = b""
        with trio.fail_after(60):
            while not furl.endswith(b"\n"):
                piece = await process.stdout.receive_some()
                assert piece, "the server did not start again"
                furl += piece
        fields = {"nickname": "x", "anonymous-storage-FURL": furl.decode().strip()}
        client = FoolscapStorageServer(from_mapping("v0-" + "a" * 52, fields), keepalive_s=240)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.run, Reconnector(), trio.CapacityLimiter(8))
            await until(lambda: client.connected, timeout_s=60)
            yield client, process
            nursery.cancel_scope.cancel()
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            await pipe.aclose()


async def test_killed_under_load(tmp_path: Path) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    expected = Expected()
    for _ in range(ROUNDS):
        async with child(tmp_path) as (client, process):
            await check(client, expected)

            async def until_lost(work: object, *args: object, client: FoolscapStorageServer = client) -> None:
                with pytest.raises(PeerError):
                    await work(client, expected, *args)  # type: ignore[operator]

            async with trio.open_nursery() as nursery:
                for _ in range(WRITERS):
                    nursery.start_soon(until_lost, write_shares, random.Random(rng.random()))
                for slot in range(SLOTS):
                    nursery.start_soon(until_lost, write_slots, slot)
                await trio.sleep(rng.uniform(0.05, ROUND_S_MAX))  # any moment will do: it is the moment of the kill
                process.kill()
    async with child(tmp_path) as (client, process):
        await check(client, expected)
        # nothing is left over but what is served
        incoming = tmp_path / "storage/shares/incoming"
        assert await trio.to_thread.run_sync(lambda: list(incoming.iterdir())) == []
        assert process.stdin is not None
        await process.stdin.aclose()
        with trio.fail_after(30):
            assert await process.wait() == 0
    assert not await trio.Path(tmp_path / "storage/tahoefs.journal").exists()
    assert len(expected.acknowledged) >= ROUNDS and all(versions[0] for versions in expected.slots.values())
    print(f"{len(expected.acknowledged)} shares, versions {[versions[0] for versions in expected.slots.values()]}")
