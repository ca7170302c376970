"""Share containers: every file a real server wrote is read, and written again byte for byte."""

from __future__ import annotations

from base64 import b64decode
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grid.errors import FormatError
from grid.formats import base32, container
from grid.formats.container import ImmutableHeader, Lease, MutableHeader
from tests.vectors import load, name_of, section

VECTORS = section("storage.json", "containers")
IMMUTABLE = [vector for vector in VECTORS if vector["type"] == "immutable"]
MUTABLE = [vector for vector in VECTORS if vector["type"] == "mutable"]


def shown(secret: bytes, version: int) -> str:
    return ("hash:" if version == 2 else "") + base32.b2a(secret)


def check_leases(vector: dict[str, Any], leases: list[Lease]) -> None:
    assert [
        {
            "owner": lease.owner,
            "expires": lease.expires,
            "renew_shown": shown(lease.renew, vector["version"]),
            "cancel_shown": shown(lease.cancel, vector["version"]),
            **({"nodeid": lease.node_id.hex()} if vector["type"] == "mutable" else {}),
        }
        for lease in leases
    ] == vector["leases"]


@pytest.mark.parametrize("vector", IMMUTABLE, ids=name_of)
def test_immutable_containers(vector: dict[str, Any]) -> None:
    file = b64decode(vector["file_b64"])
    assert len(file) == vector["size"]
    header = ImmutableHeader.parse(file[:12], len(file))
    assert (header.version, header.lease_count) == (vector["version"], len(vector["leases"]))
    data_bytes = header.data_bytes(len(file))
    data = file[12 : 12 + data_bytes]
    assert data == b64decode(vector["data_b64"])
    leases = container.unpack_immutable_leases(file[container.immutable_lease_offset(data_bytes, 0) :])
    check_leases(vector, leases)
    again = container.pack_immutable_header(data_bytes, len(leases), header.version) + data
    assert again + b"".join(map(container.pack_immutable_lease, leases)) == file
    assert container.kind_of(file[:32]) == "immutable"


@pytest.mark.parametrize("vector", MUTABLE, ids=name_of)
def test_mutable_containers(vector: dict[str, Any]) -> None:
    file = b64decode(vector["file_b64"])
    header = MutableHeader.parse(file[:468], len(file))
    assert (header.version, header.data_bytes) == (vector["version"], vector["data_length"])
    assert header.extra_offset == vector["extra_lease_offset"]
    assert header.node_id.hex() == load("storage.json")["fixed"]["nodeid_hex"]
    assert header.write_enabler.hex() == load("storage.json")["fixed"]["write_enabler"]
    assert file[468 : 468 + header.data_bytes] == b64decode(vector["data_b64"])
    size = container.extra_block_bytes(file[header.extra_offset : header.extra_offset + 4], header, len(file))
    block = file[header.extra_offset : header.extra_offset + size]
    extra = container.unpack_extra_leases(block)
    assert len(extra) == vector["extra_lease_count"]
    check_leases(vector, [lease for lease in [*header.slots, *extra] if lease.owner])
    assert container.pack_mutable_header(header) == file[:468]
    assert container.pack_extra_leases(extra) == block
    assert container.kind_of(file[:32]) == "mutable"


def test_a_fresh_mutable_share_is_what_a_real_server_makes() -> None:
    fixed = load("storage.json")["fixed"]
    header = container.fresh_mutable_header(bytes.fromhex(fixed["nodeid_hex"]), bytes.fromhex(fixed["write_enabler"]))
    (vector,) = section("storage.json", "containers", name="mut-v2-fresh")
    assert container.pack_mutable_header(header) + container.pack_extra_leases([]) == b64decode(vector["file_b64"])


def test_magics() -> None:
    magics = section("storage.json", "magic")
    assert {version: magic.hex() for version, magic in container.MAGICS.items()} == {
        1: magics["mutable_v1"],
        2: magics["mutable_v2"],
    }


@pytest.mark.parametrize("vector", section("storage.json", "truncated_length_field"))
def test_the_length_field_is_saturated(vector: dict[str, Any]) -> None:
    assert container.pack_immutable_header(vector["max_size"], 0).hex() == vector["header"]


@pytest.mark.parametrize("vector", section("storage.json", "hash.blake2b_lease_secret"))
def test_stored_secrets(vector: dict[str, str]) -> None:
    secret = bytes.fromhex(vector["secret"])
    assert container.stored_secret(2, secret).hex() == vector["stored"]
    assert container.stored_secret(1, secret) == secret


def test_expiry_times_are_cut_to_32_bits() -> None:
    lease = container.make_lease(2, 1, b"r" * 32, b"c" * 32, 1 << 40)
    assert lease.expires == 0xFFFFFFFF
    assert "renew" not in repr(lease)


def test_broken_containers_are_refused() -> None:
    header = container.pack_immutable_header(0, 2)
    assert ImmutableHeader.parse(header, 12 + 144).data_bytes(12 + 144) == 0
    with pytest.raises(FormatError, match="more leases"):
        ImmutableHeader.parse(header, 12 + 143)
    with pytest.raises(container.UnknownContainerError):
        ImmutableHeader.parse(b"\0\0\0\3" + bytes(8), 100)
    with pytest.raises(container.UnknownContainerError):
        MutableHeader.parse(container.MAGICS[2], 32)
    fresh = container.pack_mutable_header(container.fresh_mutable_header(bytes(20), bytes(32)))
    with pytest.raises(FormatError, match="lengths"):
        MutableHeader.parse(fresh[:84] + container.pack_mutable_lengths(1, 468) + fresh[100:], 472)
    with pytest.raises(FormatError, match="lengths"):
        MutableHeader.parse(fresh, 471)
    mutable = MutableHeader.parse(fresh, 472)
    for count_field in (b"\0\0\0\1", b"\xff\xff\xff\xff", b"\0\0"):
        with pytest.raises(FormatError):
            container.extra_block_bytes(count_field, mutable, 472)


@given(st.binary(max_size=600), st.integers(0, 1 << 64), st.booleans())
def test_only_format_errors_escape(data: bytes, file_bytes: int, with_magic: bool) -> None:
    if with_magic:
        data = container.MAGICS[2] + data
    for parse in (ImmutableHeader.parse, MutableHeader.parse):
        try:
            header = parse(data, file_bytes)
        except FormatError:
            continue
        if isinstance(header, ImmutableHeader):
            assert header.data_bytes(file_bytes) >= 0
        else:
            assert 468 + header.data_bytes <= header.extra_offset < file_bytes
    assert container.kind_of(data) in ("immutable", "mutable", None)
