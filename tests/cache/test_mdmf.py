"""Mutable files changed in place, from a mount: what was written is sent, and nothing else is moved."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from attrs import evolve

from cache import Workspace
from grid.formats.caps import Cap
from grid.operations import changes
from tests.cache.memory_client import QUICK, MemoryClient, get, mounted, put
from tests.cache.test_replay import machine

SEGMENT = 131_072
LARGE = random.Random(1).randbytes(30 * SEGMENT + 17)
MDMF = evolve(QUICK, mutable="mdmf", keep_bytes=0)
RESTING = evolve(QUICK, settle_s=1000.0, settle_latest_s=1000.0)


def moved(client: MemoryClient) -> tuple[int, int]:
    """(bytes out of the servers' mutable slots, bytes in) since it was last asked."""
    total = sum(each.slot_bytes_out for each in client.servers), sum(each.slot_bytes_in for each in client.servers)
    for server in client.servers:
        server.slot_bytes_out = server.slot_bytes_in = 0
    return total


async def write(workspace: Workspace, cap: Cap, offset: int, data: bytes, size: int | None = None) -> None:
    contents = await workspace.new_contents(cap)
    await contents.write(offset, data)
    if size is not None:
        await contents.truncate(size)
    await workspace.replace(cap, contents)


async def made(client: MemoryClient, data: bytes) -> Cap:
    cap: Cap = client.create_node_from_uri(await client.create_mutable_file(data, format="mdmf")).cap
    moved(client)
    return cap


@pytest.mark.parametrize("size", [0, 20, 3 * SEGMENT])
async def test_new_files(size: int, tmp_path: Path) -> None:
    async with mounted(tmp_path, MDMF) as (client, workspace):
        _, target = await put(workspace, workspace.root, "file", LARGE[:size])
        await workspace.wait()
        assert target.cap.kind == "mdmf"
        assert await client.fetch(target.cap) == LARGE[:size] == await get(workspace, target.cap)


async def test_a_small_change_to_a_large_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes, "VERSION_BYTES_MAX", 4 << 20)
    async with mounted(tmp_path) as (client, workspace):
        cap = await made(client, LARGE)
        await write(workspace, cap, 5 * SEGMENT + 9, b"w" * 4096)
        await workspace.wait()
        read, written = moved(client)
        assert read < 2 * SEGMENT and written < 2 * SEGMENT  # of 4 MB; the directory has no part in it
        expected = LARGE[: 5 * SEGMENT + 9] + b"w" * 4096 + LARGE[5 * SEGMENT + 9 + 4096 :]
        assert await client.fetch(cap) == expected == await get(workspace, cap)


async def test_changes_upon_changes_that_are_not_sent_yet(tmp_path: Path) -> None:
    """What was written is copied together, the file is not fetched."""
    async with mounted(tmp_path, RESTING) as (client, workspace):
        cap = await made(client, LARGE)
        expected = bytearray(LARGE)
        for number in range(11):
            at = number * 2 * SEGMENT + 100 * number
            await write(workspace, cap, at, b"%d" % number)
            expected[at : at + len(b"%d" % number)] = b"%d" % number
        assert moved(client)[0] < 100_000  # to open it
        assert (await get(workspace, cap))[: 5 * SEGMENT] == expected[: 5 * SEGMENT]
        await write(workspace, cap, 7, b"cut", 12 * SEGMENT)
        await write(workspace, cap, 13 * SEGMENT, b"beyond")
        expected[7:10] = b"cut"
        del expected[12 * SEGMENT :]
        expected += bytes(SEGMENT) + b"beyond"
        await workspace.wait()
        assert await client.fetch(cap) == expected == await get(workspace, cap)


async def test_what_others_write_elsewhere_stays(tmp_path: Path) -> None:
    async with mounted(tmp_path, RESTING) as (client, workspace):
        cap = await made(client, LARGE)
        reader = await workspace.open_contents(cap)
        await write(workspace, cap, 0, b"ours")
        shown = await workspace.open_contents(cap)
        await client.create_node_from_uri(cap).write_at(20 * SEGMENT, b"theirs")
        expected = b"ours" + LARGE[4 : 20 * SEGMENT] + b"theirs" + LARGE[20 * SEGMENT + 6 :]
        assert await reader.read(20 * SEGMENT, 6) == b"theirs" == await shown.read(20 * SEGMENT, 6)
        assert await shown.read(0, 6) == expected[:6] and await reader.read(0, 6) == LARGE[:6]
        await workspace.wait()
        assert await client.fetch(cap) == expected
        for contents in (reader, shown):
            contents.close()


async def test_a_killed_process_leaves_what_was_written(tmp_path: Path) -> None:
    """Spool and journal hold the change; the rest of the file is where it was."""
    async with machine(tmp_path) as here:
        cap = await made(here.client, LARGE)
        async with here.process(RESTING) as workspace:
            await write(workspace, cap, 3 * SEGMENT, b"first")
            await write(workspace, cap, 9 * SEGMENT, b"second")
            await workspace.persist()
            await here.kill(workspace)
        expected = bytearray(LARGE)
        expected[3 * SEGMENT : 3 * SEGMENT + 5], expected[9 * SEGMENT : 9 * SEGMENT + 6] = b"first", b"second"
        moved(here.client)
        async with here.process(RESTING) as workspace:
            assert await get(workspace, cap) == expected
            await write(workspace, cap, 15 * SEGMENT, b"third")
            expected[15 * SEGMENT : 15 * SEGMENT + 5] = b"third"
            await workspace.wait()
            assert await here.client.fetch(cap) == expected
