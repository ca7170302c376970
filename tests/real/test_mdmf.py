"""MDMF between the real client and us: each reads, and the real one finds healthy, every state the other leaves."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

import grid
from grid.nodes.mutable import MutableFileNode
from tests.real.mounting import Mounter
from tests.real.tahoe_grid import TahoeGrid, TahoeNotAvailable

pytestmark = pytest.mark.interop

SHARES = (2, 3, 4)
SERVERS = 4
SEGMENT = 131_072  # of a file in 2 of 4 shares
SIZE_MAX = 5 << 20
CHANGES = 200 if os.environ.get("TAHOEFS_SOAK") else 20
CHECK_EVERY = 5  # changes


@pytest.fixture(scope="module")
def small_grid(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TahoeGrid]:
    """Four servers and the real client, connected to all of them."""
    try:
        grid = TahoeGrid(tmp_path_factory.mktemp("mdmf"), servers=SERVERS, shares=SHARES)
    except TahoeNotAvailable as reason:
        pytest.skip(str(reason))
    try:
        yield grid.start()
    finally:
        grid.stop()


def is_whole(their: TahoeGrid, cap: str, shares: int = SERVERS) -> bool:
    results = their.check(cap)["results"]
    return bool(results["healthy"] and results["count-shares-good"] == shares and not results["count-corrupt-shares"])


def drawn_size(rng: random.Random) -> int:
    """1 B to 5 MiB, all magnitudes alike."""
    return min(SIZE_MAX, int(2 ** rng.uniform(0, 22.4)))


def drawn_offset(rng: random.Random, size: int) -> int:
    """Anywhere, or where it matters: by a segment's boundary, by the end."""
    boundary = rng.randint(0, size // SEGMENT) * SEGMENT + rng.choice((-1, 0, 1))
    return max(0, min(size, rng.choice((rng.randint(0, size), boundary, size, size - 1))))


async def change(node: MutableFileNode, model: bytearray, rng: random.Random) -> str:
    """One of ours, to file and model. Returns what it was."""
    size = len(model)
    match rng.choice(("write", "write", "append", "truncate", "beyond", "boundary")):
        case "write":
            offset, data = drawn_offset(rng, size), rng.randbytes(drawn_size(rng) // 4 + 1)
            await node.write_at(offset, data)
            model[offset : offset + len(data)] = data
            what = f"write of {len(data)} at {offset}"
        case "append":
            data = rng.randbytes(drawn_size(rng) // 4 + 1)
            await node.append(data)
            model += data
            what = f"append of {len(data)}"
        case "beyond":
            offset = size + rng.choice((1, SEGMENT, rng.randint(1, 3 * SEGMENT)))
            await node.write_at(offset, b"beyond")
            model += bytes(offset - size) + b"beyond"
            what = f"write at {offset}, beyond the end"
        case "boundary":
            to = min(SIZE_MAX, (size // SEGMENT + rng.randint(0, 3)) * SEGMENT)
            await node.truncate(to)
            del model[to:]
            model += bytes(to - len(model))
            what = f"to a whole {to // SEGMENT} segments"
        case _:
            to = drawn_offset(rng, size)
            await node.truncate(to)
            del model[to:]
            what = f"cut to {to}"
    if len(model) > SIZE_MAX:
        to = drawn_size(rng)
        await node.truncate(to)
        del model[to:]
        what += f", then cut to {to}"
    return what


def test_the_real_client_reads_every_state_we_leave(small_grid: TahoeGrid) -> None:
    rng = random.Random(20)
    model = bytearray(rng.randbytes(300_000))

    async def run() -> None:
        async with grid.join_grid(grid.NodeDirectory.open(small_grid.client.path)) as client:
            await client.need_servers(SERVERS)
            cap = await client.create_mutable_file(bytes(model), format="mdmf")
            for number in range(CHANGES):
                node = client.create_node_from_uri(cap)
                what = f"change {number}: {await change(node, model, rng)}"
                theirs = await trio.to_thread.run_sync(small_grid.get, cap)
                assert theirs == model, what
                if number % CHECK_EVERY == 0 or number == CHANGES - 1:
                    assert await trio.to_thread.run_sync(is_whole, small_grid, cap), what

    trio.run(run)


def their_change(their: TahoeGrid, cap: str, model: bytearray, rng: random.Random, path: Path) -> str:
    """One of the real client's, of those that it does without failing: no append at a boundary or to nothing, no gap.

    A write in place goes by its web API, new contents by its command line.
    """
    size = len(model)
    if size and rng.random() < 0.8:
        offset, data = rng.choice((rng.randint(0, size - 1), size - 1)), rng.randbytes(drawn_size(rng) // 4 + 1)
        their.put_into(cap, offset, data)
        model[offset : offset + len(data)] = data
        return f"write of {len(data)} at {offset}"
    data = rng.randbytes(drawn_size(rng))
    path.write_bytes(data)
    their.run_command("put", path, cap)
    model[:] = data
    return f"new contents of {len(data)}"


def test_we_read_every_state_the_real_client_leaves(small_grid: TahoeGrid, tmp_path: Path) -> None:
    """Their writes and ours in turns, so that theirs build on what ours left."""
    rng = random.Random(21)
    model = bytearray(rng.randbytes(200_000))
    (tmp_path / "first").write_bytes(model)
    cap = small_grid.run_command("put", "--format=mdmf", tmp_path / "first").decode().strip()

    async def run() -> None:
        async with grid.join_grid(grid.NodeDirectory.open(small_grid.client.path)) as client:
            await client.need_servers(SERVERS)
            for number in range(CHANGES):
                node = client.create_node_from_uri(cap)
                if number % 3 == 2:
                    what = f"change {number}, ours: {await change(node, model, rng)}"
                else:
                    what = await trio.to_thread.run_sync(their_change, small_grid, cap, model, rng, tmp_path / "next")
                    what = f"change {number}, theirs: {what}"
                if len(model) > SIZE_MAX:
                    await node.truncate(1000)
                    del model[1000:]
                assert await node.download_to_data() == model, what
            assert await trio.to_thread.run_sync(small_grid.get, cap) == model
            assert await trio.to_thread.run_sync(is_whole, small_grid, cap)

    trio.run(run)


def test_changes_the_real_client_fails_at(small_grid: TahoeGrid) -> None:
    """It answers 500 to an append at a segment's boundary or to an empty file; ours it then reads."""

    async def run() -> None:
        async with grid.join_grid(grid.NodeDirectory.open(small_grid.client.path)) as client:
            await client.need_servers(SERVERS)
            for size in (0, SEGMENT, 4 * SEGMENT):
                before = bytes(size)
                cap = await client.create_mutable_file(before, format="mdmf")
                await client.create_node_from_uri(cap).append(b"appended")
                assert await trio.to_thread.run_sync(small_grid.get, cap) == before + b"appended"
                assert await trio.to_thread.run_sync(is_whole, small_grid, cap)

    trio.run(run)


def test_a_large_file_is_made_and_changed_in_bounded_steps(
    small_grid: TahoeGrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a file of many GiB would be; the real client finds nothing wrong with it, and updates it in its turn."""
    monkeypatch.setattr("grid.operations.changes.VERSION_BYTES_MAX", 1 << 20)
    rng = random.Random(22)
    model = bytearray(rng.randbytes(30 * SEGMENT + 11))

    async def run() -> None:
        async with grid.join_grid(grid.NodeDirectory.open(small_grid.client.path)) as client:
            await client.need_servers(SERVERS)

            async def read(offset: int, length: int) -> bytes:
                return bytes(model[offset : offset + length])

            cap = await client.create_mutable_file(grid.Changes.everything(len(model), read), format="mdmf")
            assert await trio.to_thread.run_sync(small_grid.get, cap) == model
            node = client.create_node_from_uri(cap)
            model[5 * SEGMENT : 20 * SEGMENT] = rng.randbytes(15 * SEGMENT)
            await node.apply(grid.Changes([(5 * SEGMENT, 20 * SEGMENT)], read))
            for _ in range(3):
                data = rng.randbytes(2 * SEGMENT)
                await node.append(data)
                model.extend(data)
            assert await trio.to_thread.run_sync(small_grid.get, cap) == model
            assert await trio.to_thread.run_sync(is_whole, small_grid, cap)
            await trio.to_thread.run_sync(small_grid.put_into, cap, 7 * SEGMENT - 2, b"theirs")
            model[7 * SEGMENT - 2 : 7 * SEGMENT + 4] = b"theirs"
            assert await node.download_to_data() == model

    trio.run(run)


@pytest.mark.mount
def test_in_a_mount(real_grid: TahoeGrid, root_cap: str, mounted: Mounter) -> None:
    """Their file changed in place, keeping its cap; and new ones of ours."""
    model = bytearray(random.Random(23).randbytes(9 * SEGMENT + 5))
    cap = real_grid.put_at(root_cap, "theirs", bytes(model), "MDMF")
    with mounted(root_cap, "mutable=mdmf") as mount:
        with (mount.path / "theirs").open("r+b") as file:
            file.seek(4 * SEGMENT - 3)
            file.write(b"across a boundary")
            file.seek(0, os.SEEK_END)
            file.write(b"and at the end")
        os.truncate(mount.path / "theirs", 9 * SEGMENT + 10)
        (mount.path / "ours").write_bytes(model[::-1])
        model[4 * SEGMENT - 3 : 4 * SEGMENT + 14] = b"across a boundary"
        model += b"and a"
        assert (mount.path / "theirs").read_bytes() == model
    assert real_grid.get(cap) == model and real_grid.json(root_cap, "theirs")[1]["rw_uri"] == cap
    assert real_grid.json(root_cap, "ours")[1]["format"] == "MDMF"
    assert is_whole(real_grid, cap, 10)
    assert len(real_grid.get(root_cap, "ours")) == 9 * SEGMENT + 5
