"""What the servers of a grid offer, and who knows them. Part of grid/interfaces.py; import it from there.

A storage server is the same whichever protocol it is reached by; secrets and vectors are values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from attrs import field, frozen


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
    def responsive(self) -> bool:
        """Connected, and not silent to what was asked of it."""

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

    def retry_now(self) -> None:
        """Dial the servers that are away at once, not when their pauses are over: somebody needs them."""

    def look_for_life(self) -> None:
        """Ask the connected servers that nobody waits for whether they still answer: `responsive` tells soon."""


class IIntroducerClient(Protocol):
    """The link to one introducer: what it announces.

    Connections, and the order to ask servers in, are the IStorageBroker's: it has what the older get_all_connections,
    get_all_connectors, get_all_peerids, get_all_connections_for and get_permuted_peers gave. What a node of ours
    serves is published by grid/services.py.
    """

    def subscribe_to(self, service_name: str) -> None:
        """Before it runs: hear of this service's announcements."""

    def connected_to_introducer(self) -> bool: ...
