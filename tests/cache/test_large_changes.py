"""A few bytes changed in a file that is larger than the journal may be: it is read from the grid while it is sent."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import trio
from attrs import evolve

from cache import Workspace, uploadables
from cache.uploadables import BaseUnreadableError
from tests.cache.memory_client import QUICK, get, mounted, put, stored
from tests.cache.test_replay import Machine, machine

JOURNAL_BYTES = 1 << 20
DATA = random.Random(3).randbytes(8 * JOURNAL_BYTES)
CHANGE = b"changed!" * 128
EXPECTED = DATA[:3_000_000] + CHANGE + DATA[3_000_000 + len(CHANGE) :]
SMALL = evolve(QUICK, journal_bytes=JOURNAL_BYTES, keep_bytes=0, memory_bytes=JOURNAL_BYTES)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploadables, "BASE_RETRY_FIRST_S", 0.001)


async def change(workspace: Workspace, over: Any, offset: int = 3_000_000, data: bytes = CHANGE) -> Any:
    contents = await workspace.new_contents(over)
    await contents.write(offset, data)
    _, target, _ = await workspace.store(workspace.root, "large", contents, {}, over=over)
    return target


def most_used(workspace: Workspace) -> list[int]:
    """[the most bytes there ever were in the spool], from now on."""
    spool: Any = workspace._spool
    account, most = spool.account, [spool.used_bytes]

    def counted(growth: int) -> None:
        account(growth)
        most[0] = max(most[0], spool.used_bytes)

    spool.account = counted
    return most


async def test_it_is_not_held_here(tmp_path: Path) -> None:
    """And gets the cap it has for everybody, with this convergence secret."""
    async with mounted(tmp_path, SMALL) as (client, workspace):
        most = most_used(workspace)
        target = await change(workspace, await stored(client, DATA))
        assert target.state == "pending" and await get(workspace, target) == EXPECTED
        await workspace.wait()
        assert most[0] < 2 * len(CHANGE) + 100_000  # what was written, also in the journal's row, and the directory
        assert target.cap == await stored(client, EXPECTED)
        assert await client.fetch(target.cap) == EXPECTED == await get(workspace, target)
        assert workspace._spool.used_bytes == 0


async def test_changed_again_and_again_before_it_is_sent(tmp_path: Path) -> None:
    async with mounted(tmp_path, SMALL) as (client, workspace):
        target: Any = await stored(client, DATA)
        client.pause()
        expected = bytearray(DATA)
        rng = random.Random(5)
        for number in range(40):
            offset = rng.randrange(len(DATA))
            target = await change(workspace, target, offset, b"%04d" % number)
            expected[offset : offset + 4] = b"%04d" % number
        client.resume()
        await workspace.wait()
        assert client.uploads == 2
        assert await client.fetch(target.cap) == expected


async def test_what_fits_well_is_fetched_once_and_read_back_from_here(tmp_path: Path) -> None:
    options = evolve(SMALL, journal_bytes=40 << 20, keep_bytes=20 << 20)
    async with mounted(tmp_path, options) as (client, workspace):
        target = await change(workspace, await stored(client, DATA))
        await workspace.wait()
        calls = client.calls("get_buckets")
        assert await get(workspace, target.cap) == EXPECTED and client.calls("get_buckets") == calls
        assert workspace._spool.used_bytes >= len(DATA)
        assert workspace.status()["journal"]["bytes"] == 0  # it is not unsent


async def test_a_moment_without_servers_does_not_begin_it_anew(tmp_path: Path) -> None:
    async with mounted(tmp_path, SMALL) as (client, workspace):
        cap = await stored(client, DATA)
        reads = client.calls("read")
        target = await change(workspace, cap)
        while client.calls("read") < reads + 30:
            await trio.lowlevel.checkpoint()
        for server in client.servers:
            server.fail_on.add("read")
        failing = client.calls("read")
        while client.calls("read") == failing:
            await trio.lowlevel.checkpoint()
        client.mend()
        await workspace.wait()
        assert await client.fetch(target.cap) == EXPECTED
        assert target.attempts == 0


async def test_a_base_that_is_gone_is_said_and_tried_again(tmp_path: Path) -> None:
    async with mounted(tmp_path, SMALL) as (client, workspace):
        cap = await stored(client, DATA)
        held = [server.immutable.pop(cap.storage_index) for server in client.servers]
        target = await change(workspace, cap)
        await put(workspace, workspace.root, "other", DATA[:5000])
        with pytest.raises(BaseUnreadableError, match="was written over"):
            await workspace.wait()
        assert target.state == "failed"
        (error,) = workspace.status()["errors"]
        assert error["path"] == "large" and "what it was written over cannot be read" in error["message"]
        assert "other" in await client.listing(workspace.root.cap)
        contents = await workspace.open_contents(target)
        assert await contents.read(3_000_000, len(CHANGE)) == CHANGE
        contents.close()
        for server, shares in zip(client.servers, held, strict=True):
            server.immutable[cap.storage_index] = shares
        await workspace.wait()
        assert await client.fetch(target.cap) == EXPECTED and workspace.status()["errors"] == []


async def test_a_long_read_of_the_base_is_progress(tmp_path: Path) -> None:
    """Who waits is not told that nothing gets any further."""
    async with mounted(tmp_path, SMALL) as (client, workspace):
        target = await change(workspace, await stored(client, DATA))
        uploads = workspace._committer.uploads
        before = workspace._committer._progress()
        while not uploads.fetched_bytes:
            await trio.lowlevel.checkpoint()
        assert workspace._committer._progress() != before and target.cap is None
        await workspace.wait()
        assert uploads.fetched_bytes >= 2 * len(DATA)  # for the key, and to be sent


async def test_cancelled_on_the_way_leaves_nothing(tmp_path: Path) -> None:
    async with mounted(tmp_path, SMALL) as (client, workspace):
        await change(workspace, await stored(client, DATA))
        while not workspace._committer.uploads.fetched_bytes:
            await trio.lowlevel.checkpoint()
        await workspace.unlink(workspace.root, "large")
        await workspace.wait()
        while workspace._spool.used_bytes:
            await trio.lowlevel.checkpoint()
        assert all(not server.incoming for server in client.servers)


async def killed(here: Machine, at_bytes: int) -> None:
    """A process that had changed the file, and was killed after it had read so much of it."""
    cap = await stored(here.client, DATA)
    async with here.process(SMALL) as workspace:
        await change(workspace, cap)
        await workspace.persist()
        while workspace._committer.uploads.fetched_bytes < at_bytes:
            await trio.lowlevel.checkpoint()
        await here.kill(workspace)


@pytest.mark.parametrize("at_bytes", [0, 1, len(DATA) + 1])
async def test_killed_meanwhile(tmp_path: Path, at_bytes: int) -> None:
    """Before it is read for the key, meanwhile, while it is sent."""
    async with machine(tmp_path) as here:
        await killed(here, at_bytes)
        async with here.process(SMALL) as workspace:
            most = most_used(workspace)
            entry = workspace.root.get("large")
            assert entry is not None
            contents = await workspace.open_contents(entry.target)
            assert await contents.read(2_999_999, len(CHANGE) + 2) == EXPECTED[2_999_999 : 3_000_001 + len(CHANGE)]
            contents.close()
            await workspace.wait()
            (cap,) = (await here.client.listing(here.root)).values()
            assert await here.client.fetch(cap) == EXPECTED and most[0] < JOURNAL_BYTES // 2
            assert workspace.status()["errors"] == []


async def test_made_mutable_on_the_way(tmp_path: Path) -> None:
    """As `clone --mutable mdmf` does with a file on the grid."""
    async with mounted(tmp_path, SMALL) as (client, workspace):
        most = most_used(workspace)
        contents = await workspace.new_contents(await stored(client, DATA))
        _, target, _ = await workspace.store(workspace.root, "mdmf", contents, {}, over=None, mutable="mdmf")
        await workspace.wait()
        assert target.cap.kind == "mdmf" and await client.fetch(target.cap) == DATA
        assert most[0] < JOURNAL_BYTES // 2


async def test_what_may_change_meanwhile_is_fetched_first(tmp_path: Path) -> None:
    """Written over a mutable file, and stored as another: both passes over it must find the same."""
    async with mounted(tmp_path, SMALL) as (client, workspace):
        data = DATA[: 3 * JOURNAL_BYTES // 4]  # more than would be fetched for convenience
        most = most_used(workspace)
        base = client.create_node_from_uri(await client.create_mutable_file(data, format="mdmf")).cap
        contents = await workspace.new_contents(base)
        await contents.write(9, b"ours")
        _, target, _ = await workspace.store(workspace.root, "large", contents, {}, over=None, mutable="none")
        await workspace.wait()
        assert most[0] >= len(data)
        assert target.cap == await stored(client, data[:9] + b"ours" + data[13:])
