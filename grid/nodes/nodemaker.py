"""From a cap to the node that can do something with it, and the making of new mutable files and directories.

Nodes are shared: the same cap gives the same node for as long as somebody holds it, and a directory's cap
shares the node of its backing file. So writers in this process queue up at one lock, and what one learned of
a file the other need not ask again. The nodes used last are held here, so that who looks at a directory
every few seconds does not start anew each time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal
from weakref import WeakValueDictionary

from attrs import field, frozen
from cachetools import LRUCache

from grid.errors import WrongKindError
from grid.formats.caps import (
    Cap,
    CHKReadCap,
    DirectoryCap,
    LiteralCap,
    MDMFReadCap,
    MDMFWriteCap,
    SDMFReadCap,
    SDMFWriteCap,
    UnknownCap,
    parse_cap,
    parse_known_cap,
)
from grid.formats.directory import DirEntry, pack_directory
from grid.interfaces import IStorageBroker
from grid.nodes.dirnode import DirectoryNode
from grid.nodes.immutable import ImmutableFileNode, LiteralFileNode
from grid.nodes.mutable import MutableFileNode
from grid.nodes.mutable_reading import MutableAccess
from grid.operations.changes import Changes
from grid.operations.keys import KeyPool
from grid.operations.leases import Secrets
from grid.operations.upload import DataUploadable, Uploader

NODES_KEPT: Final = 256

MutableFormat = Literal["sdmf", "mdmf"]
Children = Mapping[str, tuple[Cap, dict[str, Any]]]


@frozen
class UnknownNode:
    """A child that can be kept, moved and shown, and nothing else; or a verify cap, which cannot be read."""

    cap: Cap = field(repr=False)

    def get_uri(self) -> str:
        return self.cap.to_string()

    def get_readonly_uri(self) -> str:
        return self.cap.readonly.to_string()

    def get_verifier(self) -> Any:
        return self.cap.verifier

    def get_storage_index(self) -> bytes | None:
        return self.cap.storage_index

    def is_readonly(self) -> bool:
        return self.cap.is_readonly

    def is_mutable(self) -> bool:
        return self.cap.is_mutable


class NodeMaker:
    """`convergence`: the node's secret, for immutable directories; None gives random keys."""

    def __init__(
        self,
        broker: IStorageBroker,
        secrets: Secrets,
        uploader: Uploader,
        keys: KeyPool,
        *,
        k: int,
        n: int,
        happy: int = 1,
        convergence: bytes | None,
        mutable_format: MutableFormat = "sdmf",
    ) -> None:
        self.uploader = uploader
        self._broker = broker
        self._keys = keys
        self._access = MutableAccess(broker, secrets, k, n, happy=happy)
        self._convergence = convergence
        self._mutable_format = mutable_format
        self._nodes: WeakValueDictionary[Cap, Any] = WeakValueDictionary()
        self._used_last: LRUCache[Cap, Any] = LRUCache(NODES_KEPT)

    def create_from_cap(self, cap: Cap | str, *, keep: bool = True) -> Any:
        """MutableFileNode, ImmutableFileNode, LiteralFileNode, DirectoryNode or UnknownNode. Never fails.

        `keep` False: it is looked at once, in passing, and must not displace those that are used again and again.
        """
        if isinstance(cap, str):
            cap = parse_cap(cap)
        if isinstance(cap, UnknownCap) or cap.is_verifier:
            return UnknownNode(cap)
        if isinstance(cap, LiteralCap):
            return LiteralFileNode(cap)
        node = self._nodes.get(cap)
        if node is None:
            node = self._nodes[cap] = self._make(cap, keep)
        if keep and (cap.is_mutable or cap.is_directory):
            self._used_last[cap] = node
        return node

    def _make(self, cap: Cap, keep: bool) -> Any:
        match cap:
            case DirectoryCap(file):
                return DirectoryNode(self, cap, self.create_from_cap(file, keep=keep))
            case CHKReadCap():
                return ImmutableFileNode(cap, self._broker)
            case SDMFWriteCap() | SDMFReadCap() | MDMFWriteCap() | MDMFReadCap():
                return MutableFileNode(self._access, cap)
        raise WrongKindError(f"no node for a {cap.kind} cap")

    # --- new ones

    async def create_mutable_file(
        self, contents: bytes | Changes = b"", format: MutableFormat | None = None
    ) -> MutableFileNode:
        """One round to the servers, or several if it is large MDMF, given as Changes. Raises NotEnoughServersError."""
        node = await self._new_file(format)
        await node.create(contents)
        return node

    async def create_dirnode(
        self, children: Children | None = None, format: MutableFormat | None = None
    ) -> DirectoryNode:
        """A new mutable directory, its children in the first and only publish; metadata is stored as given.

        Raises BadCapError for a child that must not be stored, and as create_mutable_file().
        """
        file = await self._new_file(format)
        entries = [DirEntry(name, cap, metadata) for name, (cap, metadata) in (children or {}).items()]
        await file.create(pack_directory(entries, writekey=file.get_writekey()))
        node: DirectoryNode = self.create_from_cap(DirectoryCap(file.cap))
        return node

    async def create_immutable_dirnode(self, children: Children) -> DirectoryNode:
        """A DIR2-CHK, or DIR2-LIT if it is small. Raises BadCapError for a child that is not immutable,
        NotEnoughServersError.
        """
        entries = [DirEntry(name, cap, metadata) for name, (cap, metadata) in children.items()]
        data = pack_directory(entries, writekey=None, deep_immutable=True)
        results = await self.uploader.upload(DataUploadable(data, self._convergence))
        file = parse_known_cap(results.uri)
        assert isinstance(file, CHKReadCap | LiteralCap)
        node: DirectoryNode = self.create_from_cap(DirectoryCap(file))
        return node

    async def _new_file(self, format: MutableFormat | None) -> MutableFileNode:
        keys = await self._keys.get()
        kind = MDMFWriteCap if (format or self._mutable_format) == "mdmf" else SDMFWriteCap
        cap = kind(keys.writekey, keys.fingerprint)
        node = self._nodes[cap] = MutableFileNode(self._access, cap, keys=keys)
        return node
