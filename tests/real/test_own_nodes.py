"""A real grid's roles replaced by ours one by one, under the real client; and storage directories that change hands.

Everything is done by the real client, by its command line and its web API, so it is its opinion that is asked.
"""

from __future__ import annotations

import json
import random
import re
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from grid.formats.base32 import b2a
from grid.formats.caps import parse_known_cap
from tests.real.sample_tree import SEGMENT, content, write_tree
from tests.real.tahoe_grid import OUR_PROGRAM, TahoeGrid, TahoeNotAvailable, wait_until

pytestmark = pytest.mark.interop

SHARES = (2, 3, 4)
SERVERS = 4
GRIDS: dict[str, dict[str, Any]] = {
    "our introducer": {"our_introducer": True},
    "our servers": {"our_servers": SERVERS},
    "all ours by HTTP": {"our_introducer": True, "our_servers": SERVERS},
    "all ours by Foolscap": {"our_introducer": True, "our_servers": SERVERS, "force_foolscap": True},
}


@pytest.fixture(scope="module", params=GRIDS)
def mixed_grid(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TahoeGrid]:
    """Four servers and the real client, connected to all of them."""
    try:
        grid = TahoeGrid(tmp_path_factory.mktemp("mixed"), servers=SERVERS, shares=SHARES, **GRIDS[request.param])
    except TahoeNotAvailable as reason:
        pytest.skip(str(reason))
    try:
        yield grid.start()
    finally:
        grid.stop()


def tahoe(grid: TahoeGrid, *arguments: str | Path, stdin: bytes | None = None) -> bytes:
    """The real command line."""
    command = [grid.tahoe, "-d", grid.client.path, *arguments]
    done = subprocess.run(command, input=stdin, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def buckets(grid: TahoeGrid, cap: str) -> dict[int, list[tuple[int, Path]]]:
    storage_index = parse_known_cap(cap).storage_index
    assert storage_index is not None
    return grid.share_files(b2a(storage_index))


def is_whole(grid: TahoeGrid, cap: str) -> bool:
    results = grid.check(cap)["results"]
    return bool(results["healthy"] and results["count-shares-good"] == 4 and not results["count-corrupt-shares"])


def wait_listening(grid: TahoeGrid) -> None:
    def all_listen() -> bool:
        for server in grid.servers:
            port = re.search(r"tub\.port = tcp:(\d+)", (server.path / "tahoe.cfg").read_text())
            assert port is not None
            socket.create_connection(("127.0.0.1", int(port[1]))).close()  # an OSError means: not yet
        return True

    wait_until(all_listen, "the servers to listen")
    grid.reconnect()


@pytest.mark.parametrize("file_format", ["CHK", "SDMF", "MDMF"])
@pytest.mark.parametrize("size", [56, 3 * SEGMENT + 17])
def test_put_get_check(mixed_grid: TahoeGrid, file_format: str, size: int) -> None:
    """Small ones by the web API, which the command line only calls."""
    data = content(size, size)
    if size < SEGMENT:
        cap = mixed_grid.put(data, file_format)
        assert mixed_grid.get(cap) == data
    else:
        cap = tahoe(mixed_grid, "put", f"--format={file_format}", "-", stdin=data).decode().strip()
        assert tahoe(mixed_grid, "get", cap) == data
    assert sorted(buckets(mixed_grid, cap)) == [0, 1, 2, 3]
    assert is_whole(mixed_grid, cap)


@pytest.mark.parametrize("file_format", ["SDMF", "MDMF"])
def test_mutable_files_change(mixed_grid: TahoeGrid, file_format: str) -> None:
    """Replaced whole, made longer and shorter, and written in the middle."""
    cap = mixed_grid.put(content(300_000, 1), file_format)
    for size in (500_000, 10, 0, 200_000):
        replaced = content(size, size)
        mixed_grid.request("PUT", f"/uri/{cap.replace(':', '%3A')}", replaced)
        assert mixed_grid.get(cap) == replaced
    expected = bytearray(replaced)
    expected[150_000:150_005] = b"inner"
    mixed_grid.request("PUT", f"/uri/{cap.replace(':', '%3A')}?offset=150000", b"inner")
    assert mixed_grid.get(cap) == bytes(expected)
    assert is_whole(mixed_grid, cap)


def test_trees(mixed_grid: TahoeGrid, tmp_path: Path) -> None:
    """`tahoe mkdir`, `cp -r` there and back, `deep-check --verify`."""
    files = {f"d{number % 3}/file{number}": content(10 ** (number % 6), number) for number in range(18)}
    write_tree(tmp_path / "tree", files)
    root = tahoe(mixed_grid, "mkdir").decode().strip()
    tahoe(mixed_grid, "cp", "-r", tmp_path / "tree", root)
    tahoe(mixed_grid, "cp", "-r", f"{root}/tree", tmp_path / "back")
    difference = subprocess.run(["diff", "-r", tmp_path / "tree", tmp_path / "back" / "tree"], check=False)
    assert difference.returncode == 0
    *units, _ = mixed_grid.deep_check(root)
    checked = [each["check-results"]["results"] for each in units if each["storage-index"]]
    assert len(checked) >= 12 and all(each["healthy"] and not each["count-corrupt-shares"] for each in checked)


@pytest.mark.parametrize("file_format", ["CHK", "SDMF", "MDMF"])
def test_check_repair_and_leases(mixed_grid: TahoeGrid, file_format: str) -> None:
    """A damaged share is found, a lost one is replaced, and a lease can be added."""
    cap = mixed_grid.put(content(200_000, 77), file_format)
    held = buckets(mixed_grid, cap)
    _, lost = held[0][0]
    lost.unlink()
    _, damaged = held[1][0]
    with damaged.open("r+b") as file:
        file.seek(damaged.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 0xFF]))
    results = mixed_grid.check(cap)["results"]
    assert not results["healthy"] and results["count-shares-good"] == 2
    damaged.unlink()
    said = json.loads(tahoe(mixed_grid, "check", "--raw", "--verify", "--repair", "--add-lease", cap))
    assert said["repair-successful"] and said["post-repair-results"]["results"]["healthy"]
    assert mixed_grid.get(cap) == content(200_000, 77)


def test_a_server_that_comes_back_is_found(mixed_grid: TahoeGrid) -> None:
    """Stopped and started again, it is the same server to everyone: what it holds can be changed."""
    cap = mixed_grid.put(b"first " * 1000, "SDMF")
    with mixed_grid.without([0, 1]):
        assert mixed_grid.get(cap) == b"first " * 1000
    wait_listening(mixed_grid)
    mixed_grid.request("PUT", f"/uri/{cap.replace(':', '%3A')}", b"second " * 1000)
    assert mixed_grid.get(cap) == b"second " * 1000
    assert is_whole(mixed_grid, cap)


@pytest.mark.parametrize("ours_first", [True, False])
def test_storage_directories_change_hands(tmp_path: Path, ours_first: bool) -> None:
    """Written by one, served by the other, written to by the other, and back: nothing is missed or damaged.

    By Foolscap, as the real client then finds them again within seconds; the disk knows nothing of protocols.
    """
    rng = random.Random(5)
    data = {name: rng.randbytes(size) for name, size in (("chk", 300_000), ("sdmf", 90_000), ("mdmf", 400_000))}
    try:
        ours = SERVERS if ours_first else 0
        grid = TahoeGrid(tmp_path, servers=SERVERS, shares=SHARES, our_servers=ours, force_foolscap=True)
    except TahoeNotAvailable as reason:
        pytest.skip(str(reason))
    try:
        grid.start()
        theirs = grid.introducer.program
        root = grid.mkdir()
        caps = {name: grid.put_at(root, name, data[name], name.upper()) for name in data}
        for turn, program in enumerate((theirs, OUR_PROGRAM) if ours_first else (OUR_PROGRAM, theirs)):
            for server in grid.servers:
                server.kill()
            for server in grid.servers:
                server.program = program
                server.start()
            wait_listening(grid)
            *units, _ = grid.deep_check(root)
            ill = {"/".join(each["path"]): each["check-results"]["results"] for each in units}
            ill = {path: results for path, results in ill.items() if not results["healthy"]}
            assert not ill, (turn, json.dumps(ill))
            for name in ("sdmf", "mdmf"):
                assert grid.get(caps[name]) == data[name]
                data[name] = rng.randbytes(len(data[name]) + 1000)
                grid.put_at(root, name, data[name], name.upper())
                assert grid.get(caps[name]) == data[name]
            assert grid.get(caps["chk"]) == data["chk"]
            tahoe(grid, "check", "--verify", "--add-lease", caps["chk"])
            grid.put_at(root, f"more{turn}", rng.randbytes(100_000))
    finally:
        grid.stop()
