"""All interfaces on one page: what each room offers the next.

The names and methods come from Tahoe's interface document of 2008; a Deferred has become an awaitable and
`str` has become `bytes` where bytes were meant. Where a method has changed, its docstring says how. Remote
interfaces (RI…) are not here: each is declared once, as a schema, in `grid/wire/remote_interfaces.py`.

A storage index is 16 bytes; a share number is an int below 256; sizes and offsets are in bytes; secrets are
32 bytes; all times are POSIX seconds.
"""

from __future__ import annotations

from collections.abc import Awaitable, Iterable, Mapping, Sequence
from typing import Any, Protocol, Self, runtime_checkable

from attrs import field, frozen

# --- storage servers -------------------------------------------------------------------------------------


@frozen
class LeaseSecrets:
    """The pair that identifies one lease on one server: 32 bytes each, never shown."""

    renew: bytes = field(repr=False)
    cancel: bytes = field(repr=False)


@frozen
class SlotSecrets:
    """What one server wants before it writes to a mutable slot: 32 bytes each, never shown."""

    write_enabler: bytes = field(repr=False)
    lease: LeaseSecrets


@frozen
class TestVector:
    """Before a slot write: the share's bytes at `offset`, cut to `length`, must equal `specimen`."""

    __test__ = False  # not a test class, whatever pytest thinks of the name

    offset: int
    length: int
    specimen: bytes


@frozen
class SlotWrite:
    """What to do to one share of a slot: all `tests` of a call must hold, then `data` is written.

    `new_length` 0 deletes the share; smaller than now truncates it; None leaves the length alone.
    """

    tests: Sequence[TestVector]
    data: Sequence[tuple[int, bytes]]
    new_length: int | None = None


class IBucketWriter(Protocol):
    """One share of an immutable file on its way to one server (RIBucketWriter)."""

    async def write(self, offset: int, data: bytes | memoryview) -> None:
        """Send `data`. Returns when it is handed to the connection and the server's window of bytes in
        flight has room again, not when the server has answered: a failure shows in a later write or in
        close(). `data` must not change until close() returned. Raises PeerError.
        """

    async def close(self) -> None:
        """Wait for every write, then make the share visible. Raises PeerError; the share is then absent."""

    async def abort(self) -> None:
        """Discard what was written. Harmless when repeated or when the connection is gone; never raises PeerError."""


class IBucketReader(Protocol):
    """One finished share of an immutable file on one server (RIBucketReader)."""

    async def read(self, offset: int, length: int) -> bytes:
        """Up to `length` bytes from `offset`, fewer at the end of the share. Raises PeerError."""

    async def advise_corrupt_share(self, reason: str) -> None:
        """Tell the server that this share is damaged. Best effort: never raises PeerError."""


class IStorageServer(Protocol):
    """One storage server, over whichever protocol it is reached (RIStorageServer, or GBS).

    Every call has its own deadline (see `grid/peers`) and raises PeerError: ConnectionLostError when not
    connected, PeerTimeoutError when late, RemoteFailure when the server refused.
    """

    @property
    def server_id(self) -> str:
        """`v0-` and 52 base32 characters, or free text for static servers. Public."""

    @property
    def name(self) -> str:
        """Short form of the server id, for logs and status: eight characters. Public."""

    @property
    def nickname(self) -> str: ...

    @property
    def permutation_seed(self) -> bytes:
        """As announced, decoded once; see spec of the permuted order."""

    @property
    def tub_id(self) -> bytes:
        """20 bytes, from the announced FURL: the seed of this server's lease secrets and write enablers."""

    @property
    def connected(self) -> bool: ...

    @property
    def maximum_immutable_share_size(self) -> int:
        """Bytes; the server takes no larger immutable share (it is as good as read-only for those)."""

    @property
    def available_space(self) -> int | None:
        """Bytes free for us as last told, or None when unknown."""

    async def get_version(self) -> Mapping[bytes, Any]: ...

    async def allocate_buckets(
        self, storage_index: bytes, lease: LeaseSecrets, share_numbers: frozenset[int], allocated_size: int
    ) -> tuple[frozenset[int], dict[int, IBucketWriter]]:
        """Return (share numbers of this file the server already holds, asked for or not; writers for those
        it accepts). A number asked for and in neither was refused: no space, or another upload has it.
        """

    async def get_buckets(self, storage_index: bytes) -> dict[int, IBucketReader]:
        """A reader for every share held; empty when there is none."""

    async def add_lease(self, storage_index: bytes, lease: LeaseSecrets) -> None:
        """Add or renew the lease on all shares held; silent when there is none."""

    async def slot_readv(
        self, storage_index: bytes, share_numbers: Sequence[int], read_vectors: Sequence[tuple[int, int]]
    ) -> dict[int, list[bytes]]:
        """{share number: [bytes per (offset, length)]}; no share numbers means all of them."""

    async def slot_testv_and_readv_and_writev(
        self,
        storage_index: bytes,
        secrets: SlotSecrets,
        writes: Mapping[int, SlotWrite],
        read_vectors: Sequence[tuple[int, int]],
    ) -> tuple[bool, dict[int, list[bytes]]]:
        """(all tests held and the writes were done, what all shares held *before*)."""

    async def advise_corrupt_share(self, share_type: str, storage_index: bytes, share_number: int, reason: str) -> None:
        """`share_type` is `immutable` or `mutable`. Best effort: never raises PeerError."""


class IStorageBroker(Protocol):
    """Who is known, who is connected, and in which order to ask them."""

    def get_permuted_servers(self, storage_index: bytes) -> list[IStorageServer]:
        """Connected servers in the permuted order of this storage index, preferred ones first."""

    def get_known_servers(self) -> list[IStorageServer]:
        """All servers ever announced or configured, connected or not."""

    def permits_upload(self, server: IStorageServer) -> bool:
        """False when grid managers are configured and none of them certifies the server, now."""

    async def wait_for_servers(self, count: int, timeout_s: float) -> int:
        """Return the number connected once it is at least `count`, or when the time is over."""


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
    """Reads the parts of one CHK share through an IBucketReader. Raises CorruptShareError, PeerError."""

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
    async def read_encrypted(self, length: int, hash_only: bool) -> Sequence[bytes | memoryview]: ...
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
    """Ciphertext in, shares out to shareholders, hash trees and UEB built on the way."""

    async def set_encrypted_uploadable(self, u: IEncryptedUploadable) -> Self: ...
    def get_param(self, name: str) -> Any:
        """One of storage_index, share_counts, num_segments, segment_size, block_size, share_size, serialized_params."""

    def set_shareholders(self, shareholders: Mapping[int, IStorageBucketWriter]) -> None: ...
    async def start(self) -> tuple[bytes, int, int, int]:
        """(UEB hash, k, n, size). Raises NotEnoughServersError when happiness is lost on the way."""


class IUploader(Protocol):
    async def upload(self, uploadable: IUploadable) -> IUploadResults: ...


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
    async def download(self, uri: str, target: IDownloadTarget) -> Any: ...


# --- caps ---------------------------------------------------------------------------------------------------


@runtime_checkable
class IURI(Protocol):
    """A parsed cap: a frozen value. `init_from_string` has become the class method `parse`; to_string is str()."""

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


# --- nodes --------------------------------------------------------------------------------------------------


class IFilesystemNode(Protocol):
    def get_uri(self) -> str:
        """The strongest cap held, as text. A secret."""

    def get_readonly_uri(self) -> str: ...
    def get_verifier(self) -> Any: ...
    def get_storage_index(self) -> bytes | None: ...
    def is_readonly(self) -> bool: ...
    def is_mutable(self) -> bool: ...


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
    def size(self) -> int: ...

    async def get_segment_size(self) -> int:
        """Plaintext bytes in each segment but the last. May need the network the first time."""

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


class IMutableFileNode(IFileNode, Protocol):
    async def replace(self, newdata: bytes) -> None:
        """Publish `newdata` as the next version. Raises UncoordinatedWriteError, NotWriteableError."""

    def get_writekey(self) -> bytes | None: ...


class IDirectoryNode(IFilesystemNode, Protocol):
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


# --- the grid as a whole ------------------------------------------------------------------------------------


class IIntroducerClient(Protocol):
    def subscribe_to(self, service_name: str) -> None: ...
    def connected_to_introducer(self) -> bool: ...


class IClient(Protocol):
    def upload(self, uploadable: IUploadable) -> Awaitable[IUploadResults]: ...
    def create_mutable_file(self, contents: bytes = b"") -> Awaitable[str]: ...
    def create_empty_dirnode(self) -> Awaitable[IDirectoryNode]: ...
    def create_node_from_uri(self, uri: str) -> IFilesystemNode: ...
