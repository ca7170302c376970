"""Joining a grid: whole files and directories through real tubs on loopback, and what happens without a network."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

import grid
from tests.grid.nodes.test_immutable import Target
from tests.grid.peers.loopback import IntroducerService, Listener, Storage

DEAD_FURL = f"pb://{'a' * 32}@tcp:127.0.0.1:1/swissnum"


def node_directory(path: Path, introducer: str, shares: tuple[int, int, int] = (2, 3, 4)) -> grid.NodeDirectory:
    grid.create_client_directory(path, introducers=[introducer] if introducer else [], shares=shares)
    return grid.NodeDirectory.open(path)


@asynccontextmanager
async def loopback_servers(count: int) -> AsyncIterator[tuple[str, list[Storage]]]:
    """An introducer's FURL, and the servers that announced themselves there."""
    async with trio.open_nursery() as nursery:
        listener, introducer = Listener(nursery), IntroducerService()
        await listener.start()
        servers = [Storage(nursery, f"server{number}") for number in range(count)]
        for server in servers:
            await server.start()
            await introducer.announce(server.signed())
        yield listener.tub.register(introducer, "swissnum"), servers
        nursery.cancel_scope.cancel()


async def test_files_and_directories_go_there_and_back(tmp_path: Path) -> None:
    data = random.Random(3).randbytes(3_000_001)
    async with (
        loopback_servers(4) as (furl, servers),
        grid.join_grid(node_directory(tmp_path / "node", furl)) as client,
    ):
        await client.need_servers(4)
        results = await client.upload(grid.DataUploadable(data, client.node.convergence))
        assert results.pushed_shares == 4
        assert all(len(server.service.shares) == 1 for server in servers)
        cap = grid.parse_known_cap(results.uri)
        directory = await client.create_dirnode({"file": (cap, {"mine": 1})})
        await directory.set_uri("other", results.uri, None)
        again = client.create_node_from_uri(directory.get_readonly_uri())
        children = await again.list()
        assert set(children) == {"file", "other"}
        assert await children["file"][0].download_to_data() == data
        target = Target()
        assert (await client.download(results.uri, target), target.data) == ("finished", data)
        with pytest.raises(grid.WrongKindError):
            await client.download(directory.get_uri(), target)
        uri = await client.create_mutable_file(b"first")
        await client.create_node_from_uri(uri).replace(b"second")
        assert await client.create_node_from_uri(uri).download_to_data() == b"second"


async def test_secrets_are_those_of_the_node_and_the_server(tmp_path: Path) -> None:
    async with (
        loopback_servers(1) as (furl, servers),
        grid.join_grid(node_directory(tmp_path / "node", furl, (1, 1, 1))) as client,
    ):
        await client.need_servers(1)
        await client.upload(grid.DataUploadable(bytes(100), client.node.convergence))
        storage_index, renew, cancel, _ = servers[0].service.calls[0]
        (server,) = client.broker.get_known_servers()
        lease = client.lease_secrets(storage_index, server)
        assert (lease.renew, lease.cancel) == (renew, cancel)
        assert client.slot_secrets(bytes(16), storage_index, server).lease == lease


async def test_joining_needs_no_network(tmp_path: Path) -> None:
    with trio.fail_after(10):
        async with grid.join_grid(node_directory(tmp_path / "node", DEAD_FURL)) as client:
            results = await client.upload(grid.DataUploadable(b"small enough to be in its own cap"))
            node = client.create_node_from_uri(results.uri)
            assert await node.download_to_data() == b"small enough to be in its own cap"
            with pytest.raises(grid.GridUnreachableError, match="0 of 0 known servers and 0 of 1 introducers"):
                await client.need_servers(1, timeout_s=0.5)
            with pytest.raises(grid.NotEnoughServersError):
                await client.upload(grid.DataUploadable(bytes(1000)))


async def test_a_directory_without_any_server_says_so(tmp_path: Path) -> None:
    async with grid.join_grid(node_directory(tmp_path / "node", "")) as client:
        with pytest.raises(grid.GridUnreachableError, match="names no introducer and no server"):
            await client.need_servers(1, timeout_s=0.5)


class OurOwnError(Exception):
    pass


async def test_errors_of_the_body_come_out_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(OurOwnError):
        async with grid.join_grid(node_directory(tmp_path / "node", DEAD_FURL)):
            raise OurOwnError


async def test_joining_can_be_cancelled(tmp_path: Path) -> None:
    node = node_directory(tmp_path / "node", DEAD_FURL)
    with trio.move_on_after(0.05) as scope:
        async with grid.join_grid(node):
            await trio.sleep_forever()
    assert scope.cancelled_caught
