"""Offline: when it begins and ends, what fails then, and what the disk still gives."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from attrs import evolve

from cache import Workspace, kept_directory, open_disk, open_workspace, read_directory
from cache.connectivity import HURRY_S, LOOK_S, LOST_S, SILENT_S, Connectivity
from grid.errors import GridUnreachableError, NotEnoughSharesError
from tests.cache.memory_client import QUICK, MemoryClient, get, memory_client, put
from tests.grid.peers.loopback import until
from tests.memory_server import MemoryBroker, MemoryServer

OPTIONS = evolve(QUICK, cache_bytes=16 << 20)


@asynccontextmanager
async def _watched(needed: int = 2) -> AsyncIterator[tuple[MemoryBroker, Connectivity]]:
    broker = MemoryBroker(3)
    connectivity = Connectivity(broker, needed)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(connectivity.run)
        yield broker, connectivity
        nursery.cancel_scope.cancel()


def _connect(broker: MemoryBroker, count: int) -> None:
    for number, server in enumerate(broker.servers):
        server.connected = number < count


async def test_lost_servers_count_after_a_moment(autojump_clock: trio.testing.MockClock) -> None:
    async with _watched() as (broker, connectivity):
        _connect(broker, 2)
        await trio.sleep(10)
        assert not connectivity.offline
        _connect(broker, 1)
        await trio.sleep(LOST_S - LOOK_S)
        assert not connectivity.offline  # perhaps only dialled anew
        await trio.sleep(3 * LOOK_S)
        assert connectivity.offline
        _connect(broker, 2)
        await trio.sleep(2 * LOOK_S)
        assert not connectivity.offline


async def test_silent_servers_count_later(autojump_clock: trio.testing.MockClock) -> None:
    async with _watched() as (broker, connectivity):
        for server in broker.servers:
            server.pause()
        await trio.sleep(SILENT_S - LOOK_S)
        assert not connectivity.offline
        await trio.sleep(3 * LOOK_S)
        assert connectivity.offline
        broker.servers[0].resume()
        broker.servers[1].resume()
        await trio.sleep(2 * LOOK_S)
        assert not connectivity.offline


async def test_when_as_many_as_are_needed_are_silent_the_others_are_asked(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with _watched() as (broker, _):
        broker.servers[0].pause()
        await trio.sleep(20)
        assert broker.looked == 0
        broker.servers[1].pause()
        await trio.sleep(1)
        assert broker.looked == 1
        await trio.sleep(HURRY_S)
        assert broker.looked == 2


async def test_a_grid_of_fewer_servers_than_k_can_be_online(autojump_clock: trio.testing.MockClock) -> None:
    async with _watched(needed=7) as (broker, connectivity):
        await trio.sleep(60)
        assert not connectivity.offline
        _connect(broker, 0)
        await trio.sleep(60)
        assert connectivity.offline


async def test_who_waits_is_told_and_who_comes_later_at_once(autojump_clock: trio.testing.MockClock) -> None:
    async with _watched() as (broker, connectivity):
        _connect(broker, 0)
        began = trio.current_time()
        with pytest.raises(GridUnreachableError):
            await connectivity.reach(trio.sleep_forever)
        assert trio.current_time() - began <= LOST_S + 2 * LOOK_S
        assert broker.hurried == 0
        for _ in range(10):  # one dialling anew for all of them
            began = trio.current_time()
            with pytest.raises(GridUnreachableError):
                await connectivity.reach(trio.sleep_forever)
            assert trio.current_time() == began
        assert broker.hurried == 1
        await trio.sleep(HURRY_S)
        with pytest.raises(GridUnreachableError):
            await connectivity.reach(trio.sleep_forever)
        assert broker.hurried == 2


async def test_an_error_of_its_own_is_the_errors() -> None:
    connectivity = Connectivity(MemoryBroker(3), 1)

    async def fail() -> None:
        raise NotEnoughSharesError(3, 1)

    with pytest.raises(NotEnoughSharesError):
        await connectivity.reach(fail)


@asynccontextmanager
async def _mounted(client: MemoryClient, root: Any, state: Path) -> AsyncIterator[Workspace]:
    async with (
        open_disk(state / "cache", OPTIONS.cache_bytes) as disk,
        open_workspace(client, root, state_dir=state, options=OPTIONS, disk=disk) as workspace,
    ):
        await workspace.load(workspace.root)
        yield workspace


async def test_a_later_mount_reads_without_the_grid(tmp_path: Path) -> None:
    """What was uploaded, what was read, mutable files, directories: published here, and only looked at."""
    async with memory_client() as (client, root):
        files = {"small": b"some bytes " * 30, "large": bytes(range(256)) * 12_000, "tiny": b"t"}
        mutable = await client.create_mutable_file(b"changes" * 100)
        async with _mounted(client, root, tmp_path) as workspace:
            for name, data in files.items():
                await put(workspace, workspace.root, name, data)
            target = client.create_node_from_uri(mutable).cap
            await workspace.link(workspace.root, "mutable", target, {})
            made = await workspace.make_directory(workspace.root, "folder", {"mine": 1})
            await put(workspace, made, "inside", files["small"][::-1])
            await workspace.drain()
            assert await get(workspace, target) == b"changes" * 100
        for server in client.servers:
            server.connected = False
        async with _mounted(client, root, tmp_path) as workspace:
            assert set(workspace.root) == {*files, "mutable", "folder"}
            for name, data in files.items():
                entry = workspace.root.get(name)
                assert entry is not None and await get(workspace, entry.target) == data
            await until(lambda: workspace.offline)
            assert await get(workspace, target) == b"changes" * 100
            assert await workspace.size_of(target) == 700
            entry = workspace.root.get("folder")
            assert entry is not None and entry.metadata["mine"] == 1
            folder = workspace.directory(entry.target)
            await workspace.load(folder)
            entry = folder.get("inside")
            assert entry is not None and await get(workspace, entry.target) == files["small"][::-1]
            for server in client.servers:
                server.connected = True
            await until(lambda: not workspace.offline)
            await put(workspace, folder, "later", b"x" * 100)
            await workspace.drain()
            assert set(await client.listing(folder.cap)) == {"inside", "later"}


async def test_a_kept_listing_gives_way_to_the_grids(tmp_path: Path) -> None:
    async with memory_client() as (client, root):
        async with open_disk(tmp_path, 16 << 20) as disk:
            assert await kept_directory(client, root, disk) is None
            assert not (await read_directory(client, root, disk)).entries
            node = client.create_node_from_uri(root)
            await node.set_uri("name", "URI:LIT:krugkidfnzsc4", {"a": 1})
            with client.broken():
                assert not (await read_directory(client, root, disk)).entries
            fresh = await read_directory(client, root, disk)
            assert list(fresh.entries) == ["name"]
        async with open_disk(tmp_path, 16 << 20) as disk:
            for cap in (root, root.readonly):  # also for who may only read
                kept = await kept_directory(client, cap, disk)
                assert kept is not None and kept.entries["name"].metadata["a"] == 1
                assert kept.version == fresh.version
            with client.broken():
                assert list((await read_directory(client, root, disk)).entries) == ["name"]


async def test_immutable_directories_are_kept_as_well(tmp_path: Path) -> None:
    async with memory_client() as (client, _):
        client.broker.servers += [MemoryServer(number) for number in range(3, 10)]
        child = client.create_node_from_uri("URI:LIT:krugkidfnzsc4").cap
        children = {f"name{number}": (child, {"number": number}) for number in range(30)}
        cap = (await client.nodemaker.create_immutable_dirnode(children)).cap
        async with open_disk(tmp_path, 16 << 20) as disk:
            seen = await read_directory(client, cap, disk)
            assert len(seen.entries) == 30
            kept = await kept_directory(client, cap, disk)
            assert kept is not None and kept.entries == seen.entries
