"""AES-CTR, RSA-PSS, Ed25519 and tub identities, against Tahoe-LAFS 1.20's and Foolscap's own bytes."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grid.crypto import (
    AESCTRStream,
    BadSignatureError,
    RSAPrivateKey,
    RSAPublicKey,
    SigningKey,
    aes_ctr,
    generate_rsa_key,
    load_tub_identity,
    make_tub_identity,
    one_time_code,
    seal,
    tub_id_of_certificate,
    verify_ed25519,
)
from grid.errors import FormatError
from tests.vectors import name_of, section

KEY = bytes(range(16))


# --- AES ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vector", section("formats.json", "aes_ctr"), ids=name_of)
def test_aes_ctr(vector: dict[str, Any]) -> None:
    # An initial counter is an offset: the last one, from which the counter wraps to zero, is a huge offset.
    offset = vector["offset"] if "offset" in vector else 16 * int(vector["iv"], 16)
    key, plaintext, ciphertext = (bytes.fromhex(vector[field]) for field in ("key", "plaintext", "ciphertext"))
    assert aes_ctr(key, plaintext, offset) == ciphertext
    assert aes_ctr(key, memoryview(ciphertext), offset) == plaintext


@given(st.lists(st.binary(max_size=50), max_size=6), st.integers(0, 100))
def test_a_stream_does_not_care_how_data_are_cut(pieces: list[bytes], offset: int) -> None:
    stream, into = AESCTRStream(KEY, offset), AESCTRStream(KEY, offset)
    whole = aes_ctr(KEY, bytes(offset) + b"".join(pieces))[offset:]
    buffer = bytearray(50)
    assert b"".join(stream.update(piece) for piece in pieces) == whole
    assert b"".join(bytes(buffer[: into.update_into(piece, buffer)]) for piece in pieces) == whole


@pytest.mark.parametrize("length", [0, 15, 17, 24, 32])
def test_only_aes_128(length: int) -> None:
    with pytest.raises(ValueError, match="16 bytes"):
        aes_ctr(bytes(length), b"data")


# --- RSA ----------------------------------------------------------------------------------------------------


@cache
def _keys() -> dict[str, Any]:
    keys: dict[str, Any] = section("formats.json", "mutable.keys")
    return keys


def test_a_mutable_files_keys() -> None:
    private_der = bytes.fromhex(_keys()["privkey_der"])
    assert aes_ctr(bytes.fromhex(_keys()["writekey"]), bytes.fromhex(_keys()["encrypted_privkey"])) == private_der
    for trusted in (False, True):
        assert RSAPrivateKey.from_der(private_der, trusted=trusted).public_der.hex() == _keys()["pubkey_der"]


def test_signatures() -> None:
    sample = _keys()["sample_signature"]
    message, signature = bytes.fromhex(sample["message"]), bytes.fromhex(sample["signature"])
    public = RSAPublicKey.from_der(bytes.fromhex(_keys()["pubkey_der"]))
    public.verify_pss(signature, message)
    private = RSAPrivateKey.from_der(bytes.fromhex(_keys()["privkey_der"]), trusted=True)
    ours = private.sign_pss(message)
    assert len(ours) == 256
    public.verify_pss(ours, message)
    for bad_signature, bad_message in ((signature, message + b"x"), (signature[:-1], message), (b"", message)):
        with pytest.raises(BadSignatureError):
            public.verify_pss(bad_signature, bad_message)


def test_a_new_key_is_what_tahoe_accepts() -> None:
    der = generate_rsa_key()
    private = RSAPrivateKey.from_der(der)
    assert len(der) in range(1210, 1225)
    assert len(private.public_der) == 294
    RSAPublicKey.from_der(private.public_der).verify_pss(private.sign_pss(b"m"), b"m")


def test_keys_of_another_kind_or_size_are_refused() -> None:
    from cryptography.hazmat.primitives.asymmetric import ec, rsa
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

    for key in (rsa.generate_private_key(65537, 1024), ec.generate_private_key(ec.SECP256R1())):
        with pytest.raises(FormatError, match="2048"):
            RSAPrivateKey.from_der(key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption()))
        public = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        with pytest.raises(FormatError, match="2048"):
            RSAPublicKey.from_der(public)


@settings(max_examples=60)
@given(st.integers(0, 293), st.integers(0, 255), st.integers(0, 294))
def test_damaged_keys_raise_the_named_error_only(position: int, byte: int, length: int) -> None:
    for loader, name in ((RSAPublicKey.from_der, "pubkey_der"), (RSAPrivateKey.from_der, "privkey_der")):
        der = bytearray(bytes.fromhex(_keys()[name]))
        der[position] = byte
        for damaged in (bytes(der), bytes(der[:length])):
            try:
                loader(damaged)
            except FormatError as error:
                assert len(str(error)) < 60  # so it cannot hold the key


# --- Ed25519 ------------------------------------------------------------------------------------------------


def test_ed25519() -> None:
    vector = section("foolscap.json", "announcement")
    key = SigningKey.from_seed(bytes.fromhex(vector["ed25519_seed_hex"]))
    signature = key.sign(b"data")
    verify_ed25519(key.public_bytes, signature, b"data")
    assert SigningKey.from_seed(key.seed).sign(b"data") == signature
    for public, sig, data in (
        (key.public_bytes, signature, b"other"),
        (SigningKey.generate().public_bytes, signature, b"data"),
        (key.public_bytes, b"", b"data"),
        (b"short", signature, b"data"),
    ):
        with pytest.raises(BadSignatureError):
            verify_ed25519(public, sig, data)
    with pytest.raises(FormatError):
        SigningKey.from_seed(b"short")


# --- tub identities -----------------------------------------------------------------------------------------

CERTIFICATES = section("storage.json", "certs")


def test_foolscaps_own_identity() -> None:
    vector = section("foolscap.json", "identity")
    identity = load_tub_identity(vector["pem"].encode())
    assert identity.tub_id == vector["tubid"]
    assert identity.certificate_der.hex() == vector["der_hex"]
    assert identity.pem == vector["pem"].encode()


def test_one_time_code() -> None:
    """The first is test case 13 of the paper that describes GCM."""
    assert one_time_code(bytes(32), b"").hex() == "530f8afbc74536b9a963b4f1c4cb738b"
    key, message = bytes(range(32)), bytes(range(256)) * 5
    assert one_time_code(key, message) == seal(key, bytes(12), b"", message)[12:]
    assert one_time_code(key, message) != one_time_code(key, message + b"\0") != one_time_code(bytes(32), message)
    with pytest.raises(ValueError, match="32"):
        one_time_code(bytes(16), message)


@pytest.mark.parametrize("name", CERTIFICATES)
def test_expired_and_other_keys_load(name: str) -> None:
    vector = CERTIFICATES[name]
    assert tub_id_of_certificate(bytes.fromhex(vector["cert_der_hex"])) == vector["tubid_sha1_of_cert_b32"]
    if "PRIVATE KEY" in vector["pem"]:
        assert load_tub_identity(vector["pem"].encode()).tub_id == vector["tubid_sha1_of_cert_b32"]


def test_identities_we_make() -> None:
    one, other = make_tub_identity(), make_tub_identity()
    assert one.tub_id != other.tub_id
    assert len(one.tub_id) == 32
    assert load_tub_identity(one.pem) == one
    assert "PRIVATE KEY" not in repr(one)
    with pytest.raises(FormatError, match="not its certificate's"):
        load_tub_identity(one.certificate_pem + other.private_key_pem)
    with pytest.raises(FormatError, match="no private key"):
        load_tub_identity(one.certificate_pem)
    with pytest.raises(FormatError):
        load_tub_identity(one.private_key_pem)


@settings(max_examples=60)
@given(st.integers(0, 500), st.integers(0, 255))
def test_damaged_pem_raises_the_named_error_only(position: int, byte: int) -> None:
    pem = bytearray(_pem())
    pem[position % len(pem)] = byte
    try:
        load_tub_identity(bytes(pem))
    except FormatError as error:
        assert "BEGIN" not in str(error)


@cache
def _pem() -> bytes:
    return make_tub_identity().pem
