"""Key pairs: what is derived from them (vectors), and the pool that makes them ahead."""

from __future__ import annotations

import pytest
import trio

from grid.errors import FormatError
from grid.operations.keys import KeyPool, MutableKeys, make_keys
from tests import vectors
from tests.grid.operations import mutable_grid as grid


def test_derivation_matches_tahoe() -> None:
    vector = vectors.section("formats.json", "mutable.keys")
    keys = grid.keys()
    assert keys.public_der.hex() == vector["pubkey_der"]
    assert keys.writekey.hex() == vector["writekey"]
    assert keys.readkey.hex() == vector["readkey"]
    assert keys.storage_index.hex() == vector["storage_index"]
    assert keys.fingerprint.hex() == vector["fingerprint"]
    assert keys.encrypted_private_key.hex() == vector["encrypted_privkey"]
    assert str(grid.write_cap()) == vector["ssk_cap"]


def test_a_private_key_from_a_share_signs_like_the_one_that_was_made() -> None:
    made = make_keys()
    read = MutableKeys.from_share(made.encrypted_private_key, writekey=made.writekey, public_der=made.public_der)
    assert (read.storage_index, read.fingerprint) == (made.storage_index, made.fingerprint)
    assert read.private.public_der == made.public_der


@pytest.mark.parametrize("position", [0, 700, -1])
def test_a_damaged_private_key_is_refused(position: int) -> None:
    keys = grid.keys()
    damaged = bytearray(keys.encrypted_private_key)
    damaged[position] ^= 1
    with pytest.raises(FormatError):
        MutableKeys.from_share(bytes(damaged), writekey=keys.writekey, public_der=keys.public_der)


def test_keys_do_not_show_in_repr() -> None:
    keys = grid.keys()
    for secret in (keys.writekey, keys.readkey, keys.encrypted_private_key):
        assert repr(secret) not in repr(keys)


async def test_pool_gives_every_key_once() -> None:
    pool = KeyPool(ahead_max=2)
    taken: list[MutableKeys] = []

    async def take() -> None:
        taken.append(await pool.get())

    async with trio.open_nursery() as nursery:
        await nursery.start(pool.run)
        async with trio.open_nursery() as takers:
            for _ in range(5):
                takers.start_soon(take)
        nursery.cancel_scope.cancel()
    assert len({keys.writekey for keys in taken}) == 5


async def test_pool_makes_keys_ahead_and_not_too_many() -> None:
    pool = KeyPool(ahead_max=3)
    async with trio.open_nursery() as nursery:
        await nursery.start(pool.run)
        for _ in range(4):
            await pool.get()
        with trio.fail_after(60):
            while pool.ready < 3:
                await trio.lowlevel.checkpoint()
        for _ in range(100):
            await trio.lowlevel.checkpoint()
        assert pool.ready == 3
        nursery.cancel_scope.cancel()


async def test_pool_without_its_task_still_gives_keys() -> None:
    assert (await KeyPool().get()).writekey
