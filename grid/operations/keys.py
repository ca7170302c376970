"""The keys of a mutable file: what its RSA key pair gives, and a pool that makes key pairs ahead.

    private key DER ── hash ──> write key ── hash ──> read key ── hash ──> storage index
    public key DER ─── hash ──> fingerprint

An RSA key takes tens of milliseconds to make, and every new directory needs one: the pool has some ready
before they are asked for. It starts with one, and keeps more the more are taken, so that a mount that
only reads does not pay for keys it never uses.

Source: the key derivation of Tahoe-LAFS 1.20's mutable files.
"""

from __future__ import annotations

import hmac
import logging
from collections import deque
from typing import Final, Self

import trio
from attrs import field, frozen

from grid import crypto
from grid.errors import FormatError
from grid.formats import hashutil

log = logging.getLogger(__name__)

KEYS_AHEAD_MAX: Final = 32
KEY_WORKERS: Final = 2
PRIVATE_KEY_BYTES_MAX: Final = 4096  # a real one is 1216 to 1219 bytes; the field in a share has no limit of its own


@frozen
class MutableKeys:
    """Everything that follows from one RSA key pair. 16-byte keys; `fingerprint` is 32 bytes."""

    private: crypto.RSAPrivateKey = field(repr=False)
    public_der: bytes = field(repr=False)
    encrypted_private_key: bytes = field(repr=False)  # as it stands in every share
    writekey: bytes = field(repr=False)
    fingerprint: bytes

    @classmethod
    def from_private_der(cls, private_der: bytes) -> Self:
        """Of a key we made ourselves."""
        writekey = hashutil.writekey_of_private_key(private_der)
        private = crypto.RSAPrivateKey.from_der(private_der, trusted=True)
        public_der = private.public_der
        return cls(
            private=private,
            public_der=public_der,
            encrypted_private_key=crypto.aes_ctr(writekey, private_der),
            writekey=writekey,
            fingerprint=hashutil.fingerprint_of_public_key(public_der),
        )

    @classmethod
    def from_share(cls, encrypted_private_key: bytes, *, writekey: bytes, public_der: bytes) -> Self:
        """From the encrypted bytes of a share, which are kept as they are: re-encoding would change the write key.

        Raises FormatError when they do not decrypt to what `writekey` was hashed from. Whoever passes that
        test is the key's maker, so the slow check of an RSA key is left out.
        """
        if len(encrypted_private_key) > PRIVATE_KEY_BYTES_MAX:
            raise FormatError("encrypted private key is too long")
        private_der = crypto.aes_ctr(writekey, encrypted_private_key)
        if not hmac.compare_digest(hashutil.writekey_of_private_key(private_der), writekey):
            raise FormatError("private key does not match the write key")
        return cls(
            private=crypto.RSAPrivateKey.from_der(private_der, trusted=True),
            public_der=public_der,
            encrypted_private_key=bytes(encrypted_private_key),
            writekey=writekey,
            fingerprint=hashutil.fingerprint_of_public_key(public_der),
        )

    @property
    def readkey(self) -> bytes:
        return hashutil.readkey_of_writekey(self.writekey)

    @property
    def storage_index(self) -> bytes:
        return hashutil.ssk_storage_index(self.readkey)


def make_keys() -> MutableKeys:
    """CPU-bound for tens of milliseconds, now and then for hundreds: run it in a worker thread."""
    return MutableKeys.from_private_der(crypto.generate_rsa_key())


class KeyPool:
    """Key pairs made ahead. `run()` is the owner of the workers; without it get() makes its own."""

    def __init__(self, *, ahead_max: int = KEYS_AHEAD_MAX) -> None:
        self._ready: deque[MutableKeys] = deque()
        self._making = 0
        self._ahead_max = ahead_max
        self._ahead = min(1, ahead_max)
        self._waiting = 0
        self._changed = trio.Condition()
        self._running = False

    @property
    def ready(self) -> int:
        return len(self._ready)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Runs until cancelled: `await nursery.start(pool.run)`."""
        self._running = True
        try:
            async with trio.open_nursery() as nursery:
                for _ in range(KEY_WORKERS):
                    nursery.start_soon(self._work)
                task_status.started()
        finally:
            self._running = False

    async def _work(self) -> None:
        while True:
            async with self._changed:
                while len(self._ready) + self._making >= self._ahead + self._waiting:
                    await self._changed.wait()
                self._making += 1
            try:
                keys = await trio.to_thread.run_sync(make_keys, abandon_on_cancel=True)
            finally:
                self._making -= 1
            async with self._changed:
                self._ready.append(keys)
                self._changed.notify_all()

    async def get(self) -> MutableKeys:
        """One key pair nobody else gets; waits while one is made."""
        if not self._running and not self._ready:
            return await trio.to_thread.run_sync(make_keys, abandon_on_cancel=True)
        async with self._changed:
            self._ahead = min(self._ahead * 2, self._ahead_max)
            self._waiting += 1
            self._changed.notify_all()
            try:
                while not self._ready:
                    await self._changed.wait()
            finally:
                self._waiting -= 1
            return self._ready.popleft()
