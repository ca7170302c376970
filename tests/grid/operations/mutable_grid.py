"""What the tests of mutable files share: the vectors' RSA key, their shares made whole, servers to put them on."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from functools import cache
from typing import Any

from grid.crypto import aes_ctr
from grid.erasure import Encoder, split_segment
from grid.formats import hashutil
from grid.formats.caps import MDMFWriteCap, SDMFWriteCap
from grid.formats.hashtree import build_tree, needed_hashes
from grid.formats.mdmf_share import pack_mdmf_share
from grid.nodes.mutable import MutableFileNode
from grid.nodes.mutable_reading import MutableAccess
from grid.operations.changes import Changes
from grid.operations.keys import MutableKeys
from grid.operations.leases import Secrets
from grid.operations.mutable_encode import encode_sdmf, prepare_mdmf
from tests import vectors
from tests.memory_server import MemoryBroker, MemoryServer, Slot

SECRETS = Secrets(bytes(range(32)))


@cache
def keys() -> MutableKeys:
    """One key pair for all tests, the vectors' own: making one takes long, and each test has its own servers."""
    return MutableKeys.from_private_der(bytes.fromhex(vectors.section("formats.json", "mutable.keys")["privkey_der"]))


def write_cap() -> SDMFWriteCap:
    return SDMFWriteCap(keys().writekey, keys().fingerprint)


def mdmf_cap() -> MDMFWriteCap:
    return MDMFWriteCap(keys().writekey, keys().fingerprint)


def storage_index() -> bytes:
    return keys().storage_index


def files() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = vectors.section("formats.json", "mutable.files")
    return found


def contents_of(vector: dict[str, Any]) -> bytes:
    contents = vector["contents"]
    data = bytes.fromhex(contents["hex"]) if "hex" in contents else vectors.expand(contents)
    assert hashlib.sha256(data).hexdigest() == vector["contents_sha256"]
    return data


def shares_of(vector: dict[str, Any]) -> dict[int, bytes]:
    """All N shares, byte for byte as the real client wrote them."""
    make = _sdmf_shares if vector["format"] == "SDMF" else _mdmf_shares
    shares = make(vector)
    for number, share in shares.items():
        assert hashlib.sha256(share).hexdigest() == vector["share_sha256"][number]
    return dict(shares)


def _sdmf_shares(vector: dict[str, Any]) -> Mapping[int, bytes]:
    return encode_sdmf(
        contents_of(vector),
        keys(),
        seqnum=vector["seqnum"],
        salt=bytes.fromhex(vector["salts"][0]),
        k=vector["k"],
        n=vector["n"],
        signature=bytes.fromhex(vector["signature"]),
    ).shares


def _mdmf_shares(vector: dict[str, Any]) -> Mapping[int, bytes]:
    data, k, n, segment_size = contents_of(vector), vector["k"], vector["n"], vector["segment_size"]
    salts = [bytes.fromhex(salt) for salt in vector["salts"]]
    blocks: list[list[bytes]] = [[] for _ in range(n)]
    for number, salt in enumerate(salts):
        segment = data[number * segment_size : (number + 1) * segment_size]
        ciphertext = aes_ctr(hashutil.datakey(salt, keys().readkey), segment)
        for share, block in enumerate(Encoder(k, n).encode(split_segment(ciphertext, k))):
            blocks[share].append(bytes(block))
    trees = [build_tree(list(map(hashutil.salted_block_hash, salts, blocks[share]))) for share in range(n)]
    share_tree = build_tree([tree[0] for tree in trees])
    return {
        share: pack_mdmf_share(
            seqnum=vector["seqnum"],
            root_hash=share_tree[0],
            k=k,
            n=n,
            segment_size=segment_size,
            data_size=len(data),
            public_key=keys().public_der,
            signature=bytes.fromhex(vector["signature"]),
            share_hash_chain={node: share_tree[node] for node in needed_hashes(n, share)},
            block_hash_tree=trees[share],
            salts_and_blocks=list(zip(salts, blocks[share], strict=True)),
            encrypted_private_key=keys().encrypted_private_key,
        )
        for share in range(n)
    }


def put(server: MemoryServer, number: int, share: bytes) -> None:
    """Place a share as if it had been written there with our write enabler."""
    enabler = hashutil.write_enabler(keys().writekey, server.tub_id)
    server.slots.setdefault(storage_index(), Slot(enabler)).shares[number] = bytearray(share)


def permuted(broker: MemoryBroker) -> list[MemoryServer]:
    """The servers in the order of our one file."""
    return broker.get_permuted_servers(storage_index())  # type: ignore[return-value]


def place(broker: MemoryBroker, shares: Mapping[int, bytes]) -> None:
    """Share i on the i-th server in permuted order, round and round."""
    servers = permuted(broker)
    for number, share in shares.items():
        put(servers[number % len(servers)], number, share)


def access(broker: MemoryBroker, k: int = 3, n: int = 10, happy: int = 1) -> MutableAccess:
    return MutableAccess(broker, SECRETS, k, n, os.urandom, happy)


def new_node(broker: MemoryBroker, k: int = 3, n: int = 10) -> MutableFileNode:
    """As another client's, which knows nothing yet."""
    return MutableFileNode(access(broker, k, n), write_cap())


async def created(broker: MemoryBroker, contents: bytes, k: int = 3, n: int = 10) -> MutableFileNode:
    """A file just made, by whom it was made."""
    node = MutableFileNode(access(broker, k, n), write_cap(), keys=keys())
    await node.create(contents)
    return node


def mdmf_node(broker: MemoryBroker, k: int = 3, n: int = 10) -> MutableFileNode:
    """An MDMF file's node, as another client's, which knows nothing yet."""
    return MutableFileNode(access(broker, k, n), mdmf_cap())


async def created_mdmf(broker: MemoryBroker, contents: bytes | Changes, k: int = 3, n: int = 10) -> MutableFileNode:
    node = MutableFileNode(access(broker, k, n), mdmf_cap(), keys=keys())
    await node.create(contents)
    return node


async def place_mdmf(broker: MemoryBroker, contents: bytes, segment_size: int, k: int = 3, n: int = 10) -> None:
    """A file as nobody writes them: of segments so small that many of them cost little."""

    async def read(offset: int, length: int) -> bytes:
        return contents[offset : offset + length]

    encoded = await prepare_mdmf(
        read, len(contents), keys(), seqnum=1, k=k, n=n, random_bytes=os.urandom, segment_size=segment_size
    )
    place(broker, encoded.shares)
