"""The conformance suite over every kind of server there is. The real ones need Tahoe-LAFS and skip without it."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
import yaml

from grid.formats.announcement import Announcement, from_mapping
from grid.interfaces import IStorageServer
from grid.peers.foolscap_storage import FoolscapStorageServer
from grid.peers.gbs_storage import GBSStorageServer
from grid.peers.reconnect import Reconnector
from tests.grid.peers.loopback import until
from tests.grid.server.gbs_peer import gbs_peer
from tests.grid.storage_conformance import StorageConformance, si
from tests.memory_server import MemoryServer
from tests.real.tahoe_grid import Node, TahoeGrid, TahoeNotAvailable, wait_until

__all__ = ["si"]

SERVERS_FILE_ENVIRONMENT = "TAHOEFS_TEST_SERVERS"  # an introducer cache of a grid that runs already, to be used instead


class TestMemory(StorageConformance):
    @pytest.fixture
    def server(self) -> IStorageServer:
        return MemoryServer(1)


class TestOursByFoolscap(StorageConformance):
    @pytest.fixture
    async def server(self, tmp_path: Path, nursery: trio.Nursery) -> AsyncIterator[IStorageServer]:
        async with gbs_peer(tmp_path, listen=True) as peer:
            yield await connected(FoolscapStorageServer(peer.announcement(http=False), keepalive_s=240), nursery)


class TestOursByHTTP(StorageConformance):
    @pytest.fixture
    async def server(self, tmp_path: Path, nursery: trio.Nursery) -> AsyncIterator[IStorageServer]:
        async with gbs_peer(tmp_path, listen=True) as peer:
            yield await connected(GBSStorageServer(peer.announcement()), nursery)


@pytest.fixture(scope="module")
def real_announcement(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Announcement]:
    """Of one real server, as the real client keeps it."""
    if (given := os.environ.get(SERVERS_FILE_ENVIRONMENT)) is not None:
        yield _announcements(Path(given))[0]
        return
    try:
        grid = TahoeGrid(tmp_path_factory.mktemp("one-server"), servers=1, shares=(1, 1, 1))
    except TahoeNotAvailable as reason:
        pytest.skip(str(reason))
    try:
        grid.start()
        yield wait_until(lambda: _announcements(_cache_of(grid.client)), "the announcement")[0]
    finally:
        grid.stop()


def _cache_of(client: Node) -> Path:
    return client.path / "private" / "introducer_default_cache.yaml"


def _announcements(cache: Path) -> list[Announcement]:
    entries: list[dict[str, Any]] = yaml.safe_load(cache.read_text()) or []
    return [from_mapping(entry["key_s"], entry["ann"]) for entry in entries]


async def connected(server: FoolscapStorageServer | GBSStorageServer, nursery: trio.Nursery) -> IStorageServer:
    nursery.start_soon(server.run, Reconnector(), trio.CapacityLimiter(8))
    await until(lambda: server.connected)
    return server


@pytest.mark.interop
class TestRealByFoolscap(StorageConformance):
    @pytest.fixture
    async def server(self, real_announcement: Announcement, nursery: trio.Nursery) -> AsyncIterator[IStorageServer]:
        yield await connected(FoolscapStorageServer(real_announcement, keepalive_s=240), nursery)


@pytest.mark.interop
class TestRealByHTTP(StorageConformance):
    @pytest.fixture
    async def server(self, real_announcement: Announcement, nursery: trio.Nursery) -> AsyncIterator[IStorageServer]:
        yield await connected(GBSStorageServer(real_announcement), nursery)
