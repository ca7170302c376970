"""All cryptography but hashing: AES-CTR, RSA and Ed25519 signatures, tub identities. The only importer of cryptography.

    AES-256-GCM   what we keep for ourselves on a local disk: nonce 12 bytes, ciphertext, tag 16 bytes
    AES-256-GMAC  a code of 16 bytes over what is ciphertext already; a key serves one message
    AES-128-CTR   the counter block is the whole 16 bytes, big-endian, from zero: every use has a key of its own
    RSA           2048 bits; private key PKCS#8 DER, public key SubjectPublicKeyInfo DER;
                  RSASSA-PSS with SHA-256, MGF1-SHA256 and 32 bytes of salt
    Ed25519       announcements and grid managers: 32-byte seed, 32-byte public key, 64-byte signature
    tub           an X.509 certificate and its key; the tub's id is base32(SHA1(certificate DER))

Source: Tahoe-LAFS 1.20's file and announcement formats; Foolscap's tub identities.
"""

from __future__ import annotations

import datetime
import re
from base64 import b32encode
from hashlib import sha1, sha256
from typing import Final, Self

from attrs import field, frozen
from cryptography import x509
from cryptography.exceptions import InvalidSignature, InvalidTag, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from grid.errors import FormatError

KEY_BYTES: Final = 16
RSA_BITS: Final = 2048
RSA_EXPONENT: Final = 65537
SIGNATURE_BYTES: Final = RSA_BITS // 8
ED25519_SEED_BYTES: Final = 32

_BLOCK_BYTES: Final = 16
_COUNTER_VALUES: Final = 1 << 128  # the counter wraps around
# Not RSA's usual choice (as much salt as fits): 1.20 writes and accepts exactly the digest's length.
_PSS: Final = padding.PSS(padding.MGF1(hashes.SHA256()), salt_length=32)


class BadSignatureError(FormatError):
    """A signature is not that key's, or not over those bytes."""


# --- AES ----------------------------------------------------------------------------------------------------


def _ctr_at(key: bytes, offset: int) -> CipherContext:
    counter, skipped = divmod(offset, _BLOCK_BYTES)
    if len(key) != KEY_BYTES:  # longer ones would silently be another cipher
        raise ValueError(f"an AES key has {KEY_BYTES} bytes")
    initial = (counter % _COUNTER_VALUES).to_bytes(_BLOCK_BYTES, "big")
    context = Cipher(algorithms.AES(key), modes.CTR(initial)).encryptor()
    if skipped:
        context.update(bytes(skipped))
    return context


def aes_ctr(key: bytes, data: bytes | bytearray | memoryview, offset: int = 0) -> bytes:
    """Encrypt, or decrypt, `data` that stand `offset` bytes into the key's stream."""
    return _ctr_at(key, offset).update(data)


class AESCTRStream:
    """The same for data that come in pieces, front to back."""

    __slots__ = ("_context",)

    def __init__(self, key: bytes, offset: int = 0) -> None:
        self._context = _ctr_at(key, offset)

    def update(self, data: bytes | bytearray | memoryview) -> bytes:
        return self._context.update(data)

    def update_into(self, data: bytes | bytearray | memoryview, buffer: bytearray | memoryview) -> int:
        """Write the result to the front of `buffer`, which is at least as long; returns its length."""
        return self._context.update_into(data, buffer)


# --- what is sealed ----------------------------------------------------------------------------------------

SEALING_KEY_BYTES: Final = 32
NONCE_BYTES: Final = 12


def seal(key: bytes, nonce: bytes, data: bytes, context: bytes) -> bytes:
    """Encrypt and authenticate `data`; `context` must be the same to open it.

    The nonce (12 bytes) is used once with this key; random ones do for 2^32 times.
    """
    return nonce + AESGCM(key).encrypt(nonce, data, context)


def unseal(key: bytes, sealed: bytes, context: bytes) -> bytes:
    """Raises FormatError when it was not sealed with this key and context, or was changed since."""
    try:
        return AESGCM(key).decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], context)
    except (InvalidTag, ValueError):
        raise FormatError("this was sealed with another key, or damaged since") from None


def one_time_code(key: bytes, message: bytes | bytearray | memoryview) -> bytes:
    """A code of 16 bytes that nobody can make without `key` (32 bytes), which must serve this message alone.

    GMAC, at a fixed nonce, which is sound for a key that is used once: some 15 times as fast as HMAC-SHA256 where the
    processor has AES instructions. The odds of a forgery are below 2^-100 a try for messages up to 256 MiB.
    """
    if len(key) != SEALING_KEY_BYTES:
        raise ValueError(f"a key for codes has {SEALING_KEY_BYTES} bytes")
    context = Cipher(algorithms.AES(key), modes.GCM(bytes(NONCE_BYTES))).encryptor()
    context.authenticate_additional_data(message)
    context.finalize()
    return context.tag


# --- RSA ----------------------------------------------------------------------------------------------------


def generate_rsa_key() -> bytes:
    """A new private key as DER. CPU-bound, some tens of milliseconds and now and then a few hundred: use a thread."""
    key = rsa.generate_private_key(public_exponent=RSA_EXPONENT, key_size=RSA_BITS)
    return key.private_bytes(
        serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


class RSAPrivateKey:
    """Signs versions of one mutable file."""

    __slots__ = ("_key",)

    def __init__(self, key: rsa.RSAPrivateKey) -> None:
        self._key = key

    @classmethod
    def from_der(cls, der: bytes, *, trusted: bool = False) -> Self:
        """Raises FormatError. `trusted` skips the slow proof that the numbers are a key: for bytes that hash to
        the writekey we hold, or that we made ourselves.
        """
        try:
            key = serialization.load_der_private_key(der, None, unsafe_skip_rsa_key_validation=trusted)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            raise FormatError("not a private key") from None
        if not isinstance(key, rsa.RSAPrivateKey) or key.key_size != RSA_BITS:
            raise FormatError(f"not an RSA private key of {RSA_BITS} bits")
        return cls(key)

    @property
    def public_der(self) -> bytes:
        return _public_der(self._key.public_key())

    def sign_pss(self, message: bytes) -> bytes:
        """256 bytes, others each time."""
        return self._key.sign(message, _PSS, hashes.SHA256())


class RSAPublicKey:
    """Verifies versions of one mutable file."""

    __slots__ = ("_key",)

    def __init__(self, key: rsa.RSAPublicKey) -> None:
        self._key = key

    @classmethod
    def from_der(cls, der: bytes) -> Self:
        """Raises FormatError."""
        try:
            key = serialization.load_der_public_key(der)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            raise FormatError("not a public key") from None
        if not isinstance(key, rsa.RSAPublicKey) or key.key_size != RSA_BITS:
            raise FormatError(f"not an RSA public key of {RSA_BITS} bits")
        return cls(key)

    def verify_pss(self, signature: bytes, message: bytes) -> None:
        """Raises BadSignatureError."""
        try:
            self._key.verify(signature, message, _PSS, hashes.SHA256())
        except InvalidSignature:
            raise BadSignatureError("bad RSA signature") from None


def _public_der(key: rsa.RSAPublicKey) -> bytes:
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


# --- Ed25519 ------------------------------------------------------------------------------------------------


class SigningKey:
    """A node's, or a grid manager's, key."""

    __slots__ = ("_key",)

    def __init__(self, key: ed25519.Ed25519PrivateKey) -> None:
        self._key = key

    @classmethod
    def from_seed(cls, seed: bytes) -> Self:
        """Raises FormatError unless there are 32 bytes."""
        if len(seed) != ED25519_SEED_BYTES:
            raise FormatError(f"an Ed25519 key is made from {ED25519_SEED_BYTES} bytes")
        return cls(ed25519.Ed25519PrivateKey.from_private_bytes(seed))

    @classmethod
    def generate(cls) -> Self:
        return cls(ed25519.Ed25519PrivateKey.generate())

    @property
    def seed(self) -> bytes:
        """The secret itself, for its file."""
        return self._key.private_bytes_raw()

    @property
    def public_bytes(self) -> bytes:
        return self._key.public_key().public_bytes_raw()

    def sign(self, data: bytes) -> bytes:
        """64 bytes, the same each time."""
        return self._key.sign(data)


def verify_ed25519(public: bytes, signature: bytes, data: bytes) -> None:
    """Raises BadSignatureError, also when `public` is no key at all."""
    try:
        ed25519.Ed25519PublicKey.from_public_bytes(public).verify(signature, data)
    except (InvalidSignature, ValueError):
        raise BadSignatureError("bad Ed25519 signature") from None


# --- tub identities -----------------------------------------------------------------------------------------

# A tub is known by the hash of its certificate; nobody looks at names and dates. Fixed ones tell nobody anything.
_TUB_NAME: Final = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "newpb_thingy")])
_NOT_BEFORE: Final = datetime.datetime(2000, 1, 1)
_NOT_AFTER: Final = datetime.datetime(2049, 12, 31)
_PEM_KEY: Final = re.compile(rb"-----BEGIN ([A-Z ]*PRIVATE KEY)-----.*?-----END \1-----\r?\n?", re.DOTALL)


@frozen
class TubIdentity:
    """One endpoint's certificate and private key, as PEM, and the id that follows from the certificate."""

    certificate_pem: bytes
    private_key_pem: bytes = field(repr=False)
    certificate_der: bytes = field(repr=False)
    tub_id: str  # 32 characters of base32

    @property
    def pem(self) -> bytes:
        """As node.pem holds it: certificate, then key."""
        return self.certificate_pem + self.private_key_pem


def spki_hash_of_certificate(der: bytes) -> bytes:
    """SHA-256 of the certificate's SubjectPublicKeyInfo, 32 bytes: who a server is over HTTP. Raises FormatError."""
    try:
        key = x509.load_der_x509_certificate(der).public_key()
        spki = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
        return sha256(spki).digest()
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise FormatError("not a certificate, or of an unknown kind") from None


def tub_id_of_certificate(der: bytes) -> str:
    # 20 bytes fill 32 characters exactly, so there is no padding to take off
    return b32encode(sha1(der, usedforsecurity=False).digest()).decode("ascii").lower()


def make_tub_identity() -> TubIdentity:
    """A fresh one: self-signed, no extensions. ECDSA: a client makes one per server, and RSA keys are slow to make."""
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = (
        x509.CertificateBuilder()
        .subject_name(_TUB_NAME)
        .issuer_name(_TUB_NAME)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(_NOT_BEFORE)
        .not_valid_after(_NOT_AFTER)
        .sign(key, hashes.SHA256())
    )
    key_pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return _identity(certificate, key_pem)


def load_tub_identity(pem: bytes) -> TubIdentity:
    """Read a node.pem. Raises FormatError; never minds an expired certificate."""
    key_pem = _PEM_KEY.search(pem)
    if key_pem is None:
        raise FormatError("no private key in the PEM file")
    try:
        certificate = x509.load_pem_x509_certificate(pem)
        key = serialization.load_pem_private_key(key_pem.group(), None)
        same_key = certificate.public_key() == key.public_key()
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise FormatError("the PEM file does not hold a certificate and an unencrypted private key") from None
    if not same_key:
        raise FormatError("the private key in the PEM file is not its certificate's")
    return _identity(certificate, key_pem.group())


def _identity(certificate: x509.Certificate, key_pem: bytes) -> TubIdentity:
    der = certificate.public_bytes(serialization.Encoding.DER)
    return TubIdentity(certificate.public_bytes(serialization.Encoding.PEM), key_pem, der, tub_id_of_certificate(der))
