"""All interfaces on one page: what each room offers the next.

The names and methods come from Tahoe's interface document of 2008; a Deferred has become an awaitable and
`str` has become `bytes` where bytes were meant. Where a method has changed, its docstring says how. What is declared
before it exists says "Later:" and by what it will come; ARCHITECTURE.md has the table of where everything lives, and
a test holds the two and the code together. Remote interfaces (RI…) are not here: each is declared once, as a
schema, in `grid/wire/remote_interfaces.py`. Servers and who knows them are in `grid/interfaces_servers.py`, and
offered here too.

A storage index is 16 bytes; a share number is an int below 256; sizes and offsets are in bytes; secrets are
32 bytes; all times are POSIX seconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, Self, runtime_checkable

from attrs import frozen

from grid.interfaces_servers import IBucketReader as IBucketReader
from grid.interfaces_servers import IBucketWriter as IBucketWriter
from grid.interfaces_servers import IIntroducerClient as IIntroducerClient
from grid.interfaces_servers import IStorageBroker as IStorageBroker
from grid.interfaces_servers import IStorageServer as IStorageServer
from grid.interfaces_servers import LeaseSecrets as LeaseSecrets
from grid.interfaces_servers import SlotSecrets as SlotSecrets
from grid.interfaces_servers import SlotWrite as SlotWrite
from grid.interfaces_servers import TestVector as TestVector

# --- an immutable share, written and read -----------------------------------------------------------------


class IStorageBucketWriter(Protocol):
    """Lays out one CHK share through an IBucketWriter. Calls come in this order, once each, blocks ascending."""

    async def put_block(self, segmentnum: int, data: bytes | memoryview) -> None: ...
    async def put_plaintext_hashes(self, hashes: Sequence[bytes]) -> None:
        """The dead region: kept as zeros for the layout's sake, so nothing needs to be sent."""

    async def put_crypttext_hashes(self, hashes: Sequence[bytes]) -> None: ...
    async def put_block_hashes(self, blockhashes: Sequence[bytes]) -> None: ...
    async def put_share_hashes(self, sharehashes: Sequence[tuple[int, bytes]]) -> None: ...
    async def put_uri_extension(self, data: bytes) -> None: ...
    async def close(self) -> None: ...


class IStorageBucketReader(Protocol):
    """Reads one CHK share part by part. A download never does: RemoteShare opens a share and fetches from it what
    proves one block, in as few reads as it can.
    """

    async def get_block(self, blocknum: int) -> bytes: ...
    async def get_plaintext_hashes(self) -> list[bytes]: ...
    async def get_crypttext_hashes(self) -> list[bytes]: ...
    async def get_block_hashes(self) -> list[bytes]: ...
    async def get_share_hashes(self) -> list[tuple[int, bytes]]: ...
    async def get_uri_extension(self) -> bytes: ...


# --- erasure code -------------------------------------------------------------------------------------------


class ICodecEncoder(Protocol):
    def set_params(self, data_size: int, required_shares: int, max_shares: int) -> None:
        """`data_size` must be a multiple of `required_shares`."""

    def get_encoder_type(self) -> str: ...
    def get_serialized_params(self) -> bytes: ...
    def get_block_size(self) -> int: ...
    def encode_proposal(
        self, data: bytes | memoryview, desired_share_ids: Sequence[int] | None = None
    ) -> tuple[list[memoryview | bytes], list[int]]:
        """Blocks and their numbers, of one buffer of `data_size` bytes. CPU-bound: run it in a worker thread."""

    def encode(
        self, inshares: Sequence[bytes | memoryview], desired_share_ids: Sequence[int] | None = None
    ) -> tuple[list[memoryview | bytes], list[int]]:
        """The same for data already cut into `required_shares` pieces."""


class ICodecDecoder(Protocol):
    def set_serialized_params(self, params: bytes) -> None: ...
    def get_needed_shares(self) -> int: ...
    def decode(
        self, some_shares: Sequence[bytes | memoryview], their_shareids: Sequence[int]
    ) -> list[bytes | memoryview]:
        """The pieces of the segment, in order, from exactly `needed` blocks. CPU-bound."""


# --- upload -------------------------------------------------------------------------------------------------


@frozen
class EncodingParameters:
    """How a file is to be spread. `segment_size` is the actual one: a multiple of k, at most up(size, k)."""

    k: int  # shares needed
    happy: int  # distinct servers that must each hold a share of their own
    n: int  # shares made
    segment_size: int  # bytes


class IUploadable(Protocol):
    """Plaintext to be uploaded, read once, front to back."""

    def set_default_encoding_parameters(self, params: Mapping[str, int]) -> None:
        """Keys `k`, `happy`, `n`, `max_segment_size`; before any other call, if at all."""

    async def get_size(self) -> int: ...
    async def get_all_encoding_parameters(self) -> EncodingParameters: ...
    async def get_encryption_key(self) -> bytes:
        """16 bytes, the same at every call: convergent (a whole pass over the data) or random."""

    async def read(self, length: int) -> Sequence[bytes | memoryview]:
        """The next `length` bytes in pieces; fewer only at the end."""

    async def close(self) -> None: ...


class IEncryptedUploadable(Protocol):
    """Ciphertext to be encoded, from an IUploadable or (helper) from afar."""

    async def get_size(self) -> int: ...
    async def get_all_encoding_parameters(self) -> EncodingParameters: ...
    async def get_storage_index(self) -> bytes: ...
    async def read_encrypted(self, length: int, hash_only: bool) -> Sequence[bytes | memoryview]:
        """The next `length` bytes in pieces; none if `hash_only`, which moves on over what the helper has already."""

    async def get_plaintext_hashtree_leaves(self, first: int, last: int, num_segments: int) -> Sequence[bytes]:
        """Of plaintext segments `first` to `last` - 1: zeros. Only helpers of 2008 ask.

        True hashes of plaintext would tell whoever sees them what the file is, and no file has them in it any more.
        """

    async def get_plaintext_hash(self) -> bytes:
        """Of the whole plaintext: zeros, for the same reason."""

    async def close(self) -> None: ...


class IUploadResults(Protocol):
    """What an upload did."""

    @property
    def uri(self) -> str:
        """The read cap, as text. A secret."""

    @property
    def pushed_shares(self) -> int: ...
    @property
    def preexisting_shares(self) -> int: ...
    @property
    def sharemap(self) -> Mapping[int, frozenset[str]]:
        """{share number: server ids}."""


class IEncoder(Protocol):
    """Ciphertext in, shares out to shareholders, hash trees and UEB built on the way.

    Size and parameters are the uploadable's to say, so `set_size` and `set_params` are no more.
    """

    async def set_encrypted_uploadable(self, u: IEncryptedUploadable) -> Self: ...
    def get_param(self, name: str) -> Any:
        """One of storage_index, share_counts, num_segments, segment_size, block_size, share_size, serialized_params."""

    def set_shareholders(self, shareholders: Mapping[int, IStorageBucketWriter]) -> None: ...
    async def start(self) -> tuple[bytes, int, int, int]:
        """(UEB hash, k, n, size). Raises NotEnoughServersError when happiness is lost on the way."""


class IUploadProgress(Protocol):
    """Is told how far an upload is, between two awaits; must not raise."""

    def begin(self, placed: int, total: int, push_bytes: int) -> None:
        """The servers are chosen: `placed` of `total` shares are there, `push_bytes` of blocks are to be sent."""

    def pushed(self, count: int) -> None:
        """So many more bytes of blocks were handed to their servers."""

    def placed(self) -> None:
        """One more share is whole on its server."""


class IUploader(Protocol):
    async def upload(self, uploadable: IUploadable, progress: IUploadProgress | None = None) -> IUploadResults: ...


# --- download -----------------------------------------------------------------------------------------------


class IDownloadTarget(Protocol):
    def open(self, size: int) -> None: ...
    async def write(self, data: bytes | memoryview) -> None: ...
    def close(self) -> None: ...
    def fail(self, why: Exception) -> None: ...
    def register_canceller(self, cb: Any) -> None:
        """`cb()` ends the download; no write() or close() follows."""

    def finish(self) -> Any:
        """Whatever this returns, download() returns."""


class IDownloader(Protocol):
    async def download(self, uri: str, target: IDownloadTarget) -> Any:
        """All of a file to `target`. Returns what target.finish() does."""


class IDecoder(Protocol):
    """Shares in, the whole plaintext out, front to back. Nobody here is one: a file is read by segment, in any order
    and by many at a time, so the work is divided among a node, its snapshot and one ImmutableDownload.
    """

    def setup(self, outfile: IDownloadTarget) -> None: ...
    def set_shareholders(self, shareholders: Mapping[int, IBucketReader]) -> None: ...
    async def start(self) -> Self: ...


# --- caps ---------------------------------------------------------------------------------------------------


@runtime_checkable
class IURI(Protocol):
    """A parsed cap: a frozen value, so what was asked with a get_… method is a property; to_string is str().

    `init_from_string` is the function parse_cap(), since the text tells which kind it is.
    """

    @property
    def is_readonly(self) -> bool: ...
    @property
    def is_mutable(self) -> bool: ...
    @property
    def readonly(self) -> Any: ...
    @property
    def verifier(self) -> Any:
        """The verify cap, or None for literals."""

    @property
    def storage_index(self) -> bytes | None: ...
    def to_string(self) -> str: ...


class IVerifierURI(Protocol):
    """The right to check and repair, and to read nothing."""

    @property
    def storage_index(self) -> bytes | None: ...
    def to_string(self) -> str: ...


class IFileURI(IURI, Protocol):
    @property
    def size(self) -> int | None:
        """Plaintext bytes; None for a mutable file: the grid knows."""


class IMutableFileURI(IFileURI, Protocol):
    @property
    def fingerprint(self) -> bytes:
        """Hash of the public key that signs every version."""


class IDirnodeURI(IURI, Protocol):
    @property
    def file(self) -> Any:
        """The cap of the file that the directory's table is kept in: an IFileURI."""


class INewDirectoryURI(IDirnodeURI, Protocol):
    """A directory kept in a file on the grid, which all are by now."""


class IReadonlyNewDirectoryURI(INewDirectoryURI, Protocol):
    """The same with `is_readonly`."""


# --- nodes --------------------------------------------------------------------------------------------------


class IFilesystemNode(Protocol):
    def get_uri(self) -> str:
        """The strongest cap held, as text. A secret."""

    def get_readonly_uri(self) -> str: ...
    def get_verifier(self) -> Any:
        """An IVerifierURI, or None where there is nothing to check."""

    def get_storage_index(self) -> bytes | None: ...
    async def check(self) -> Any:
        """As IChecker.check."""

    def is_readonly(self) -> bool:
        """Whether this reference cannot change it; others may hold one that can."""

    def is_mutable(self) -> bool:
        """Whether anybody can change it."""


class IMutableFilesystemNode(IFilesystemNode, Protocol):
    """What may change: a mutable file, or a directory."""


class IReadableSnapshot(Protocol):
    """The unchanging contents of an immutable file, or of one version of a mutable file.

    This is what the block cache holds on to: ciphertext by segment, and the way to plaintext.
    """

    @property
    def storage_index(self) -> bytes | None:
        """None for literals, which have no segments worth caching."""

    @property
    def version(self) -> bytes:
        """Empty for immutable files; seqnum and root hash of a mutable file's version."""

    @property
    def cache_secret(self) -> bytes | None:
        """32 bytes that follow from the read key: who keeps segments can prove with it, later, that they are the
        ones that were verified. None for literals.
        """

    @property
    def size(self) -> int: ...

    async def get_segment_size(self) -> int:
        """Plaintext bytes in each segment but the last. May need the network the first time."""

    def remember_segment_size(self, segment_size: int) -> None:
        """What get_segment_size() said of the same version before: it need not ask again."""

    async def get_segment(self, number: int) -> bytes:
        """One verified ciphertext segment, fetched, from any good shares. Raises NotEnoughSharesError, …"""

    def decrypt(self, segment: int, offset: int, data: bytes | memoryview) -> bytes:
        """Plaintext of `data`, which stands `offset` bytes into that ciphertext segment."""


class IFileNode(IFilesystemNode, Protocol):
    async def download(self, target: IDownloadTarget) -> Any: ...
    async def download_to_data(self) -> bytes: ...
    def get_size(self) -> int | None:
        """Plaintext bytes; None for a mutable file that was not looked at yet (ask get_current_size())."""

    async def open_snapshot(self) -> IReadableSnapshot:
        """What is there now. For a mutable file: the best recoverable version on the grid."""


class IMutableFileNode(IFileNode, IMutableFilesystemNode, Protocol):
    async def replace(self, newdata: bytes) -> None:
        """Publish `newdata` as the next version. Raises UncoordinatedWriteError (the document's ConsistencyError) when
        another writer was faster, NotWriteableError.
        """

    async def apply(self, changes: Any) -> Any:
        """Change parts of it and its size (see grid.Changes); with MDMF only the segments touched are moved. Raises as
        replace(), but only after it has tried again on top of what the other writer wrote.
        """

    async def write_at(self, offset: int, data: bytes) -> None: ...
    async def append(self, data: bytes) -> None: ...
    async def truncate(self, size: int) -> None: ...
    def get_writekey(self) -> bytes | None: ...


class IDirectoryNode(IMutableFilesystemNode, Protocol):
    async def list(self) -> dict[str, tuple[Any, dict[str, Any]]]:
        """{name: (child node, metadata)}."""

    async def has_child(self, name: str) -> bool: ...
    async def get(self, name: str) -> Any: ...
    async def get_metadata_for(self, name: str) -> dict[str, Any]: ...
    async def set_metadata_for(self, name: str, metadata: dict[str, Any]) -> Self: ...
    async def get_child_at_path(self, path: str | Sequence[str]) -> Any: ...
    async def set_uri(self, name: str, child_uri: str, metadata: dict[str, Any] | None = None) -> None: ...
    async def set_uris(self, entries: Iterable[tuple[str, str, dict[str, Any] | None]]) -> None: ...
    async def set_node(self, name: str, child: Any, metadata: dict[str, Any] | None = None) -> Any: ...
    async def set_nodes(self, entries: Iterable[tuple[str, Any, dict[str, Any] | None]]) -> None: ...
    async def add_file(
        self, name: str, uploadable: IUploadable, metadata: dict[str, Any] | None = None
    ) -> IFileNode: ...
    async def delete(self, name: str) -> None: ...
    async def create_empty_directory(self, name: str) -> Any: ...
    async def move_child_to(
        self, current_child_name: str, new_parent: Any, new_child_name: str | None = None
    ) -> None: ...
    async def build_manifest(self) -> frozenset[str]:
        """Verify caps of all that can be reached from here, as texts."""


# --- health, and what a node tells of itself ----------------------------------------------------------------


class IChecker(Protocol):
    """How many good shares a file has. Needs no right to read it: any cap will do, a verify cap too.

    Results are a value with `needed_shares`, `total_shares`, `good` and `sharemap`, and more; directories have the same
    as files, since they are kept in files by now.
    """

    async def check(self, uri_to_check: Any) -> Any:
        """Ask every server what it holds, and believe it."""

    async def verify(self, uri_to_check: Any) -> Any:
        """Fetch all of every share and check every hash."""

    def checker_results_for(self, uri_to_check: Any) -> Sequence[tuple[float, Any]]:
        """(when, results as JSON) of the checks that were kept, oldest first; asks nobody."""


class IStatsProducer(Protocol):
    """A part that tells what it has done and is at. See grid/stats.py."""

    def get_stats(self) -> Mapping[str, float]:
        """Counters and gauges by name; no cap, path or file name in any of them. Quick: it is asked often."""


# --- the grid as a whole ------------------------------------------------------------------------------------


class IClient(Protocol):
    async def upload(self, uploadable: IUploadable, progress: IUploadProgress | None = None) -> IUploadResults: ...
    async def create_mutable_file(self, contents: bytes = b"") -> str: ...
    async def create_empty_dirnode(self) -> IDirectoryNode: ...
    def create_node_from_uri(self, uri: str) -> IFilesystemNode: ...
