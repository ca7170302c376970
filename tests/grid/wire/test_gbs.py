"""NURLs, headers, paths and CBOR of the HTTP storage protocol: golden vectors, round trips, and garbage."""

from __future__ import annotations

import hashlib
from typing import Any

import cbor2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grid.crypto import spki_hash_of_certificate
from grid.errors import FormatError
from grid.interfaces import SlotWrite, TestVector
from grid.wire import cbor, gbs, gbs_bodies
from grid.wire.gbs import Nurl, Secret
from tests.vectors import section

NURLS = section("storage.json", "nurl")
CERTS = section("storage.json", "certs")
HASH = "lnKitn7D4faC5sIe72d45Zur-i1u1aPxEHuZkUbOMSc"
SI = bytes(range(16))


# --- NURLs, secrets, paths ----------------------------------------------------------------------------------


@pytest.mark.parametrize("vector", NURLS, ids=lambda vector: vector["nurl"][-30:])
def test_nurls_are_read_and_written_as_tahoe_does(vector: dict[str, Any]) -> None:
    nurl = Nurl.parse(vector["nurl"])
    assert (nurl.host, nurl.port, nurl.swissnum) == (vector["host"], vector["port"], vector["swissnum"])
    assert nurl.tor == vector["host"].endswith(".onion")
    assert nurl.spki_hash.hex() == CERTS[vector["key"]]["spki_sha256"]
    assert str(nurl) == vector["nurl"]
    assert "swissnum" not in repr(nurl)


@pytest.mark.parametrize("name", CERTS)
def test_the_hash_is_that_of_the_public_key_info(name: str) -> None:
    found = spki_hash_of_certificate(bytes.fromhex(CERTS[name]["cert_der_hex"]))
    assert found.hex() == CERTS[name]["spki_sha256"]
    assert found == hashlib.sha256(bytes.fromhex(CERTS[name]["spki_der_hex"])).digest()


@pytest.mark.parametrize(
    "text",
    [
        "",
        f"pb://{HASH}@host:1/abc",  # a FURL
        f"pb://{HASH}@host:1/abc#v=2",
        f"pb://{HASH}@host:1/abc#v=2#v=1",
        f"pb://{HASH}@host:1/a/b#v=1",
        f"pb://{HASH}@host:1/#v=1",
        f"pb://{HASH}@host:0/abc#v=1",
        f"pb://{HASH}@host:65536/abc#v=1",
        f"pb://{HASH}@tcp:host:1/abc#v=1",
        f"pb://{HASH[:-1]}@host:1/abc#v=1",
        f"pb://{HASH[:-1]}d@host:1/abc#v=1",  # stray bits
        f"http://{HASH}@host:1/abc#v=1",
        f"pb://{HASH}@ho\nst:1/abc#v=1",
        f"pb://{HASH}@host:1/a\u00e9#v=1",
        f"pb://{HASH}@host:1/{'a' * 2000}#v=1",
    ],
)
def test_what_is_no_nurl(text: str) -> None:
    with pytest.raises(FormatError) as refused:
        Nurl.parse(text)
    assert "abc" not in str(refused.value)


def test_only_nurls_we_can_dial_are_used() -> None:
    six = f"pb://{HASH}@[::1]:7/s#v=1"
    assert Nurl.parse(six).host == "::1" and str(Nurl.parse(six)) == six
    found = gbs.usable_nurls(["nonsense", f"pb+tor://{HASH}@a.onion:1/s#v=1", six])
    assert found == [Nurl.parse(six)]


@pytest.mark.parametrize("vector", section("storage.json", "auth"))
def test_the_authorization_header(vector: dict[str, str]) -> None:
    header = vector["header"].encode()
    assert gbs.authorization(vector["swissnum"]) == header
    assert gbs.is_authorized([(b"accept", b"x"), (b"authorization", header)], vector["swissnum"])
    for wrong in ([], [(b"authorization", header + b" ")], [(b"authorization", header)] * 2):
        assert not gbs.is_authorized(wrong, vector["swissnum"])


def test_secrets_in_headers() -> None:
    secrets = {Secret.LEASE_RENEW: b"r" * 32, Secret.LEASE_CANCEL: b"c" * 32, Secret.UPLOAD: b"\xff"}
    headers = gbs.secret_headers(secrets)
    assert gbs.read_secrets(headers[::-1], secrets) == secrets
    assert gbs.read_secrets([(b"host", b"x")], ()) == {}
    repeated = [*gbs.secret_headers({Secret.UPLOAD: b"first"}), *headers]
    assert gbs.read_secrets(repeated, secrets)[Secret.UPLOAD] == b"\xff"  # the last one counts


@pytest.mark.parametrize(
    ("line", "needed"),
    [
        (b"upload-secret", Secret.UPLOAD),
        (b"upload-secret ", Secret.UPLOAD),
        (b"upload-secret ====", Secret.UPLOAD),
        (b"upload-secret YWJj YQ", Secret.UPLOAD),
        (b"Upload-Secret YWJj", Secret.UPLOAD),
        (b"other-secret YWJj", Secret.UPLOAD),
        (b"lease-renew-secret YWJj", Secret.LEASE_RENEW),
        (b"write-enabler YWJj", Secret.UPLOAD),
        (b"", Secret.UPLOAD),
    ],
)
def test_secrets_that_are_refused(line: bytes, needed: Secret) -> None:
    good = gbs.secret_headers({needed: b"s" * 32})
    assert gbs.read_secrets(good, {needed})
    with pytest.raises(FormatError):
        gbs.read_secrets([*good, (b"x-tahoe-authorization", line)], {needed})


@given(st.sampled_from(["immutable", "mutable"]), st.binary(min_size=16, max_size=16), st.integers(0, 255))
def test_every_path_we_ask_for_is_one_we_answer(kind: str, si: bytes, number: int) -> None:
    route = gbs.find_route(b"GET", gbs.path(kind, si, number))
    assert (route.name, route.kind, route.storage_index, route.number) == ("read", kind, si, number)
    assert gbs.find_route(b"POST", gbs.path(kind, si, number, "corrupt")).name == "corrupt"
    assert gbs.find_route(b"GET", gbs.path(kind, si, "shares")).name == "list"
    assert gbs.find_route(b"GET", gbs.path("lease", si)) == gbs.Route(None, allowed=(b"PUT",))


@given(st.binary(max_size=80) | st.binary(max_size=40).map(lambda tail: gbs.path("immutable", SI)[:-3] + tail))
def test_no_path_breaks_the_routes(target: bytes) -> None:
    assert gbs.find_route(b"GET", target).name in (None, "version", "list", "read")


@given(st.integers(0, 1 << 60), st.integers(1, 1 << 60))
def test_ranges_there_and_back(offset: int, length: int) -> None:
    assert gbs.read_range(gbs.range_header(offset, length)) == (offset, length)
    assert gbs.read_content_range(gbs.content_range_header(offset, length)) == (offset, length)


@given(st.binary(max_size=40))
def test_garbage_is_no_range(value: bytes) -> None:
    for read in (gbs.read_range, gbs.read_content_range):
        for text in (value, b"bytes=" + value, b"bytes " + value):
            try:
                offset, length = read(text)
            except FormatError:
                continue
            assert offset >= 0 and length > 0


# --- CBOR ---------------------------------------------------------------------------------------------------

values = st.recursive(
    st.none() | st.booleans() | st.integers(0, cbor.NUMBER_MAX) | st.binary(max_size=40) | st.text(max_size=20),
    lambda children: (
        st.lists(children, max_size=6)
        | st.dictionaries(st.integers(0, 300) | st.text(max_size=5) | st.binary(max_size=5), children, max_size=5)
        | st.frozensets(st.integers(0, 1 << 40), max_size=6)
    ),
    max_leaves=15,
)


def plain(value: Any) -> Any:
    """What our decoder gives, as cbor2 would give it."""
    if isinstance(value, memoryview):
        return bytes(value)
    if isinstance(value, cbor.TaggedSet):
        return set(value.items)
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return value


@given(values)
def test_cbor_agrees_with_another_implementation(value: Any) -> None:
    encoded = b"".join(cbor.encode(value))
    assert cbor2.loads(encoded) == value
    assert plain(cbor.decode(encoded)) == value
    assert plain(cbor.decode(cbor2.dumps(value, canonical=True))) == value


def test_long_byte_strings_are_not_copied() -> None:
    data = bytes(100_000)
    buffers = cbor.encode({"a": [data, b"x"]})
    assert any(buffer is data for buffer in buffers)
    assert plain(cbor.decode(b"".join(buffers))) == {"a": [data, b"x"]}


@pytest.mark.parametrize(
    ("encoded", "value"),
    [
        ("9f0102ff", [1, 2]),
        ("bf6161 01 ff", {"a": 1}),
        ("5f4101 4102ff", b"\1\2"),
        ("7f6161 6162ff", "ab"),
        ("80ffff", []),  # what follows the first item is not looked at
        ("d9010283010101", {1}),
        ("1b0000000000000001", 1),
    ],
)
def test_other_spellings_are_read(encoded: str, value: Any) -> None:
    assert plain(cbor.decode(bytes.fromhex(encoded))) == value


@pytest.mark.parametrize(
    "encoded",
    [
        "",
        "20",  # negative
        "f90000",  # a float
        "c24101",  # a big number
        "d8234161",  # a regular expression
        "d9010201",  # a set that is no array
        "d90102d9010280",
        "9bffffffffffffffff",
        "5bffffffffffffffff00",
        "bf01ff",
        "9f",
        "5f5f4100ffff",
        "5f6161ff",
        "61ff",  # not UTF-8
        "1c",
        "f7",
        "ff",
        "a18001",  # an array as key
        "81" * 20 + "00",
    ],
)
def test_cbor_that_is_refused(encoded: str) -> None:
    with pytest.raises(FormatError):
        cbor.decode(bytes.fromhex(encoded))


def test_what_a_message_may_build_is_bounded() -> None:
    with pytest.raises(FormatError):
        cbor.decode(b"\x9f" + b"\x80" * (cbor.ITEMS_MAX + 1) + b"\xff")
    with pytest.raises(FormatError):
        cbor.decode(b"\x9f" + b"\x80" * 11 + b"\xff", items_max=10)
    colliding = ((1 << 61) - 1 for _ in range(cbor.MAP_ENTRIES_MAX + 1))
    body = b"".join(b"\x1b" + (number * i % cbor.NUMBER_MAX).to_bytes(8) + b"\0" for i, number in enumerate(colliding))
    with pytest.raises(FormatError):
        cbor.decode(b"\xbf" + body + b"\xff")


READERS = [
    gbs_bodies.read_version,
    gbs_bodies.read_allocate_request,
    gbs_bodies.read_allocate_answer,
    gbs_bodies.read_share_numbers,
    gbs_bodies.read_corrupt_request,
    gbs_bodies.read_read_test_write_request,
    lambda body: gbs_bodies.read_read_test_write_answer(body, [(0, 5)]),
]


@settings(max_examples=300)
@given(st.binary(max_size=60) | values.map(lambda value: b"".join(cbor.encode(value))), st.sampled_from(READERS))
def test_only_the_named_error_escapes(body: bytes, reader: Any) -> None:
    try:
        reader(body)
    except FormatError:
        return


@given(st.data())
def test_a_damaged_message_never_breaks_the_readers(data: st.DataObject) -> None:
    exchanges = [
        each
        for each in section("storage.json", "http.exchanges")
        if each.get("request_body") or each.get("response_body")
    ]
    exchange = data.draw(st.sampled_from(exchanges))
    body = bytearray.fromhex(exchange.get("request_body") or exchange["response_body"])
    body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    for reader in READERS:
        try:
            reader(bytes(body))  # type: ignore[no-untyped-call]
        except FormatError:
            continue


# --- bodies -------------------------------------------------------------------------------------------------


def join(buffers: Any) -> bytes:
    return b"".join(buffers)


def test_bodies_there_and_back() -> None:
    numbers = frozenset({0, 3, 255})
    assert gbs_bodies.read_allocate_request(join(gbs_bodies.allocate_request(numbers, 1 << 40))) == (numbers, 1 << 40)
    assert gbs_bodies.read_allocate_answer(join(gbs_bodies.allocate_answer(numbers, ()))) == (numbers, frozenset())
    assert gbs_bodies.read_share_numbers(join(gbs_bodies.share_numbers_answer(numbers))) == numbers
    assert gbs_bodies.read_corrupt_request(join(gbs_bodies.corrupt_request("bad \u03a9"))) == "bad \\u03a9"
    assert gbs_bodies.read_corrupt_request(join(gbs_bodies.corrupt_request(""))) == "unknown"
    longest = join(gbs_bodies.corrupt_request("\u03a9" * 100_000))
    assert len(longest) < gbs_bodies.CORRUPT_BYTES_MAX and gbs_bodies.read_corrupt_request(longest)
    writes = {7: SlotWrite([TestVector(0, 5, b"hello")], [(0, b"x" * 9), (9, b"")], None), 0: SlotWrite([], [], 0)}
    assert gbs_bodies.read_read_test_write_request(join(gbs_bodies.read_test_write_request(writes, [(1, 2)]))) == (
        writes,
        [(1, 2)],
    )
    answer = join(gbs_bodies.read_test_write_answer(True, {3: [b"ab"]}))
    assert gbs_bodies.read_read_test_write_answer(answer, [(0, 2)]) == (True, {3: [b"ab"]})
    for wrong in ([], [(0, 1)], [(0, 2), (0, 2)]):
        with pytest.raises(FormatError):
            gbs_bodies.read_read_test_write_answer(answer, wrong)


def test_the_version_has_the_features_that_are_never_sent() -> None:
    body = join(gbs_bodies.version_answer(available_space=5, maximum_mutable_share_size=6, application=b"x/1"))
    version = gbs_bodies.read_version(body)
    assert version[gbs_bodies.APPLICATION_KEY] == b"x/1"
    inner = version[gbs_bodies.VERSION_KEY]
    assert inner[b"available-space"] == inner[b"maximum-immutable-share-size"] == 5
    assert all(inner[feature] is True for feature in gbs_bodies.IMPLIED_FEATURES)
    assert not any(feature in body for feature in gbs_bodies.IMPLIED_FEATURES)


@pytest.mark.parametrize("count", [gbs_bodies.SHARES_MAX, gbs_bodies.SHARES_MAX + 1])
def test_limits_of_lists(count: int) -> None:
    body = join(gbs_bodies.share_numbers_answer(range(count)))
    if count <= gbs_bodies.SHARES_MAX:
        assert len(gbs_bodies.read_share_numbers(body)) == count
        assert len(body) <= gbs_bodies.SMALL_BYTES_MAX
    else:
        with pytest.raises(FormatError):
            gbs_bodies.read_share_numbers(body)
    reads = [(0, 1)] * (count - gbs_bodies.SHARES_MAX + gbs_bodies.READS_MAX)
    request = join(gbs_bodies.read_test_write_request({}, reads))
    if len(reads) <= gbs_bodies.READS_MAX:
        assert gbs_bodies.read_read_test_write_request(request) == ({}, reads)
    else:
        with pytest.raises(FormatError):
            gbs_bodies.read_read_test_write_request(request)
