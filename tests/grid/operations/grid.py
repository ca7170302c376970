"""A grid in memory with an uploader, for the tests of operations."""

from __future__ import annotations

import random

from grid.formats.caps import CHKReadCap
from grid.operations.download import ImmutableDownload
from grid.operations.leases import Secrets
from grid.operations.responsiveness import Responsiveness
from grid.operations.upload import DataUploadable, Uploader
from tests.memory_server import MemoryBroker, MemoryServer

SECRET = b"s" * 32


class MemoryGrid:
    def __init__(self, servers: int) -> None:
        self.broker = MemoryBroker(servers)
        self.uploader = Uploader(self.broker, Secrets(SECRET))

    @property
    def servers(self) -> list[MemoryServer]:
        return self.broker.servers

    def permuted(self, storage_index: bytes) -> list[MemoryServer]:
        return [
            server for server in self.broker.get_permuted_servers(storage_index) if isinstance(server, MemoryServer)
        ]

    def shares(self, storage_index: bytes) -> dict[int, bytes]:
        return {
            number: bytes(share)
            for server in self.servers
            for number, share in server.immutable.get(storage_index, {}).items()
        }

    def holders(self, storage_index: bytes) -> dict[int, list[MemoryServer]]:
        found: dict[int, list[MemoryServer]] = {}
        for server in self.servers:
            for number in server.immutable.get(storage_index, {}):
                found.setdefault(number, []).append(server)
        return found

    def assert_nothing_left(self) -> None:
        """No share is half written anywhere."""
        assert [key for server in self.servers for key in server.incoming] == []

    async def upload(
        self, data: bytes, *, k: int = 3, happy: int = 7, n: int = 10, segment_size: int = 1 << 20
    ) -> CHKReadCap:
        cap = (await self.uploader.upload(uploadable(data, k=k, happy=happy, n=n, segment_size=segment_size))).cap
        assert isinstance(cap, CHKReadCap)
        return cap

    def download(self, cap: CHKReadCap) -> ImmutableDownload:
        """With nothing known about the servers yet."""
        return ImmutableDownload(self.broker, cap, Responsiveness())


def uploadable(
    data: bytes, *, k: int = 3, happy: int = 7, n: int = 10, segment_size: int = 1 << 20, secret: bytes = b"c" * 32
) -> DataUploadable:
    made = DataUploadable(data, secret)
    made.set_default_encoding_parameters({"k": k, "happy": happy, "n": n, "max_segment_size": segment_size})
    return made


def noise(length: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(length)
