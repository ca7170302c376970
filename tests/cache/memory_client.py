"""A GridClient over servers in memory: the real uploads, mutable files and directories, without a network."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import trio
from attrs import frozen

from cache import Workspace, WorkspaceOptions, open_disk, open_workspace
from grid.formats.caps import Cap, DirectoryCap, parse_known_cap
from grid.nodes.nodemaker import NodeMaker
from grid.operations.keys import KeyPool
from grid.operations.leases import Secrets
from grid.operations.upload import DataUploadable, Uploader
from tests.memory_server import MemoryBroker, MemoryServer

K, HAPPY, N = 2, 2, 3

# Short times: the tests wait for conditions, these only decide how soon those come about.
QUICK = WorkspaceOptions(
    settle_s=0.01,
    publish_quiet_s=0.02,
    publish_latest_s=0.5,
    new_directory_latest_s=2.0,
    retry_first_s=0.01,
    retry_most_s=0.05,
    spool_wait_s=0.05,
    poll_s=0.05,
)


@frozen
class Node:
    nickname: str = "tester"
    encoding: tuple[int, int, int] = (K, HAPPY, N)
    convergence: bytes = b"c" * 32


class MemoryClient:
    """Counts what it is asked to do."""

    def __init__(self, keys: KeyPool) -> None:
        self.node = Node()
        self.broker = MemoryBroker(N)
        self.helper: Any = None
        secrets = Secrets(b"s" * 32)
        self._uploader = Uploader(self.broker, secrets)
        self.nodemaker = NodeMaker(
            self.broker, secrets, self._uploader, keys, k=K, n=N, convergence=self.node.convergence
        )
        self.uploads = 0

    @property
    def servers(self) -> list[MemoryServer]:
        return self.broker.servers

    def calls(self, kind: str) -> int:
        return sum(server.calls[kind] for server in self.servers)

    @contextmanager
    def broken(self) -> Iterator[None]:
        """Every call to every server fails meanwhile."""
        for server in self.servers:
            server.fail_on.add("*")
        try:
            yield
        finally:
            self.mend()

    def mend(self) -> None:
        for server in self.servers:
            server.fail_on.clear()

    def pause(self) -> None:
        for server in self.servers:
            server.pause()

    def resume(self) -> None:
        for server in self.servers:
            server.resume()

    async def upload(self, uploadable: Any, progress: Any = None) -> Any:
        self.uploads += 1
        return await self._uploader.upload(uploadable, progress)

    def create_node_from_uri(self, uri: str | Cap) -> Any:
        return self.nodemaker.create_from_cap(uri)

    async def create_mutable_file(self, contents: bytes = b"", format: Any = None) -> str:
        return (await self.nodemaker.create_mutable_file(contents, format)).get_uri()

    async def create_dirnode(self, children: Any) -> Any:
        return await self.nodemaker.create_dirnode(children)

    async def listing(self, cap: Cap | None) -> dict[str, Any]:
        """What another client sees: {name: cap}."""
        assert cap is not None
        contents = await self.create_node_from_uri(cap).read()
        return {name: entry.cap for name, entry in contents.entries.items()}

    async def fetch(self, cap: Cap) -> bytes:
        data: bytes = await self.create_node_from_uri(cap).download_to_data()
        return data


@asynccontextmanager
async def memory_client() -> AsyncIterator[tuple[MemoryClient, DirectoryCap]]:
    """A client and the cap of an empty directory on its grid."""
    keys = KeyPool()
    async with trio.open_nursery() as nursery:
        await nursery.start(keys.run)
        client = MemoryClient(keys)
        root = await client.create_dirnode({})
        yield client, root.cap
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def mounted(
    tmp_path: Path, options: WorkspaceOptions = QUICK, *, disk_bytes: int = 0
) -> AsyncIterator[tuple[MemoryClient, Workspace]]:
    """The same with a workspace over that directory, listed. `disk_bytes`: of a cache on the disk, if there is one."""
    async with (
        memory_client() as (client, root),
        open_disk(tmp_path / "state" / "cache", disk_bytes) as disk,
        open_workspace(client, root, state_dir=tmp_path / "state", options=options, disk=disk) as workspace,
    ):
        await workspace.load(workspace.root)
        yield client, workspace


async def stored(client: MemoryClient, data: bytes) -> Cap:
    """An immutable file on the grid, put there by somebody else with the same convergence secret."""
    uploadable = DataUploadable(data, client.node.convergence)
    uploadable.set_default_encoding_parameters({"k": K, "happy": HAPPY, "n": N})
    return parse_known_cap((await client.upload(uploadable)).uri)


async def put(workspace: Workspace, directory: Any, name: str, data: bytes, metadata: Any = None) -> Any:
    """Write a whole file. Returns (position, target)."""
    contents = await workspace.new_contents()
    try:
        await contents.write(0, data)
        entry = directory.get(name)
        over = None if entry is None else entry.target
        position, target, _ = await workspace.store(directory, name, contents, metadata or {}, over=over)
    finally:
        contents.close()
    return position, target


async def get(workspace: Workspace, target: Any) -> bytes:
    contents = await workspace.open_contents(target)
    try:
        return await contents.read(0, contents.size)
    finally:
        contents.close()
