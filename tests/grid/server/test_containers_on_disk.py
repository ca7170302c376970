"""Share files that this server makes and changes are, byte for byte, those a real server makes and changes."""

from __future__ import annotations

from base64 import b64decode
from pathlib import Path
from typing import Any

import pytest

from grid.formats import base32
from grid.interfaces import SlotSecrets, SlotWrite, TestVector
from grid.server.errors import BadWriteEnablerError
from grid.server.storage import StorageService
from tests.grid.server.stores import LEASES, MONTH, NOW, SECRETS, SI, WRITE_ENABLER, Clock, serve, share_file, upload
from tests.vectors import load, name_of, section

DATA = bytes(range(50))


def vector_file(name: str) -> bytes:
    (vector,) = section("storage.json", "containers", name=name)
    return b64decode(vector["file_b64"])


def place(service: StorageService, file: bytes, number: int = 0) -> None:
    """Put a share file there, as an administrator would."""
    path = Path(service.store.share(SI, number))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(file)


def with_owner(file: bytes, position: int, owner: int) -> bytes:
    return file[:position] + owner.to_bytes(4, "big") + file[position + 4 :]


def listing(directory: str) -> set[str] | None:
    path = Path(directory)
    return {file.name for file in path.iterdir()} if path.exists() else None


async def test_an_upload_and_a_second_lease(tmp_path: Path) -> None:
    async with serve(tmp_path) as service:
        await upload(service, SI, 3, DATA)
        assert share_file(service.store, SI, 3) == vector_file("imm-v2-1")
        await service.add_lease(SI, LEASES[1])
        assert share_file(service.store, SI, 3) == vector_file("imm-v2-2")
        # the same again renews, and time has not passed
        await service.add_lease(SI, LEASES[1])
        assert share_file(service.store, SI, 3) == vector_file("imm-v2-2")
        assert (tmp_path / "shares/aa" / base32.b2a(SI) / "3").exists()


async def test_an_upload_never_written_to(tmp_path: Path) -> None:
    async with serve(tmp_path) as service:
        _, uploads = await service.allocate_buckets(SI, LEASES[0], {0, 1}, 50)
        await uploads[0].close()
        assert share_file(service.store, SI, 0) == vector_file("imm-v2-unwritten")
        await uploads[1].write(20, b"z" * 10)
        await uploads[1].close()
        assert await service.read(SI, 1, 0, 100) == bytes(20) + b"z" * 10 + bytes(20)


async def test_an_empty_share(tmp_path: Path) -> None:
    async with serve(tmp_path) as service:
        await upload(service, SI, 0, b"")
        assert share_file(service.store, SI, 0) == with_owner(vector_file("imm-v2-empty"), 12, 0)


async def test_renewing(tmp_path: Path) -> None:
    clock = Clock()
    async with serve(tmp_path, clock=clock) as service:
        place(service, with_owner(vector_file("imm-v2-2"), 62, 1))
        clock.now = NOW + MONTH
        await service.renew_lease(SI, LEASES[1].renew)
        assert share_file(service.store, SI, 0) == vector_file("imm-v2-renewed")
        clock.now = NOW - MONTH
        await service.renew_lease(SI, LEASES[1].renew)
        assert share_file(service.store, SI, 0) == vector_file("imm-v2-renewed")


async def test_a_lease_is_never_backdated(tmp_path: Path) -> None:
    clock = Clock()
    clock.now = NOW - 1000
    async with serve(tmp_path, clock=clock) as service:
        place(service, vector_file("imm-v2-backdate-ignored"))
        await service.add_lease(SI, LEASES[0])
        assert share_file(service.store, SI, 0) == vector_file("imm-v2-backdate-ignored")


async def test_version_1_stays_version_1(tmp_path: Path) -> None:
    async with serve(tmp_path) as service:
        place(service, vector_file("imm-v1-1"))
        await service.renew_lease(SI, LEASES[0].renew)
        await service.add_lease(SI, LEASES[1])
        file = share_file(service.store, SI, 0)
        before = vector_file("imm-v1-1")
        record = (1).to_bytes(4, "big") + LEASES[1].renew + LEASES[1].cancel + (NOW + MONTH).to_bytes(4, "big")
        assert file == with_owner(before, 8, 2) + record
        assert await service.read(SI, 0, 0, 100) == DATA


async def test_version_1_slots(tmp_path: Path) -> None:
    async with serve(tmp_path) as service:
        place(service, vector_file("mut-v1-data-2"))
        await service.slot_testv_and_readv_and_writev(SI, SECRETS, {0: SlotWrite([], [(0, b"OLD")])}, [])
        assert share_file(service.store, SI, 0) == vector_file("mut-v1-data-2").replace(b"old style", b"OLD style")


async def test_cancelling_on_immutables(tmp_path: Path) -> None:
    async with serve(tmp_path) as service:
        place(service, with_owner(vector_file("imm-v2-2"), 62, 1))
        freed = [await service.cancel_lease(SI, LEASES[0].cancel)]
        assert share_file(service.store, SI, 0) == vector_file("imm-v2-cancel-first-of-two")
        freed.append(await service.cancel_lease(SI, LEASES[1].cancel))
        cancel = load("storage.json")["cancel"]
        assert freed == cancel["immutable_freed"]
        assert await service.share_numbers(SI) == frozenset() and cancel["last_cancel_unlinks"]


@pytest.mark.parametrize("version", [1, 2])
async def test_cancelling_on_slots(tmp_path: Path, version: int) -> None:
    async with serve(tmp_path) as service:
        place(service, vector_file(f"mut-v{version}-cancel-1-of-2"))
        place(service, vector_file("mut-v2-slot-reused"), 1)
        if version == 1:
            (tmp_path / "shares/aa" / base32.b2a(SI) / "1").unlink()
        else:
            # a third lease takes the first empty slot
            await service.add_lease(SI, LEASES[2])
            assert share_file(service.store, SI, 0) == vector_file("mut-v2-slot-reused")
            await service.cancel_lease(SI, LEASES[2].cancel)
            assert share_file(service.store, SI, 0) == vector_file("mut-v2-cancel-1-of-2")
        before = {n: len(share_file(service.store, SI, n)) for n in await service.share_numbers(SI)}
        assert await service.cancel_lease(SI, LEASES[1].cancel) == sum(before.values())
        assert await service.share_numbers(SI) == frozenset()
        assert load("storage.json")["cancel"]["mutable_last_cancel_unlinks"]


async def test_six_leases_and_growing(tmp_path: Path) -> None:
    async with serve(tmp_path) as service:

        async def write(*data: tuple[int, bytes], lease: int = 0, length: int | None = None) -> None:
            secrets = SlotSecrets(WRITE_ENABLER, LEASES[lease])
            await service.slot_testv_and_readv_and_writev(SI, secrets, {0: SlotWrite([], data, length)}, [])

        await write((0, b"hello world"))
        assert share_file(service.store, SI, 0) == vector_file("mut-v2-data-1")
        for lease in range(1, 6):
            await service.add_lease(SI, LEASES[lease])
        assert share_file(service.store, SI, 0) == vector_file("mut-v2-6leases")
        (vector,) = section("storage.json", "containers", name="mut-v2-6leases-grown")
        data = b64decode(vector["data_b64"])
        (gap, tail) = (data.rindex(b"\0") + 1, data[data.rindex(b"\0") + 1 :])
        await write((gap, tail))
        assert share_file(service.store, SI, 0) == vector_file("mut-v2-6leases-grown")


async def test_shrinking_and_growing_again(tmp_path: Path) -> None:
    async with serve(tmp_path) as service:

        async def write(*data: tuple[int, bytes], length: int | None = None) -> bytes:
            writes = {0: SlotWrite([], data, length)}
            await service.slot_testv_and_readv_and_writev(SI, SECRETS, writes, [])
            return share_file(service.store, SI, 0)

        await write((0, b"Z" * 200))
        assert await write(length=10) == vector_file("mut-v2-shrunk")
        assert await write((20, b"Q")) == vector_file("mut-v2-shrunk-regrown")


def test_every_container_is_used() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    elsewhere = {"imm-v2-0", "mut-v2-fresh", "mut-v1-cancel-1-of-2", "mut-v2-cancel-1-of-2"}
    assert [v["name"] for v in section("storage.json", "containers") if v["name"] not in source] <= sorted(elsewhere)


@pytest.mark.parametrize("vector", section("storage.json", "containers"), ids=name_of)
async def test_every_container_is_served(tmp_path: Path, vector: dict[str, Any]) -> None:
    async with serve(tmp_path) as service:
        place(service, b64decode(vector["file_b64"]))
        data = b64decode(vector["data_b64"])
        assert await service.share_numbers(SI) == {0}
        if vector["type"] == "immutable":
            assert await service.read(SI, 0, 0, 10_000) == data
            assert await service.share_length(SI, 0) == len(data)
        else:
            assert await service.slot_readv(SI, [], [(0, 10_000)]) == {0: [data]}
            assert await service.slot_length(SI, 0) == len(data)
        assert share_file(service.store, SI, 0) == b64decode(vector["file_b64"])


async def test_read_test_write_as_a_real_server_does_it(tmp_path: Path) -> None:
    cases = load("storage.json")["testv_cases"]
    storage_index = bytes.fromhex(cases["si"])
    steps = section("storage.json", "testv_cases.steps")
    async with serve(tmp_path) as service:
        for step in steps:
            secrets = SlotSecrets(bytes.fromhex(step["write_enabler"]), LEASES[0])
            writes = {
                int(number): SlotWrite(
                    [TestVector(offset, size, bytes.fromhex(specimen)) for offset, size, specimen in tests],
                    [(offset, bytes.fromhex(data)) for offset, data in data],
                    new_length,
                )
                for number, (tests, data, new_length) in step["tw"].items()
            }
            reads = [tuple(vector) for vector in step["read_vector"]]
            call = service.slot_testv_and_readv_and_writev(storage_index, secrets, writes, reads)
            if "error" in step:
                with pytest.raises(BadWriteEnablerError) as caught:
                    await call
                assert caught.value.wire_name.endswith(step["error"])
            else:
                passed, data = await call
                assert (passed, {str(n): [d.hex() for d in got] for n, got in data.items()}) == (
                    step["success"],
                    step["read_data"],
                ), step["what"]
            names = listing(service.store.bucket(storage_index))
            assert names == (None if step["shares_after"] is None else set(step["shares_after"])), step["what"]
            if names is None:
                continue
            for number, after in step["shares_after"].items():
                held = await service.slot_readv(storage_index, [int(number)], [(0, 1 << 30)])
                file = share_file(service.store, storage_index, int(number))
                leases = sum(file[100 + 92 * i : 104 + 92 * i] != bytes(4) for i in range(4))
                found = {"data": held[int(number)][0].hex(), "file_size": len(file), "leases": leases}
                assert found == after, step["what"]
