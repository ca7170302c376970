"""Hashes against the vectors of Tahoe-LAFS 1.20: every tag, every derivation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grid.formats import hashutil
from grid.formats.base32 import a2b
from grid.formats.hashutil import TaggedHasher, tagged_hash, tagged_pair_hash
from tests.vectors import name_of, section

NAMED: dict[str, Callable[..., bytes]] = {
    "block": hashutil.block_hash,
    "uri_extension": hashutil.uri_extension_hash,
    "plaintext": lambda data: tagged_hash(b"allmydata_plaintext_v1", data),
    "crypttext": lambda data: _fed(hashutil.crypttext_hasher(), data),
    "crypttext_segment": hashutil.crypttext_segment_hash,
    "plaintext_segment": lambda data: tagged_hash(b"allmydata_plaintext_segment_v1", data),
    "backupdb_dirhash": lambda data: tagged_hash(b"allmydata_backupdb_dirhash_v1", data),
    "ssk_writekey": hashutil.writekey_of_private_key,
    "ssk_pubkey_fingerprint": hashutil.fingerprint_of_public_key,
    "dirnode_child_salt": hashutil.dirnode_child_salt,
    "storage_index": hashutil.chk_storage_index,
    "ssk_readkey": hashutil.readkey_of_writekey,
    "ssk_storage_index": hashutil.ssk_storage_index,
    "ssk_write_enabler_master": lambda key: tagged_hash(b"allmydata_mutable_writekey_to_write_enabler_master_v1", key),
    "ssk_readkey_data": hashutil.datakey,
    "dirnode_child_rwcap_key": hashutil.dirnode_child_key,
    "ssk_write_enabler": hashutil.write_enabler,
    "dirnode_hmac": lambda key, data: hashutil.dirnode_mac(key, data[:16], data[16:]),
    "merkle_empty_leaf_0": hashutil.empty_leaf_hash,
    "merkle_empty_leaf_13": hashutil.empty_leaf_hash,
    "merkle_pair": hashutil.pair_hash,
}


def _fed(hasher: TaggedHasher, data: bytes) -> bytes:
    hasher.update(data)
    return hasher.digest()


@pytest.mark.parametrize("name", section("formats.json", "hashes.named"))
def test_every_named_hash_is_tahoes(name: str) -> None:
    vector: dict[str, Any] = dict(section("formats.json", "hashes.named")[name])
    expected = vector.pop("hash")
    inputs = [bytes.fromhex(value) if isinstance(value, str) else value for value in vector.values()]
    assert NAMED[name](*inputs).hex() == expected


@pytest.mark.parametrize("vector", section("formats.json", "hashes.tagged_hash"), ids=name_of)
def test_tagged_hash(vector: dict[str, Any]) -> None:
    computed = tagged_hash(bytes.fromhex(vector["tag"]), bytes.fromhex(vector["value"]))
    assert computed[: vector["truncate"]].hex() == vector["hash"]


@pytest.mark.parametrize("vector", section("formats.json", "hashes.tagged_pair_hash"), ids=name_of)
def test_tagged_pair_hash(vector: dict[str, Any]) -> None:
    computed = tagged_pair_hash(*(bytes.fromhex(vector[key]) for key in ("tag", "val1", "val2")))
    assert computed[: vector["truncate"]].hex() == vector["hash"]


@pytest.mark.parametrize("vector", section("formats.json", "convergence.keys"), ids=name_of)
def test_convergent_key_and_storage_index(vector: dict[str, Any]) -> None:
    secret, data = bytes.fromhex(vector["secret"]), bytes.fromhex(vector["data"])
    hasher = hashutil.convergence_hasher(secret, vector["k"], vector["n"], vector["segment_size"])
    key = _fed(hasher, data)[:16]
    assert key == tagged_hash(bytes.fromhex(vector["outer_tag"]), data)[:16]
    assert key.hex() == vector["key"]
    storage_index = hashutil.chk_storage_index(key)
    assert storage_index.hex() == vector["storage_index"]
    assert storage_index == a2b(vector["storage_index_b32"])


@pytest.mark.parametrize("vector", section("formats.json", "convergence.rejected"))
def test_impossible_encodings_have_no_convergent_key(vector: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="cannot encode"):
        hashutil.convergence_hasher(b"", vector["k"], vector["n"], 56)


def test_keys_of_a_mutable_file() -> None:
    keys = section("formats.json", "mutable.keys")
    writekey = hashutil.writekey_of_private_key(bytes.fromhex(keys["privkey_der"]))
    readkey = hashutil.readkey_of_writekey(writekey)
    assert writekey.hex() == keys["writekey"]
    assert readkey.hex() == keys["readkey"]
    assert hashutil.ssk_storage_index(readkey).hex() == keys["storage_index"]
    assert hashutil.fingerprint_of_public_key(bytes.fromhex(keys["pubkey_der"])).hex() == keys["fingerprint"]


def test_the_lease_chain() -> None:
    vector = section("formats.json", "leases")
    secret, si, tub = (bytes.fromhex(vector[key]) for key in ("node_secret", "storage_index", "server_tubid"))
    assert a2b(vector["node_secret_file"]) == secret
    client = hashutil.client_lease_secrets(secret)
    assert client.renew.hex() == vector["client_renewal_secret"]
    assert client.cancel.hex() == vector["client_cancel_secret"]
    file = hashutil.file_lease_secrets(secret, si)
    assert file.renew.hex() == vector["file_renewal_secret"]
    assert file.cancel.hex() == vector["file_cancel_secret"]
    bucket = hashutil.lease_secrets(secret, si, tub)
    assert bucket.renew.hex() == vector["bucket_renewal_secret"]
    assert bucket.cancel.hex() == vector["bucket_cancel_secret"]
    enabler = vector["write_enabler"]
    assert hashutil.write_enabler(bytes.fromhex(enabler["writekey"]), tub).hex() == enabler["per_server"]


@pytest.mark.parametrize("vector", section("storage.json", "hash.lease_derivation"))
def test_the_lease_chain_as_a_server_sees_it(vector: dict[str, str]) -> None:
    secret, si, tub = (bytes.fromhex(vector[key]) for key in ("private_secret", "si", "tubid"))
    bucket = hashutil.lease_secrets(secret, si, tub)
    assert (bucket.renew.hex(), bucket.cancel.hex()) == (vector["bucket_renew"], vector["bucket_cancel"])


@pytest.mark.parametrize("vector", section("storage.json", "hash.write_enabler"))
def test_write_enablers_as_a_server_sees_them(vector: dict[str, str]) -> None:
    writekey, tub = bytes.fromhex(vector["writekey"]), bytes.fromhex(vector["tubid"])
    assert hashutil.write_enabler(writekey, tub).hex() == vector["write_enabler"]


@pytest.mark.parametrize("vector", section("formats.json", "permuted.orders"), ids=name_of)
def test_permuted_order(vector: dict[str, Any]) -> None:
    si = bytes.fromhex(vector["storage_index"])
    keys = [hashutil.permuted_key(si, bytes.fromhex(seed)) for seed in vector["seeds"]]
    assert [key.hex() for key in keys] == vector["permuted_hashes"]
    assert sorted(range(len(keys)), key=keys.__getitem__) == vector["order"]


@given(st.lists(st.binary(max_size=100), max_size=8))
def test_hashers_do_not_care_how_data_are_cut(pieces: list[bytes]) -> None:
    hasher = TaggedHasher(b"tag")
    for piece in pieces:
        hasher.update(memoryview(piece))
        hasher.digest()  # asking in the middle changes nothing
    assert hasher.digest() == tagged_hash(b"tag", b"".join(pieces))


@given(st.binary(max_size=64), st.binary(max_size=64))
def test_salt_and_block_hash_as_if_joined(salt: bytes, block: bytes) -> None:
    assert hashutil.salted_block_hash(memoryview(salt), memoryview(block)) == hashutil.block_hash(salt + block)


def test_a_hasher_from_a_copy_leaves_the_original_alone() -> None:
    first = hashutil.crypttext_hasher()
    first.update(b"something")
    assert hashutil.crypttext_hasher().digest() == tagged_hash(b"allmydata_crypttext_v1", b"")


def test_lease_secrets_do_not_show() -> None:
    secrets = hashutil.lease_secrets(b"s" * 32, b"i" * 16, b"t" * 20)
    assert repr(secrets.renew) not in repr(secrets)
