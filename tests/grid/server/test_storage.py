"""What clients may do: uploads and their end, leases, read-only and full servers, slots, bad arguments."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from grid.formats import base32
from grid.interfaces import LeaseSecrets, SlotSecrets, SlotWrite, TestVector
from grid.server import immutables, shares, slots, storage, uploads
from grid.server.errors import (
    BadRequestError,
    BadWriteEnablerError,
    ConflictingWriteError,
    DataTooLargeError,
    NoSpaceError,
    NoSuchShareError,
    StorageError,
    UnknownImmutableContainerVersionError,
    UnknownMutableContainerVersionError,
    UnusableShareError,
    UploadFinishedError,
)
from grid.server.shares import ShareStore
from grid.server.storage import StorageService
from tests.grid.server.stores import (
    LEASES,
    MONTH,
    NODE_ID,
    NOW,
    SECRETS,
    SI,
    Clock,
    files_in,
    open_store,
    serve,
    share_file,
    upload,
)
from tests.vectors import load, section

OTHER = b"o" * 16


async def write_slot(service: StorageService, *data: tuple[int, bytes], number: int = 0, lease: int = 0) -> None:
    secrets = SlotSecrets(SECRETS.write_enabler, LEASES[lease])
    passed, _ = await service.slot_testv_and_readv_and_writev(SI, secrets, {number: SlotWrite([], data)}, [])
    assert passed


# --- uploads


async def test_pieces_in_any_order_and_what_is_missing(tmp_path: Path) -> None:
    async with serve(tmp_path) as service:
        have, started = await service.allocate_buckets(SI, LEASES[0], {0, 5}, 100, upload_secret=b"mine")
        assert (have, set(started)) == (frozenset(), {0, 5})
        one = started[0]
        assert service.find_upload(SI, 0) is one and one.upload_secret == b"mine" and "mine" not in repr(one)
        assert one.required == [(0, 100)] and not one.complete
        await one.write(90, memoryview(b"z" * 10))
        await one.write(0, b"a" * 30)
        assert one.required == [(30, 90)]
        await one.write(20, b"a" * 10 + b"b" * 60 + b"z" * 10)
        assert one.required == [] and one.complete and not one.finished
        assert await service.share_numbers(SI) == frozenset()
        with pytest.raises(NoSuchShareError):
            await service.read(SI, 0, 0, 1)
        await one.close()
        assert one.finished and service.find_upload(SI, 0) is None
        assert await service.immutable_share_numbers(SI) == {0}
        assert await service.read(SI, 0, 25, 10) == b"a" * 5 + b"b" * 5
        assert await service.read(SI, 0, 95, 1000) == b"z" * 5
        assert await service.read(SI, 0, 100, 72) == await service.read(SI, 0, 1 << 40, 1) == b""
        with pytest.raises(UploadFinishedError):
            await one.write(0, b"a")
        with pytest.raises(UploadFinishedError):
            await one.close()
        await one.abort()
        assert await service.share_numbers(SI) == {0}


async def test_conflicting_and_oversized_writes_change_nothing(tmp_path: Path) -> None:
    async with serve(tmp_path) as service:
        _, started = await service.allocate_buckets(SI, LEASES[0], {0}, 20)
        await started[0].write(5, b"12345")
        with pytest.raises(ConflictingWriteError):
            await started[0].write(0, b"x" * 20)
        with pytest.raises(ConflictingWriteError):  # before its size is looked at
            await started[0].write(9, b"x" * 20)
        with pytest.raises(DataTooLargeError, match=r"^\(20, 15, 6\)$"):
            await started[0].write(15, b"x" * 6)
        with pytest.raises(BadRequestError):
            await started[0].write(-1, b"x")
        assert started[0].required == [(0, 5), (10, 20)]
        await started[0].write(0, b"abcde12345fghijklmno")
        await started[0].close()
        assert await service.read(SI, 0, 0, 20) == b"abcde12345fghijklmno"


async def test_what_is_asked_for_twice(tmp_path: Path) -> None:
    async with serve(tmp_path) as service:
        await upload(service, SI, 1, b"one")
        _, first = await service.allocate_buckets(SI, LEASES[0], {0}, 10)
        have, second = await service.allocate_buckets(SI, LEASES[1], {0, 1, 2}, 10)
        assert (have, set(second)) == ({1}, {2})
        assert share_file(service.store, SI, 1)[8:12] == b"\0\0\0\2"  # two clients, two leases
        await first[0].abort()
        await first[0].abort()
        with pytest.raises(UploadFinishedError):
            await first[0].write(0, b"x")
        have, again = await service.allocate_buckets(SI, LEASES[0], {0, 1, 2}, 10)
        assert (have, set(again)) == ({1}, {0})
        have, none = await service.allocate_buckets(SI, LEASES[0], set(), 0)
        assert (have, none) == ({1}, {})


async def test_uploads_end_after_half_an_hour_of_silence(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with serve(tmp_path) as service:
        _, started = await service.allocate_buckets(SI, LEASES[0], {0, 1, 2}, 10)
        await started[0].write(0, b"12345")
        await trio.sleep(29 * 60 + 59)
        await started[1].write(0, b"12345")
        assert not started[0].finished
        await trio.sleep(2)
        assert started[0].finished and started[2].finished and not started[1].finished
        assert files_in(tmp_path / "shares") == {f"incoming/{base32.b2a(SI)}.1"}
        await trio.sleep(29 * 60 + 57)
        assert not started[1].finished
        await trio.sleep(2)
        assert started[1].finished
        assert files_in(tmp_path / "shares") == set()
        assert service.uploads_in_progress == 0


async def test_a_stop_forgets_uploads_and_a_start_what_a_kill_left(tmp_path: Path) -> None:
    async with serve(tmp_path) as service:
        _, started = await service.allocate_buckets(SI, LEASES[0], {0}, 10)
        await started[0].write(0, b"12345")
        assert len(files_in(tmp_path / "shares")) == 1
    assert files_in(tmp_path) == set()
    left = tmp_path / "shares/incoming/aa" / base32.b2a(SI)
    left.mkdir(parents=True)
    (left / "0").write_bytes(b"as the original leaves it")
    with open_store(tmp_path) as store:
        assert store.share_numbers(SI) == []
        assert files_in(tmp_path) <= {"tahoefs.journal"}


async def test_many_uploads_with_few_files_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "OPEN_UPLOADS_MAX", 3)
    monkeypatch.setattr(immutables, "OPEN_SHARES_MAX", 3)
    async with serve(tmp_path) as service:
        _, started = await service.allocate_buckets(SI, LEASES[0], set(range(10)), 30)
        before = len(os.listdir("/proc/self/fd"))
        for piece in range(3):
            for number, one in started.items():
                await one.write(10 * piece, bytes([number]) * 10)
        assert len(os.listdir("/proc/self/fd")) <= before + 4
        for one in started.values():
            await one.close()
        for number in range(10):
            assert await service.read(SI, number, 0, 30) == bytes([number]) * 30
        assert len(os.listdir("/proc/self/fd")) <= before + 4


async def test_large_writes_in_threads_keep_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "INLINE_BYTES_MAX", 100)
    async with serve(tmp_path) as service, trio.open_nursery() as nursery:
        _, started = await service.allocate_buckets(SI, LEASES[0], {0, 1, 2}, 5000)

        async def write_and_close() -> None:
            for piece in range(10):
                await started[0].write(500 * piece, bytes([piece]) * 500)
            await started[0].close()

        nursery.start_soon(write_and_close)
        await started[1].write(0, b"x" * 5000)
        # given up while one waits for its turn
        async with trio.open_nursery() as writers:
            writers.start_soon(_expect_finished, started[2], b"y" * 5000)
            await trio.testing.wait_all_tasks_blocked()
            started[2].abort_now()
        nursery.start_soon(started[1].close)
    with open_store(tmp_path) as store:
        service = StorageService(store)
        assert await service.read(SI, 0, 0, 5000) == b"".join(bytes([piece]) * 500 for piece in range(10))
        assert await service.share_numbers(SI) == {0, 1}
        assert not files_in(tmp_path / "shares/incoming")


async def _expect_finished(one: uploads.Upload, data: bytes) -> None:
    with pytest.raises(UploadFinishedError):
        while True:
            await one.write(0, data)


async def test_too_many_holes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "SPANS_MAX", 4)
    async with serve(tmp_path) as service:
        _, started = await service.allocate_buckets(SI, LEASES[0], {0}, 100)
        for offset in range(0, 8, 2):
            await started[0].write(offset, b"x")
        with pytest.raises(BadRequestError, match="holes"):
            await started[0].write(20, b"x")


# --- space


async def test_space_is_promised_to_uploads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ShareStore, "available_space", lambda self: 1000)
    async with serve(tmp_path) as service:
        _, started = await service.allocate_buckets(SI, LEASES[0], {0, 1, 2}, 400)
        assert len(started) == 2
        assert (await service.allocate_buckets(OTHER, LEASES[0], {0}, 201)) == (frozenset(), {})
        await started[0].abort()
        _, more = await service.allocate_buckets(OTHER, LEASES[0], {0, 1}, 600)
        assert len(more) == 1
        version = service.get_version()
        assert version[storage.VERSION_KEY][b"available-space"] == 1000


def test_reserved_space(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        free = store.available_space()
    assert free is not None and free > 1 << 20
    with open_store(tmp_path, reserved_space=free - (1 << 20)) as store:
        left = store.available_space()
        assert left is not None and left < free // 2
    with open_store(tmp_path, reserved_space=1 << 60) as store:
        assert store.available_space() == 0


async def test_a_full_disk_refuses_the_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serve(tmp_path) as service:
        _, started = await service.allocate_buckets(SI, LEASES[0], {0}, 10)

        def full(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr("grid.server.journal.os.pwrite", full)
            patch.setattr("grid.server.journal.os.pwritev", full)
            with pytest.raises(NoSpaceError):
                await started[0].write(0, b"x" * 10)
        assert started[0].required == [(0, 10)]


async def test_a_readonly_server(tmp_path: Path) -> None:
    async with serve(tmp_path) as service:
        await upload(service, SI, 0, b"data")
    async with serve(tmp_path, readonly=True) as service:
        assert service.store.available_space() == 0
        assert (await service.allocate_buckets(OTHER, LEASES[0], {0}, 1)) == (frozenset(), {})
        _, empty = await service.allocate_buckets(OTHER, LEASES[0], {0}, 0)
        assert set(empty) == {0}
        await service.add_lease(SI, LEASES[0])
        await service.renew_lease(SI, LEASES[0].renew)
        with pytest.raises(NoSpaceError):
            await service.add_lease(SI, LEASES[1])
        with pytest.raises(NoSpaceError):
            await service.allocate_buckets(SI, LEASES[1], {1}, 1)
        # slots can be made and written, as long as one of four leases is free
        storage_index = b"slot" * 4
        writes = {0: SlotWrite([], [(0, b"x")])}
        for lease in LEASES[:4]:
            secrets = SlotSecrets(SECRETS.write_enabler, lease)
            await service.slot_testv_and_readv_and_writev(storage_index, secrets, writes, [])
        secrets = SlotSecrets(SECRETS.write_enabler, LEASES[4])
        with pytest.raises(NoSpaceError):
            await service.slot_testv_and_readv_and_writev(storage_index, secrets, {0: SlotWrite([], [(0, b"y")])}, [])
        assert await service.slot_readv(storage_index, [], [(0, 9)]) == {0: [b"x"]}


# --- leases


async def test_leases_on_both_kinds(tmp_path: Path) -> None:
    clock = Clock()
    async with serve(tmp_path, clock=clock) as service:
        assert not await service.add_lease(SI, LEASES[0])
        with pytest.raises(NoSuchShareError):
            await service.renew_lease(SI, LEASES[0].renew)
        with pytest.raises(NoSuchShareError):
            await service.cancel_lease(SI, LEASES[0].cancel)
        await write_slot(service, (0, b"x"))
        await write_slot(service, (0, b"x"), number=1, lease=1)
        clock.now += 1000
        assert await service.add_lease(SI, LEASES[0])
        with pytest.raises(NoSuchShareError):
            await service.renew_lease(SI, LEASES[1].renew)  # share 0 has none of that
        expires = (NOW + 1000 + MONTH).to_bytes(4, "big")
        for number in (0, 1):
            assert expires in share_file(service.store, SI, number)


async def test_too_many_leases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(immutables, "LEASES_MAX", 2)
    monkeypatch.setattr("grid.formats.container.EXTRA_LEASES_MAX", 5)
    async with serve(tmp_path) as service:
        await upload(service, SI, 0, b"data")
        await service.add_lease(SI, LEASES[1])
        with pytest.raises(NoSpaceError):
            await service.add_lease(SI, LEASES[2])
    async with serve(tmp_path / "slots") as service:
        for lease in range(5):
            await write_slot(service, (0, b"x"), lease=lease)
        with pytest.raises(NoSpaceError):
            await write_slot(service, (0, b"y"), lease=5)
        assert await service.slot_readv(SI, [], [(0, 9)]) == {0: [b"x"]}


# --- slots


async def test_the_error_names_the_server_that_made_the_share(tmp_path: Path) -> None:
    async with serve(tmp_path) as service:
        await write_slot(service, (0, b"x"))
    async with serve(tmp_path, tub_id=b"n" * 20) as service:
        secrets = SlotSecrets(b"?" * 32, LEASES[0])
        with pytest.raises(BadWriteEnablerError, match=f"recorded by nodeid '{base32.b2a(NODE_ID)}'"):
            await service.slot_testv_and_readv_and_writev(SI, secrets, {}, [])


async def test_a_hole_must_fit_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serve(tmp_path) as service:
        with pytest.raises(NoSpaceError):
            await write_slot(service, (69105 * 10**12 - 1, b"x"))
        with pytest.raises(DataTooLargeError):
            await write_slot(service, (69105 * 10**12, b"x"))
        assert await service.share_numbers(SI) == frozenset()
        assert not files_in(tmp_path / "shares")
        await write_slot(service, (0, b"x"))
        with pytest.raises(NoSpaceError):
            await write_slot(service, (1 << 50, b"x"))
        assert await service.slot_readv(SI, [], [(0, 9)]) == {0: [b"x"]}
        await write_slot(service, (100_000, b"x"))
        assert (await service.slot_readv(SI, [], [(0, 1 << 20)]))[0] == [b"x" + bytes(99_999) + b"x"]


async def test_of_several_shares_all_change_or_none(tmp_path: Path) -> None:
    async with serve(tmp_path) as service:
        await write_slot(service, (0, b"old"))
        writes = {
            0: SlotWrite([], [(0, b"new")]),
            1: SlotWrite([], [(0, b"made")]),
            2: SlotWrite([], [(69105 * 10**12, b"!")]),
        }
        with pytest.raises(DataTooLargeError):
            await service.slot_testv_and_readv_and_writev(SI, SECRETS, writes, [])
        assert await service.slot_readv(SI, [], [(0, 9)]) == {0: [b"old"]}
        assert not files_in(tmp_path / "shares/incoming")
        del writes[2]
        await service.slot_testv_and_readv_and_writev(SI, SECRETS, writes, [])
        assert await service.slot_readv(SI, [], [(0, 9)]) == {0: [b"new"], 1: [b"made"]}
        assert await service.slot_readv(SI, [1, 7], [(0, 9), (1, 1)]) == {1: [b"made", b"a"]}


async def test_calls_on_one_slot_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare-and-swap from many tasks, in threads: each number is taken once."""
    monkeypatch.setattr(storage, "INLINE_BYTES_MAX", -1)
    won: list[int] = []
    async with serve(tmp_path) as service:
        await write_slot(service, (0, bytes([0])))

        async def count() -> None:
            while True:
                value = (await service.slot_readv(SI, [0], [(0, 1)]))[0][0][0]
                if value == 30:
                    return
                write = SlotWrite([TestVector(0, 1, bytes([value]))], [(0, bytes([value + 1])), (5000, b"x" * 5000)])
                passed, before = await service.slot_testv_and_readv_and_writev(SI, SECRETS, {0: write}, [(0, 1)])
                if passed:
                    assert before == {0: [bytes([value])]}
                    won.append(value)

        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(count)
        assert not service._locks.table
    assert sorted(won) == list(range(30))


async def test_reads_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "READ_BYTES_MAX", 1000)
    async with serve(tmp_path) as service:
        await write_slot(service, (0, b"x" * 600))
        assert len((await service.slot_readv(SI, [], [(0, 1 << 62)]))[0][0]) == 600
        with pytest.raises(BadRequestError):
            await service.slot_readv(SI, [], [(0, 600), (100, 500)])
        await upload(service, OTHER, 0, b"x" * 1001)
        with pytest.raises(BadRequestError):
            await service.read(OTHER, 0, 0, 1001)
        assert len(await service.read(OTHER, 0, 1, 1 << 62)) == 1000


# --- what is on the disk


async def test_the_other_kind_of_share(tmp_path: Path) -> None:
    async with serve(tmp_path) as service:
        await write_slot(service, (0, b"x"))
        for call in (
            service.allocate_buckets(SI, LEASES[0], {1}, 1),
            service.immutable_share_numbers(SI),
            service.read(SI, 0, 0, 1),
        ):
            with pytest.raises(UnknownImmutableContainerVersionError):
                await call
        await upload(service, OTHER, 0, b"data")
        for slot_call in (
            service.slot_readv(OTHER, [], [(0, 1)]),
            service.slot_testv_and_readv_and_writev(OTHER, SECRETS, {}, []),
        ):
            with pytest.raises(UnknownMutableContainerVersionError):
                await slot_call


@pytest.mark.parametrize(
    "content", [b"", b"\0\0\0\2", b"\0\0\0\2" + b"\xff" * 8, b"\0\0\0\3" + bytes(100), b"Tahoe mutable container v2\n"]
)
async def test_broken_files_are_left_alone(tmp_path: Path, content: bytes) -> None:
    async with serve(tmp_path) as service:
        await upload(service, SI, 0, b"data")
        broken = trio.Path(service.store.share(SI, 1))
        await broken.write_bytes(content)
        assert await service.share_numbers(SI) == {0, 1}
        assert await service.read(SI, 0, 0, 10) == b"data"
        for call in (
            service.read(SI, 1, 0, 10),
            service.immutable_share_numbers(SI),
            service.add_lease(SI, LEASES[0]),
            service.slot_readv(SI, [1], [(0, 10)]),
        ):
            with pytest.raises(UnusableShareError):
                await call
        assert await broken.read_bytes() == content


async def test_files_that_are_no_shares(tmp_path: Path) -> None:
    async with serve(tmp_path) as service:
        await upload(service, SI, 7, b"data")
        bucket = trio.Path(service.store.bucket(SI))
        for name in ("07", "7.tmp", "-1", "256", "99999999", "²", "x"):
            await (bucket / name).write_bytes(b"")
        assert await service.share_numbers(SI) == {7}


async def test_shares_that_are_taken_away_are_noticed(tmp_path: Path) -> None:
    async with serve(tmp_path) as service:
        await upload(service, SI, 0, b"data")
        assert await service.read(SI, 0, 0, 10) == b"data"
        path = trio.Path(service.store.share(SI, 0))
        content = await path.read_bytes()
        await path.unlink()
        with pytest.raises(NoSuchShareError):
            await service.read(SI, 0, 0, 10)
        await path.write_bytes(content.replace(b"data", b"DATA"))
        assert await service.read(SI, 0, 0, 10) == b"DATA"


def test_one_directory_one_server(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        with pytest.raises(StorageError, match="in use"):
            ShareStore(tmp_path, tub_id=NODE_ID)
        store.close()
        with open_store(tmp_path):
            pass


# --- complaints


async def test_corruption_advisories(tmp_path: Path) -> None:
    vector = section("storage.json", "corruption")
    directory, _, name = vector["path"].partition("/")
    storage_index = base32.a2b(name.split("--")[1].rpartition("-")[0])
    clock = Clock()
    clock.now = 1767268800.123456
    async with serve(tmp_path, clock=clock) as service:
        await upload(service, storage_index, 3, b"data")
        assert await service.advise_corrupt_share("immutable", storage_index, 3, "bad €")
        assert not await service.advise_corrupt_share("immutable", storage_index, 4, "not there")
        assert not await service.advise_corrupt_share("immutable", SI, 3, "not there")
        with pytest.raises(BadRequestError):
            await service.advise_corrupt_share("../../etc", storage_index, 3, "")
        assert files_in(tmp_path / directory) == {name}
        assert await trio.Path(tmp_path / vector["path"]).read_text() == vector["text"]
        assert await service.read(storage_index, 3, 0, 10) == b"data"


async def test_advisories_do_not_fill_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shares, "ADVISORIES_MAX", 3)
    clock = Clock()
    for _ in range(2):
        async with serve(tmp_path, clock=clock) as service:
            await upload(service, SI, 0, b"data") if not await service.share_numbers(SI) else None
            for _ in range(4):
                clock.now += 1
                await service.advise_corrupt_share("immutable", SI, 0, "€" * 100_000)
        reports = list(await trio.to_thread.run_sync(lambda: list((tmp_path / "corruption-advisories").iterdir())))
        assert len(reports) == 3
        assert all(report.stat().st_size < shares.REASON_BYTES_MAX + 200 for report in reports)


# --- bad arguments

HUGE = 1 << 63
SHORT = LeaseSecrets(b"short", b"c" * 32)


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("allocate_buckets", (b"short", LEASES[0], {0}, 1)),
        ("allocate_buckets", (SI, SHORT, {0}, 1)),
        ("allocate_buckets", (SI, LEASES[0], {-1}, 1)),
        ("allocate_buckets", (SI, LEASES[0], {256}, 1)),
        ("allocate_buckets", (SI, LEASES[0], set(range(257)), 1)),
        ("allocate_buckets", (SI, LEASES[0], {0}, -1)),
        ("allocate_buckets", (SI, LEASES[0], {0}, HUGE)),
        ("read", (b"", 0, 0, 1)),
        ("read", (SI, 0, -1, 1)),
        ("read", (SI, 0, 0, -1)),
        ("read", (SI, 0, HUGE - 1, 1)),
        ("add_lease", (SI, SHORT)),
        ("add_lease", (SI + SI, LEASES[0])),
        ("renew_lease", (SI, b"short")),
        ("slot_readv", (SI, [], [(-1, 1)])),
        ("slot_readv", (SI, [], [(0, HUGE)])),
        ("slot_readv", (SI, list(range(257)), [])),
        ("slot_readv", (SI, [], [(0, 1)] * 5000)),
        ("slot_testv_and_readv_and_writev", (SI, SlotSecrets(b"short", LEASES[0]), {}, [])),
        ("slot_testv_and_readv_and_writev", (SI, SECRETS, {256: SlotWrite([], [])}, [])),
        ("slot_testv_and_readv_and_writev", (SI, SECRETS, {0: SlotWrite([], [(-1, b"")])}, [])),
        ("slot_testv_and_readv_and_writev", (SI, SECRETS, {0: SlotWrite([], [(HUGE, b"")])}, [])),
        ("slot_testv_and_readv_and_writev", (SI, SECRETS, {0: SlotWrite([], [], -1)}, [])),
        ("slot_testv_and_readv_and_writev", (SI, SECRETS, {0: SlotWrite([TestVector(0, -1, b"")], [])}, [])),
        ("slot_testv_and_readv_and_writev", (SI, SECRETS, {0: SlotWrite([TestVector(0, 1, b"")] * 5000, [])}, [])),
        ("advise_corrupt_share", ("immutable", b"", 0, "")),
    ],
)
async def test_bad_arguments(tmp_path: Path, method: str, arguments: tuple[Any, ...]) -> None:
    async with serve(tmp_path) as service:
        with pytest.raises(BadRequestError):
            await getattr(service, method)(*arguments)
        assert not files_in(tmp_path / "shares")
        assert service.uploads_in_progress == 0 and not service._locks.table


@pytest.mark.parametrize("entry", load("storage.json")["hash"]["si_dir"])
def test_bucket_directories(tmp_path: Path, entry: dict[str, str]) -> None:
    with open_store(tmp_path) as store:
        assert store.bucket(bytes.fromhex(entry["si"])) == str(tmp_path / "shares" / entry["dir"])


async def test_durable_does_the_same(tmp_path: Path) -> None:
    async with serve(tmp_path, durable=True) as service:
        await upload(service, SI, 0, b"data")
        assert await service.read(SI, 0, 0, 10) == b"data"
        storage_index = b"slot" * 4
        for data in (b"one", b"two"):
            writes = {n: SlotWrite([], [(0, data)]) for n in range(2)}
            await service.slot_testv_and_readv_and_writev(storage_index, SECRETS, writes, [])
        assert await service.slot_readv(storage_index, [], [(0, 9)]) == {0: [b"two"], 1: [b"two"]}
