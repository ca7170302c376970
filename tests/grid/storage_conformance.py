"""What every IStorageServer must do, whatever is behind it: one suite, run over each kind of server.

    class TestOurs(StorageConformance):
        @pytest.fixture
        async def server(self) -> IStorageServer: ...

Storage indexes are random, so a server may be shared and may hold other things.
"""

from __future__ import annotations

import random
import secrets

import pytest
import trio

from grid.errors import GridError, PeerError, RemoteFailure
from grid.interfaces import IBucketWriter, IStorageServer, LeaseSecrets, SlotSecrets, SlotWrite, TestVector

LEASE = LeaseSecrets(b"r" * 32, b"c" * 32)
OTHER_LEASE = LeaseSecrets(b"R" * 32, b"C" * 32)
SECRETS = SlotSecrets(b"w" * 32, LEASE)
WRONG_SECRETS = SlotSecrets(b"x" * 32, LEASE)
ABSENT = [TestVector(0, 1, b"")]
VERSION_KEY = b"http://allmydata.org/tahoe/protocols/storage/v1"


@pytest.fixture
def si() -> bytes:
    return secrets.token_bytes(16)


def data_of(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


async def allocate(server: IStorageServer, si: bytes, numbers: set[int], size: int) -> dict[int, IBucketWriter]:
    already, writers = await server.allocate_buckets(si, LEASE, frozenset(numbers), size)
    assert already.isdisjoint(numbers)
    assert set(writers) == numbers
    return writers


async def put_share(server: IStorageServer, si: bytes, number: int, data: bytes) -> None:
    writer = (await allocate(server, si, {number}, len(data)))[number]
    await writer.write(0, data)
    await writer.close()


class StorageConformance:
    """`server` is connected. Subclasses say how."""

    @pytest.fixture
    def server(self) -> IStorageServer:
        raise NotImplementedError

    # --- what it says of itself

    async def test_it_says_who_it_is_and_what_it_takes(self, server: IStorageServer) -> None:
        version = await server.get_version()
        assert isinstance(version[b"application-version"], bytes)
        assert version[VERSION_KEY][b"maximum-immutable-share-size"] == server.maximum_immutable_share_size > 1 << 20
        assert server.available_space is None or server.available_space > 1 << 20
        assert server.connected and server.server_id and server.name
        assert len(server.tub_id) == 20 and server.permutation_seed

    # --- immutable

    async def test_a_share_is_read_as_it_was_written(self, server: IStorageServer, si: bytes) -> None:
        data = data_of(100_000)
        writer = (await allocate(server, si, {3}, len(data)))[3]
        await writer.write(60_000, memoryview(data)[60_000:])
        await writer.write(0, data[:25_000])
        assert await server.get_buckets(si) == {}  # over HTTP the last byte closes it
        await writer.write(25_000, memoryview(data)[25_000:60_000])
        await writer.close()
        reader = (await server.get_buckets(si))[3]
        assert await reader.read(0, len(data)) == data
        assert await reader.read(59_000, 2_000) == data[59_000:61_000]
        assert await reader.read(99_990, 1_000) == data[99_990:]
        assert await reader.read(100_000, 10) == b""
        assert await reader.read(200_000, 10) == b""
        assert await reader.read(50, 0) == b""

    async def test_a_share_larger_than_every_window(self, server: IStorageServer, si: bytes) -> None:
        data = data_of(9_000_001)
        writer = (await allocate(server, si, {0}, len(data)))[0]
        for offset in range(0, len(data), 1 << 20):
            await writer.write(offset, memoryview(data)[offset : offset + (1 << 20)])
        await writer.close()
        assert await (await server.get_buckets(si))[0].read(0, len(data)) == data

    async def test_what_was_not_written_is_zeros(self, server: IStorageServer, si: bytes) -> None:
        writer = (await allocate(server, si, {0}, 2_000_000))[0]
        await writer.write(1_500_000, b"middle")
        await writer.close()
        found = await (await server.get_buckets(si))[0].read(0, 2_000_000)
        assert found == bytes(1_500_000) + b"middle" + bytes(2_000_000 - 1_500_006)

    async def test_what_was_given_up_is_allocated_anew_at_once(self, server: IStorageServer, si: bytes) -> None:
        numbers = {0, 1, 2}
        for writer in (await allocate(server, si, numbers, 10)).values():
            await writer.abort()
        for checkpoints in (0, 1, 3, 10, 30, 100, 300):  # an allocation cancelled sooner or later, or in time
            in_time: list[IBucketWriter] = []

            async def begin(in_time: list[IBucketWriter] = in_time) -> None:
                in_time += (await allocate(server, si, numbers, 10)).values()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(begin)
                for _ in range(checkpoints):
                    await trio.lowlevel.checkpoint()
                nursery.cancel_scope.cancel()
            for writer in in_time:
                await writer.abort()
            for writer in (await allocate(server, si, numbers, 10)).values():
                await writer.abort()

    async def test_what_is_held_and_what_is_being_written_is_not_allocated_again(
        self, server: IStorageServer, si: bytes
    ) -> None:
        await put_share(server, si, 1, b"held")
        under_way = await allocate(server, si, {2}, 4)
        already, writers = await server.allocate_buckets(si, OTHER_LEASE, frozenset({1, 2, 5}), 4)
        assert (already, set(writers)) == (frozenset({1}), {5})
        await writers[5].abort()
        already, writers = await server.allocate_buckets(si, OTHER_LEASE, frozenset({9}), 4)
        assert (already, set(writers)) == (frozenset({1}), {9})  # held ones are named whether asked for or not
        await writers[9].abort()
        await under_way[2].write(0, b"done")
        await under_way[2].close()
        assert set(await server.get_buckets(si)) == {1, 2}

    async def test_an_aborted_share_leaves_room_for_another(self, server: IStorageServer, si: bytes) -> None:
        writer = (await allocate(server, si, {0}, 10))[0]
        await writer.write(0, b"12345")
        await writer.abort()
        await writer.abort()
        with pytest.raises(PeerError):
            await writer.write(5, b"67890")
            await writer.close()
        assert await server.get_buckets(si) == {}
        await put_share(server, si, 0, b"another")
        assert await (await server.get_buckets(si))[0].read(0, 100) == b"another"

    async def test_a_write_beyond_the_end_fails_by_the_close(self, server: IStorageServer, si: bytes) -> None:
        writer = (await allocate(server, si, {0}, 10))[0]
        with pytest.raises(PeerError):
            await writer.write(5, b"too long")
            await writer.close()
        await writer.abort()
        assert await server.get_buckets(si) == {}

    async def test_many_shares_at_once(self, server: IStorageServer, si: bytes) -> None:
        writers = await allocate(server, si, set(range(12)), 1000)
        for number, writer in writers.items():
            await writer.write(0, data_of(1000, number))
        for writer in writers.values():
            await writer.close()
        readers = await server.get_buckets(si)
        assert set(readers) == set(range(12))
        for number, reader in readers.items():
            assert await reader.read(0, 2000) == data_of(1000, number)

    async def test_a_share_too_large_is_not_taken(self, server: IStorageServer, si: bytes) -> None:
        if (space := server.available_space) is None or space > 1 << 60:
            pytest.skip("this server says there is no limit")
        already, writers = await server.allocate_buckets(si, LEASE, frozenset({0}), 1 << 61)
        assert (already, writers) == (frozenset(), {})

    async def test_what_nobody_has(self, server: IStorageServer, si: bytes) -> None:
        assert await server.get_buckets(si) == {}
        assert await server.slot_readv(si, [], [(0, 10)]) == {}
        assert await server.slot_readv(si, [1, 2], [(0, 10)]) == {}
        await server.add_lease(si, LEASE)
        await server.advise_corrupt_share("immutable", si, 0, "there is no such share")

    async def test_leases_and_advice(self, server: IStorageServer, si: bytes) -> None:
        await put_share(server, si, 0, b"data")
        await server.add_lease(si, LEASE)
        await server.add_lease(si, OTHER_LEASE)
        await (await server.get_buckets(si))[0].advise_corrupt_share("looks bad to me: Ω")
        await server.advise_corrupt_share("immutable", si, 0, "x" * 100_000)
        assert await (await server.get_buckets(si))[0].read(0, 10) == b"data"

    # --- mutable

    async def test_a_slot_is_made_read_and_changed(self, server: IStorageServer, si: bytes) -> None:
        def writev(*data: tuple[int, bytes], tests: list[TestVector], new_length: int | None = None) -> SlotWrite:
            return SlotWrite(tests, data, new_length)

        testv = server.slot_testv_and_readv_and_writev
        made = {0: writev((0, b"hello world"), tests=ABSENT), 7: writev((0, b"seven"), tests=ABSENT)}
        assert await testv(si, SECRETS, made, [(0, 5)]) == (True, {})
        assert await server.slot_readv(si, [], [(0, 5), (6, 100), (200, 5)]) == {
            0: [b"hello", b"world", b""],
            7: [b"seven", b"", b""],
        }
        assert await server.slot_readv(si, [7, 9], [(1, 2)]) == {7: [b"ev"]}
        # the answer tells of all shares, as they were
        changed = {0: writev((0, b"HELLO"), tests=[TestVector(0, 5, b"hello")])}
        assert await testv(si, SECRETS, changed, [(0, 5)]) == (True, {0: [b"hello"], 7: [b"seven"]})
        assert await testv(si, SECRETS, changed, [(0, 5)]) == (False, {0: [b"HELLO"], 7: [b"seven"]})
        assert await testv(si, SECRETS, {0: writev((0, b"x"), tests=ABSENT)}, []) == (False, {0: [], 7: []})
        # truncated, extended over a hole, deleted
        assert (await testv(si, SECRETS, {0: writev(tests=[], new_length=5)}, []))[0]
        assert (await testv(si, SECRETS, {7: writev((8, b"!"), tests=[])}, []))[0]
        assert await server.slot_readv(si, [], [(0, 99)]) == {0: [b"HELLO"], 7: [b"seven\0\0\0!"]}
        assert (await testv(si, SECRETS, {0: writev(tests=[], new_length=0)}, []))[0]
        assert await server.slot_readv(si, [], [(0, 99)]) == {7: [b"seven\0\0\0!"]}
        await server.add_lease(si, LEASE)
        await server.advise_corrupt_share("mutable", si, 7, "bad signature")
        assert (await testv(si, SECRETS, {7: writev(tests=[], new_length=0)}, []))[0]
        assert await server.slot_readv(si, [], [(0, 99)]) == {}

    async def test_one_test_that_fails_stops_every_write(self, server: IStorageServer, si: bytes) -> None:
        testv = server.slot_testv_and_readv_and_writev
        assert (await testv(si, SECRETS, {0: SlotWrite([], [(0, b"zero")])}, []))[0]
        writes = {
            0: SlotWrite([TestVector(0, 4, b"zero")], [(0, b"ZERO")]),
            1: SlotWrite([TestVector(0, 3, b"one")], [(0, b"ONE")]),
        }
        assert await testv(si, SECRETS, writes, [(0, 9)]) == (False, {0: [b"zero"]})
        assert await server.slot_readv(si, [], [(0, 9)]) == {0: [b"zero"]}

    async def test_a_wrong_write_enabler_is_refused(self, server: IStorageServer, si: bytes) -> None:
        testv = server.slot_testv_and_readv_and_writev
        assert (await testv(si, SECRETS, {0: SlotWrite([], [(0, b"mine")])}, []))[0]
        with pytest.raises(RemoteFailure) as refused:
            await testv(si, WRONG_SECRETS, {0: SlotWrite([], [(0, b"yours")])}, [])
        assert refused.value.short_type == "BadWriteEnablerError"
        assert await server.slot_readv(si, [], [(0, 9)]) == {0: [b"mine"]}

    async def test_ranges_far_apart_in_a_large_slot(self, server: IStorageServer, si: bytes) -> None:
        data = data_of(1_500_000)
        writes = {number: SlotWrite([], [(0, data[:700_000]), (700_000, data[700_000:])]) for number in (0, 1)}
        assert (await server.slot_testv_and_readv_and_writev(si, SECRETS, writes, []))[0]
        ranges = [(0, 41), (1_400_000, 1000), (500_000, 300_000), (1_499_990, 100), (900, 0)]
        expected = [data[offset : offset + length] for offset, length in ranges]
        assert await server.slot_readv(si, [], ranges) == {0: expected, 1: expected}

    async def test_a_slot_and_a_file_do_not_share_an_index(self, server: IStorageServer, si: bytes) -> None:
        writes = {0: SlotWrite([], [(0, b"slot")])}
        assert (await server.slot_testv_and_readv_and_writev(si, SECRETS, writes, []))[0]
        with pytest.raises(GridError):
            await server.allocate_buckets(si, LEASE, frozenset({1}), 10)
        assert await server.slot_readv(si, [], [(0, 9)]) == {0: [b"slot"]}
