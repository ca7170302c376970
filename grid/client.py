"""One joined grid: the servers, the secrets and the nodes behind it. What the mount and the commands work with.

    async with join_grid(NodeDirectory.open(path)) as client:
        await client.broker.wait_for_servers(count, timeout_s)
        node = client.create_node_from_uri(cap)

Joining needs no network and never fails for want of one: servers appear when they can be reached, and
come back by themselves. Literal files need no server at all.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final

import trio

from grid.check_history import CheckHistory
from grid.errors import GridUnreachableError, WrongKindError
from grid.formats.caps import Cap
from grid.formats.segments import MAX_SEGMENT_BYTES
from grid.interfaces import (
    IDownloadTarget,
    IStorageServer,
    IUploadable,
    IUploadProgress,
    LeaseSecrets,
    SlotSecrets,
)
from grid.node_directory import NodeDirectory
from grid.nodes.checker import Checker
from grid.nodes.dirnode import DirectoryNode
from grid.nodes.nodemaker import MutableFormat, NodeMaker
from grid.operations.changes import Changes
from grid.operations.helped_upload import HelpedUploads
from grid.operations.keys import KeyPool
from grid.operations.leases import Secrets
from grid.operations.upload import Uploader, UploadResults
from grid.peers.broker import StorageBroker
from grid.peers.helper import HelperClient
from grid.stats import Metric

SERVERS_TIMEOUT_S: Final = 30.0
SERVERS_TOLD_MAX: Final = 200  # one by one, in statistics
METRICS: Final = (
    Metric("grid_servers", "gauge", "Storage servers that are known."),
    Metric("grid_servers_connected", "gauge", "Storage servers that are connected."),
    Metric("grid_space_bytes", "gauge", "Bytes the connected servers said they have left."),
    Metric("grid_keys_ready", "gauge", "RSA keys made ahead, for new mutable files and directories."),
    Metric("grid_introducers_connected", "gauge", "Introducers that are connected."),
    Metric("grid_helper_connected", "gauge", "Whether the upload helper is connected."),
    Metric("grid_server_latency_seconds", "gauge", "Average seconds of a server's late small calls.", "server"),
)


class GridClient:
    """IClient and IDownloader. Made by `join_grid`, and of no use once that has ended."""

    def __init__(
        self, node: NodeDirectory, broker: StorageBroker, keys: KeyPool, helper: HelperClient | None = None
    ) -> None:
        self.node = node
        self.broker = broker
        self.helper = helper
        self._keys = keys
        self.secrets = Secrets(node.lease_secret)
        self.uploader = Uploader(
            broker,
            self.secrets,
            self.encoding_parameters,
            helped=HelpedUploads(helper, broker) if helper is not None else None,
        )
        self.nodemaker = NodeMaker(
            broker,
            self.secrets,
            self.uploader,
            keys,
            k=node.encoding.k,
            n=node.encoding.n,
            happy=node.encoding.happy,
            convergence=node.convergence,
            mutable_format=node.mutable_format,
        )

    def checker(self, history: CheckHistory) -> Checker:
        """IChecker, remembering in `history`."""
        return Checker(self.broker, self.secrets, self.nodemaker, history)

    @property
    def encoding_parameters(self) -> dict[str, int]:
        """How new files are spread, as IUploadable.set_default_encoding_parameters() takes it."""
        k, happy, n = self.node.encoding
        return {"k": k, "happy": happy, "n": n, "max_segment_size": MAX_SEGMENT_BYTES}

    def lease_secrets(self, storage_index: bytes, server: IStorageServer) -> LeaseSecrets:
        return self.secrets.lease(storage_index, server.tub_id)

    def slot_secrets(self, writekey: bytes, storage_index: bytes, server: IStorageServer) -> SlotSecrets:
        return self.secrets.slot(writekey, storage_index, server.tub_id)

    def get_stats(self) -> Mapping[str, float]:
        """IStatsProducer: the servers, as they are now."""
        servers = self.broker.get_known_servers()
        connected = [server for server in servers if server.connected]
        told: dict[str, float] = {
            "grid_servers": len(servers),
            "grid_servers_connected": len(connected),
            "grid_space_bytes": sum(server.available_space or 0 for server in connected),
            "grid_keys_ready": self._keys.ready,
            "grid_introducers_connected": sum(each.connected_to_introducer() for each in self.broker.introducers),
        }
        if self.helper is not None:
            told["grid_helper_connected"] = self.helper.connected
        for server in connected[:SERVERS_TOLD_MAX]:
            if (latency_s := getattr(server, "latency_s", None)) is not None:
                told[f"grid_server_latency_seconds.{server.name}"] = latency_s
        return told

    async def upload(self, uploadable: IUploadable, progress: IUploadProgress | None = None) -> UploadResults:
        """Store an immutable file, telling `progress` how far it is. Raises NotEnoughServersError."""
        return await self.uploader.upload(uploadable, progress)

    async def download(self, uri: str | Cap, target: IDownloadTarget) -> Any:
        """IDownloader: a whole file to `target`. Raises WrongKindError for what is no file, NotEnoughSharesError."""
        node = self.create_node_from_uri(uri)
        if not hasattr(node, "download"):
            raise WrongKindError("not a file that can be read")
        return await node.download(target)

    def create_node_from_uri(self, uri: str | Cap) -> Any:
        """MutableFileNode, ImmutableFileNode, LiteralFileNode, DirectoryNode or UnknownNode. Never fails."""
        return self.nodemaker.create_from_cap(uri)

    async def create_mutable_file(self, contents: bytes | Changes = b"", format: MutableFormat | None = None) -> str:
        """Make a mutable file and return its write cap; contents given as Changes may be large, if it is MDMF.

        Raises NotEnoughServersError.
        """
        return (await self.nodemaker.create_mutable_file(contents, format)).get_uri()

    async def create_empty_dirnode(self, format: MutableFormat | None = None) -> DirectoryNode:
        return await self.nodemaker.create_dirnode(format=format)

    async def create_dirnode(
        self, children: Mapping[str, tuple[Cap, dict[str, Any]]], format: MutableFormat | None = None
    ) -> DirectoryNode:
        """A new mutable directory with its children {name: (cap, metadata)}, published once."""
        return await self.nodemaker.create_dirnode(children, format)

    async def need_servers(self, count: int, timeout_s: float = SERVERS_TIMEOUT_S) -> None:
        """Raise GridUnreachableError unless `count` servers are connected in time, saying what was found instead."""
        connected = await self.broker.wait_for_servers(count, timeout_s)
        if connected < count:
            raise GridUnreachableError(f"{self._found(connected)}; {count} servers are needed")

    def _found(self, connected: int) -> str:
        introducers = self.broker.introducers
        known = len(self.broker.get_known_servers())
        if not introducers and not known:
            return f"{self.node.path} names no introducer and no server"
        reached = sum(introducer.connected_to_introducer() for introducer in introducers)
        return f"{connected} of {known} known servers and {reached} of {len(introducers)} introducers answered"


@asynccontextmanager
async def join_grid(node: NodeDirectory) -> AsyncIterator[GridClient]:
    """Join for as long as the context lasts. All background work is in here and ends with it."""
    broker = StorageBroker(
        introducers=node.introducers,
        static_servers=node.static_servers,
        keepalive_s=node.keepalive_s,
        preferred=node.preferred,
        grid_manager_keys=node.grid_manager_keys,
        nickname=node.nickname,
        cache_directory=node.path / "private",
        force_foolscap=node.force_foolscap,
    )
    keys = KeyPool()
    helper = HelperClient(node.helper, keepalive_s=node.keepalive_s) if node.helper is not None else None
    failure: BaseException | None = None
    async with trio.open_nursery() as nursery:
        await nursery.start(broker.run)
        await nursery.start(keys.run)
        if helper is not None:
            await nursery.start(helper.run)
        try:
            yield GridClient(node, broker, keys, helper)
        except trio.Cancelled:
            raise
        except BaseException as error:  # noqa: BLE001  raised again below: out of the nursery it would come in a group
            failure = error
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
