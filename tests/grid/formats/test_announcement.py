"""Announcements and grid managers' certificates against Tahoe-LAFS 1.20's, and whatever a stranger may send."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from grid.crypto import BadSignatureError, SigningKey, verify_ed25519
from grid.errors import FormatError
from grid.formats import announcement as module
from grid.formats.announcement import (
    GridManagerCertificate,
    certified_until,
    from_mapping,
    parse_signed,
    sign_announcement,
)
from grid.formats.base32 import a2b, b2a
from tests.vectors import name_of, section

KEY = SigningKey.from_seed(bytes(range(32)))
SERVER_ID = f"v0-{b2a(KEY.public_bytes)}"
FURL = f"pb://{'a' * 32}@tcp:127.0.0.1:1/swissnum-of-the-server"


def certificate_permits(certificates: Any, keys: Any, server_id: str, now: float) -> bool:
    return not keys or certified_until(certificates, keys, server_id) > now


def _triple(vector: dict[str, Any], message: str, signature: str) -> tuple[bytes, bytes, bytes]:
    return bytes.fromhex(vector[message]), vector[signature].encode(), vector["key"].encode()


# --- vectors ------------------------------------------------------------------------------------------------


def test_what_tahoe_announces_we_would_announce() -> None:
    vector = section("foolscap.json", "announcement")
    key = SigningKey.from_seed(bytes.fromhex(vector["ed25519_seed_hex"]))
    assert vector["private_key_string"] == f"priv-v0-{b2a(key.seed)}"
    assert vector["public_key_string"] == f"pub-v0-{b2a(key.public_bytes)}"
    triple = _triple(vector, "msg_hex", "sig")
    assert sign_announcement(vector["ann_in"], key) == triple
    parsed = parse_signed(triple)
    assert parsed.server_id == vector["key"]
    assert (parsed.nickname, parsed.service_name, parsed.seqnum) == ("nøde", "storage", 1)
    assert str(parsed.furl) == vector["ann_in"]["anonymous-storage-FURL"]
    assert parsed.permutation_seed == b"\0"
    assert parsed.raw == vector["ann_in"]
    assert from_mapping(vector["key"], vector["ann_in"]) == parsed


def test_what_a_storage_server_announces() -> None:
    vector = section("storage.json", "announcement")
    parsed = parse_signed(_triple(vector, "message_hex", "signature"))
    assert parsed.permutation_seed.hex() == vector["permutation_seed_bytes_hex"]
    assert parsed.nurls == tuple(json.loads(vector["message_utf8"])["anonymous-storage-NURLs"])
    shown = repr(parsed)
    assert parsed.furl is not None
    assert parsed.nurls[0] not in shown
    assert str(parsed.furl) not in shown


@pytest.mark.parametrize("vector", section("formats.json", "permuted.announcements"), ids=name_of)
def test_permutation_seeds_and_names(vector: dict[str, Any]) -> None:
    parsed = from_mapping(vector["server_id"], vector["announcement"] | {"anonymous-storage-FURL": vector["furl"]})
    assert parsed.permutation_seed.hex() == vector["permutation_seed"]
    assert parsed.furl is not None
    assert parsed.furl.tub_id_bytes.hex() == vector["tubid"]
    assert (parsed.short_name, parsed.server_id) == (vector["short_name"], vector["long_name"])


# --- signatures ---------------------------------------------------------------------------------------------


def test_a_changed_announcement_is_not_the_servers() -> None:
    message, signature, key = sign_announcement({"service-name": "storage", "nickname": "n"}, KEY)
    other = sign_announcement({}, SigningKey.generate())
    for triple in ((message + b" ", signature, key), (message, other[1], key), (message, signature, other[2])):
        with pytest.raises(BadSignatureError):
            parse_signed(triple)


@pytest.mark.parametrize(
    "damage",
    [
        lambda m, s, k: (m, s),
        lambda m, s, k: (m, s, None),
        lambda m, s, k: (m.decode(), s, k),
        lambda m, s, k: {m, s, k},
        lambda m, s, k: (m, s, k[3:]),
        lambda m, s, k: (m, b"v1-" + s[3:], k),
        lambda m, s, k: (m, s, k + b"\n"),
        lambda m, s, k: (m, s, k.upper()),
        lambda m, s, k: (m, s, "v0-é".encode()),
        lambda m, s, k: (m, s[:-1], k),
    ],
)
def test_what_is_no_signed_announcement(damage: Any) -> None:
    with pytest.raises(FormatError):
        parse_signed(damage(*sign_announcement({}, KEY)))


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"[]",
        b"null",
        b"{",
        b"\xff",
        b'{"nickname": "\\ud800"}',
        b'{"x":' + b"[" * 400 + b"]" * 400 + b"}" + b"[" * 200,
        b'{"x":' + b"[" * 60_000,
        b'{"x":' + b"9" * 60_000 + b"}",
        b" " * (module.MESSAGE_BYTES_MAX + 1) + b"{}",
        b'{"service-name": 5}',
        b'{"anonymous-storage-FURL": "http://x"}',
        b'{"anonymous-storage-FURL": 7}',
        b'{"permutation-seed-base32": "A"}',
        b'{"permutation-seed-base32": []}',
        b'{"permutation-seed-base32": "' + b"a" * 8 * 100 + b'"}',
    ],
)
def test_signed_nonsense_is_still_nonsense(message: bytes) -> None:
    signature = f"v0-{b2a(KEY.sign(message))}".encode()
    with pytest.raises(FormatError) as caught:
        parse_signed((message, signature, SERVER_ID.encode()))
    assert not isinstance(caught.value, BadSignatureError)


def test_what_is_merely_odd_is_dropped() -> None:
    good = {"certificate": "{}", "signature": "aa"}
    parsed = from_mapping(
        SERVER_ID,
        {
            "nickname": "a\x1b[31m\n" + "x" * 1000,
            "anonymous-storage-FURL": FURL,
            "anonymous-storage-NURLs": [7, "n" * 2000, *(f"pb://{i}" for i in range(50))],
            "seqnum": True,
            "grid-manager-certificates": ["x", {}, good, good | {"signature": "A"}, good | {"certificate": "x" * 3000}],
        },
    )
    assert parsed.nickname.startswith("a?[31m?xxx")
    assert len(parsed.nickname) == module.NICKNAME_CHARS_MAX
    assert parsed.nurls == tuple(f"pb://{i}" for i in range(module.NURLS_MAX))
    assert parsed.seqnum is None
    assert parsed.grid_manager_certificates == (GridManagerCertificate("{}", b"\0"),)


@pytest.mark.parametrize("server_id", ["", "x" * 200, "a\nb"])
def test_server_ids_are_short_and_printable(server_id: str) -> None:
    with pytest.raises(FormatError):
        from_mapping(server_id, {})


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
_fields = st.sampled_from(
    [
        "service-name",
        "nickname",
        "seqnum",
        "anonymous-storage-FURL",
        "anonymous-storage-NURLs",
        "permutation-seed-base32",
        "grid-manager-certificates",
    ]
)


@given(st.dictionaries(_fields, _json, max_size=4))
def test_any_signed_json_raises_the_named_error_only(ann: dict[str, Any]) -> None:
    try:
        parsed = parse_signed(sign_announcement(ann, KEY))
    except FormatError:
        return
    assert parsed.server_id == SERVER_ID
    assert parsed.nickname.isprintable()
    certificate_permits(parsed.grid_manager_certificates, [KEY.public_bytes], SERVER_ID, 0.0)


@given(st.binary(max_size=80), st.binary(max_size=80), st.binary(max_size=60))
def test_any_bytes_raise_the_named_error_only(message: bytes, signature: bytes, key: bytes) -> None:
    with pytest.raises(FormatError):
        parse_signed((message, signature, key))


# --- grid managers ------------------------------------------------------------------------------------------

MANAGER = section("storage.json", "grid_manager")
CERTIFICATE = GridManagerCertificate(
    MANAGER["certificate_file"]["certificate"], a2b(MANAGER["certificate_file"]["signature"])
)
MANAGER_KEY = a2b(MANAGER["manager_public"].removeprefix("pub-v0-"))
MANAGED = MANAGER["server_public"].removeprefix("pub-")
EXPIRES = datetime(2026, 1, 31, 12, tzinfo=UTC).timestamp()
OTHER_KEY = KEY.public_bytes
CHECKS: dict[str, tuple[list[bytes], str, float]] = {
    "right manager key, right server, in time": ([MANAGER_KEY], MANAGED, EXPIRES - 1),
    "expired": ([MANAGER_KEY], MANAGED, EXPIRES),
    "other manager key": ([OTHER_KEY], MANAGED, EXPIRES - 1),
    "two keys, one right": ([OTHER_KEY, MANAGER_KEY], MANAGED, EXPIRES - 1),
    "other server key": ([MANAGER_KEY], SERVER_ID, EXPIRES - 1),
    "no manager keys configured": ([], MANAGED, EXPIRES + 1),
}


def test_a_grid_managers_certificate() -> None:
    assert CERTIFICATE.certificate.encode().hex() == MANAGER["signed_bytes_hex"]
    assert CERTIFICATE.signature.hex() == MANAGER["signature_hex"]
    verify_ed25519(MANAGER_KEY, CERTIFICATE.signature, CERTIFICATE.certificate.encode())
    manager = SigningKey.from_seed(a2b(MANAGER["manager_private"].removeprefix("priv-v0-")))
    assert manager.public_bytes == MANAGER_KEY
    assert manager.sign(CERTIFICATE.certificate.encode()) == CERTIFICATE.signature


@pytest.mark.parametrize("check", MANAGER["checks"], ids=name_of)
def test_who_may_be_uploaded_to(check: dict[str, Any]) -> None:
    keys, server_id, now = CHECKS[check["what"]]
    assert certificate_permits([CERTIFICATE], keys, server_id, now) is check["result"]


def test_no_certificate_no_upload() -> None:
    assert not certificate_permits([], [MANAGER_KEY], MANAGED, 0)
    assert certificate_permits([], [], MANAGED, 0)


def test_a_certificate_arrives_in_its_announcement() -> None:
    parsed = from_mapping(MANAGED, {"grid-manager-certificates": [{}, MANAGER["certificate_file"]]})
    assert certificate_permits(parsed.grid_manager_certificates, [MANAGER_KEY], MANAGED, EXPIRES - 1)


def _signed_certificate(text: str) -> GridManagerCertificate:
    return GridManagerCertificate(text, KEY.sign(text.encode()))


@pytest.mark.parametrize(
    ("expires", "permitted"),
    [
        ("1970-01-01T00:01:40+00:00", True),
        ("1970-01-01T00:00:10+00:00", False),
        ("1970-01-01T00:01:40", True),
        ("1970-01-01T00:01:40+01:00", False),
        ("1969-12-31T23:01:40-01:00", True),
        ("0001-01-01T00:00:00+23:59", False),
        ("9999-12-31T23:59:59-23:59", True),
        ("never", False),
        (10**12, False),
        (None, False),
    ],
)
def test_times_of_expiry(expires: object, permitted: bool) -> None:
    certificate = _signed_certificate(json.dumps({"expires": expires, "public_key": f"pub-{MANAGED}", "version": 1}))
    assert certificate_permits([certificate], [KEY.public_bytes], MANAGED, timedelta(seconds=50).total_seconds()) is (
        permitted
    )


@given(st.text(max_size=60) | _json.map(json.dumps) | st.fixed_dictionaries({"expires": _json}).map(json.dumps))
@example('{"public_key": [')
def test_a_managers_nonsense_permits_nothing(text: str) -> None:
    try:
        certificate = _signed_certificate(text)
    except UnicodeEncodeError:
        return
    assert not certificate_permits([certificate], [KEY.public_bytes], MANAGED, 0)
