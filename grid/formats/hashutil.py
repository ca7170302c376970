"""Every hash Tahoe-LAFS computes: SHA-256 twice, with a tag that says what for.

    tagged hash  TH(tag, v)    = SHA256(SHA256(NS(tag) || v))
    pair hash    TP(tag, a, b) = SHA256(SHA256(NS(tag) || NS(a) || NS(b)))        NS: see netstring.py

Keys, storage indexes and salts are the first 16 bytes of such a hash. The one exception to the scheme is the
permuted server order, which is plain SHA-1.
Source: Tahoe-LAFS 1.20's tags and derivations. All results are bytes; nothing here checks the lengths of inputs.
"""

from __future__ import annotations

from hashlib import sha1, sha256
from typing import Final, Self

from grid.formats.netstring import netstring
from grid.interfaces import LeaseSecrets

HASH_BYTES: Final = 32
KEY_BYTES: Final = 16  # also of a storage index and of a salt

_K_N_MAX: Final = 256  # shares the erasure code can make


class TaggedHasher:
    """SHA-256d of a tag and of all that update() was given, in whatever pieces."""

    __slots__ = ("_sha",)

    def __init__(self, tag: bytes) -> None:
        self._sha = sha256(netstring(tag))

    def copy(self) -> Self:
        twin = object.__new__(type(self))
        twin._sha = self._sha.copy()
        return twin

    def update(self, data: bytes | bytearray | memoryview) -> None:
        self._sha.update(data)

    def digest(self) -> bytes:
        """32 bytes. May be asked for in the middle: update() goes on from there."""
        return sha256(self._sha.digest()).digest()


class _Tag:
    """One purpose's tag, hashed ahead: these functions run for every block and segment."""

    __slots__ = ("_pair_prefix", "_sha")

    def __init__(self, tag: bytes) -> None:
        self._sha = sha256(netstring(tag))
        self._pair_prefix = netstring(tag)

    def hash(self, *pieces: bytes | bytearray | memoryview) -> bytes:
        """TH of the pieces as if joined."""
        sha = self._sha.copy()
        for piece in pieces:
            sha.update(piece)
        return sha256(sha.digest()).digest()

    def pair(self, left: bytes, right: bytes) -> bytes:
        """TP. Inputs are short: joining them is quicker than copying a state."""
        joined = b"%b%d:%b,%d:%b," % (self._pair_prefix, len(left), left, len(right), right)
        return sha256(sha256(joined).digest()).digest()


def tagged_hash(tag: bytes, value: bytes | memoryview) -> bytes:
    """TH: 32 bytes."""
    sha = sha256(netstring(tag))
    sha.update(value)
    return sha256(sha.digest()).digest()


def tagged_pair_hash(tag: bytes, left: bytes, right: bytes) -> bytes:
    """TP: 32 bytes."""
    return tagged_hash(tag, netstring(left) + netstring(right))


# --- immutable files ----------------------------------------------------------------------------------------

_BLOCK_TAG: Final = b"allmydata_encoded_subshare_v1"
_BLOCK = _Tag(_BLOCK_TAG)
_UEB = _Tag(b"allmydata_uri_extension_v1")
_CRYPTTEXT: Final = TaggedHasher(b"allmydata_crypttext_v1")
_CRYPTTEXT_SEGMENT = _Tag(b"allmydata_crypttext_segment_v1")
_CHK_STORAGE_INDEX = _Tag(b"allmydata_immutable_key_to_storage_index_v1")
_CONVERGENCE_TAG: Final = b"allmydata_immutable_content_to_key_with_added_secret_v1+"


def block_hash(block: bytes | memoryview) -> bytes:
    """A leaf of a share's block hash tree."""
    return _BLOCK.hash(block)


def block_hasher() -> TaggedHasher:
    """The same for a block that comes in pieces; with an MDMF block its salt comes first."""
    return TaggedHasher(_BLOCK_TAG)


def salted_block_hash(salt: bytes | memoryview, block: bytes | memoryview) -> bytes:
    """The same for an MDMF share, where the segment's salt stands before the block."""
    return _BLOCK.hash(salt, block)


def uri_extension_hash(ueb: bytes | memoryview) -> bytes:
    return _UEB.hash(ueb)


def crypttext_segment_hash(segment: bytes | memoryview) -> bytes:
    """A leaf of the ciphertext hash tree: the segment without padding."""
    return _CRYPTTEXT_SEGMENT.hash(segment)


def crypttext_hasher() -> TaggedHasher:
    """For the hash of a whole file's ciphertext."""
    return _CRYPTTEXT.copy()


def convergence_hasher(secret: bytes, k: int, n: int, segment_size: int) -> TaggedHasher:
    """Feed it the whole plaintext: digest()[:16] is the convergent key.

    `segment_size` is the file's own (a multiple of k), not the configured maximum. Raises ValueError for
    impossible k and n.
    """
    if not 1 <= k <= n <= _K_N_MAX:
        raise ValueError(f"cannot encode {k} of {n}")
    parameters = b"%d,%d,%d" % (k, n, segment_size)
    return TaggedHasher(_CONVERGENCE_TAG + netstring(secret) + netstring(parameters))


def chk_storage_index(key: bytes) -> bytes:
    return _CHK_STORAGE_INDEX.hash(key)[:KEY_BYTES]


# --- mutable files ------------------------------------------------------------------------------------------

_WRITEKEY = _Tag(b"allmydata_mutable_privkey_to_writekey_v1")
_READKEY = _Tag(b"allmydata_mutable_writekey_to_readkey_v1")
_SSK_STORAGE_INDEX = _Tag(b"allmydata_mutable_readkey_to_storage_index_v1")
_FINGERPRINT = _Tag(b"allmydata_mutable_pubkey_to_fingerprint_v1")
_DATAKEY = _Tag(b"allmydata_mutable_readkey_to_datakey_v1")
_WRITE_ENABLER_MASTER = _Tag(b"allmydata_mutable_writekey_to_write_enabler_master_v1")
_WRITE_ENABLER = _Tag(b"allmydata_mutable_write_enabler_master_and_nodeid_to_write_enabler_v1")


def writekey_of_private_key(private_key_der: bytes) -> bytes:
    """Hashes the DER as it was received: encoding the key anew would change the result."""
    return _WRITEKEY.hash(private_key_der)[:KEY_BYTES]


def readkey_of_writekey(writekey: bytes) -> bytes:
    return _READKEY.hash(writekey)[:KEY_BYTES]


def ssk_storage_index(readkey: bytes) -> bytes:
    return _SSK_STORAGE_INDEX.hash(readkey)[:KEY_BYTES]


def fingerprint_of_public_key(public_key_der: bytes) -> bytes:
    return _FINGERPRINT.hash(public_key_der)


def datakey(salt: bytes, readkey: bytes) -> bytes:
    """The AES key of one version (SDMF) or one segment (MDMF)."""
    return _DATAKEY.pair(salt, readkey)[:KEY_BYTES]


def write_enabler(writekey: bytes, tub_id: bytes) -> bytes:
    """What the server with that tub id (20 bytes) wants before it changes the slot: 32 bytes."""
    return _WRITE_ENABLER.pair(_WRITE_ENABLER_MASTER.hash(writekey), tub_id)


# --- directories --------------------------------------------------------------------------------------------

_CHILD_SALT = _Tag(b"allmydata_dirnode_child_rwcap_to_salt_v1")
_CHILD_KEY = _Tag(b"allmydata_mutable_writekey_and_salt_to_dirnode_child_capkey_v1")
_XOR_INNER: Final = bytes(byte ^ 0x36 for byte in range(256))
_XOR_OUTER: Final = bytes(byte ^ 0x5C for byte in range(256))


def dirnode_child_salt(rwcap: bytes) -> bytes:
    return _CHILD_SALT.hash(rwcap)[:KEY_BYTES]


def dirnode_child_key(salt: bytes, writekey: bytes) -> bytes:
    """The AES key of one child's write cap, under its directory's writekey."""
    return _CHILD_KEY.pair(salt, writekey)[:KEY_BYTES]


def dirnode_mac(key: bytes, salt: bytes, ciphertext: bytes) -> bytes:
    """32 bytes. Like HMAC-SHA256, but the key is not stretched to a whole hash block, so hmac will not do."""
    inner = sha256(key.translate(_XOR_INNER) + salt + ciphertext).digest()
    return sha256(key.translate(_XOR_OUTER) + inner).digest()


# --- Merkle trees -------------------------------------------------------------------------------------------

_EMPTY_LEAF = _Tag(b"Merkle tree empty leaf")
_INNER_NODE = _Tag(b"Merkle tree internal node")


def empty_leaf_hash(leaf: int) -> bytes:
    """What pads a tree to a power of two, at leaf position `leaf`."""
    return _EMPTY_LEAF.hash(b"%d" % leaf)


pair_hash = _INNER_NODE.pair  # (left, right) -> the hash of their parent


# --- leases -------------------------------------------------------------------------------------------------

_CLIENT_RENEWAL: Final = b"allmydata_client_renewal_secret_v1"
_CLIENT_CANCEL: Final = b"allmydata_client_cancel_secret_v1"
_FILE_RENEWAL = _Tag(b"allmydata_file_renewal_secret_v1")
_FILE_CANCEL = _Tag(b"allmydata_file_cancel_secret_v1")
_BUCKET_RENEWAL = _Tag(b"allmydata_bucket_renewal_secret_v1")
_BUCKET_CANCEL = _Tag(b"allmydata_bucket_cancel_secret_v1")


def client_lease_secrets(node_secret: bytes) -> LeaseSecrets:
    """The root of all leases of one node. Here, and only here, the secret is the tag and the constant is hashed."""
    return LeaseSecrets(tagged_hash(node_secret, _CLIENT_RENEWAL), tagged_hash(node_secret, _CLIENT_CANCEL))


def file_lease_secrets(node_secret: bytes, storage_index: bytes) -> LeaseSecrets:
    """One file's: the same on all servers, so never sent to any; see bucket_lease_secrets."""
    client = client_lease_secrets(node_secret)
    return LeaseSecrets(
        _FILE_RENEWAL.pair(client.renew, storage_index), _FILE_CANCEL.pair(client.cancel, storage_index)
    )


def bucket_lease_secrets(file: LeaseSecrets, tub_id: bytes) -> LeaseSecrets:
    """What is sent to the server with that tub id (20 bytes), for the file `file` is of."""
    return LeaseSecrets(_BUCKET_RENEWAL.pair(file.renew, tub_id), _BUCKET_CANCEL.pair(file.cancel, tub_id))


def lease_secrets(node_secret: bytes, storage_index: bytes, tub_id: bytes) -> LeaseSecrets:
    """The whole chain at once. The same for mutable and immutable shares."""
    return bucket_lease_secrets(file_lease_secrets(node_secret, storage_index), tub_id)


# --- server order -------------------------------------------------------------------------------------------


def permuted_key(storage_index: bytes, seed: bytes) -> bytes:
    """20 bytes: servers are asked in ascending order of this; `seed` is the server's permutation seed."""
    return sha1(storage_index + seed, usedforsecurity=False).digest()
