"""`local:DIR`: one child for all its mounts, gone with the last, back after a crash; and a mount of it."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import trio

import grid
from grid.server_directory import ServerDirectory
from tahoefs import local_grid
from tahoefs.local_grid import (
    LocalGridError,
    attached,
    client_directory,
    introducer_furl,
    locked,
    prepare,
    server_directories,
)
from tahoefs.mountpoint import filesystem_at
from tests.grid.peers.loopback import until
from tests.real.mounting import Mount, tahoefs
from tests.real.tahoe_grid import wait_until
from tests.tahoefs.mounts import needs_fuse


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared once; no test leaves a child behind."""
    path = tmp_path_factory.mktemp("local") / "grid"
    prepare(path)
    return path


def child_of(directory: Path) -> int:
    return int((directory / local_grid.RUNNING).read_text() or 0)  # 0: just being written


def steals(thief: socket.socket, port: int) -> bool:
    """A process that was killed takes a moment to let go of its ports."""
    try:
        thief.bind(("127.0.0.1", port))
    except OSError:
        return False
    return True


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


async def servers_found(directory: Path) -> int:
    node = grid.NodeDirectory.open(client_directory(directory))
    async with grid.join_grid(node) as client:
        return await client.broker.wait_for_servers(local_grid.SERVERS, 60)


def test_what_is_made(directory: Path) -> None:
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    node = grid.NodeDirectory.open(client_directory(directory))
    assert [str(furl) for furl in node.introducers.values()] == [introducer_furl(directory)]
    servers = [ServerDirectory.open(path) for path in server_directories(directory)]
    endpoints = {endpoint for server in servers for endpoint in server.endpoints}
    assert len(endpoints) == local_grid.SERVERS and {endpoint.host for endpoint in endpoints} == {"127.0.0.1"}


def test_preparing_again_changes_nothing_and_completes_what_was_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "grid"
    prepare(path)
    before = {file: file.read_bytes() for file in path.rglob("tahoe.cfg")}
    broken = path / "server3"
    (broken / "tahoe.cfg").unlink()  # it is written last
    prepare(path)
    after = {file: file.read_bytes() for file in path.rglob("tahoe.cfg")}
    assert after.keys() == before.keys() and len(after) == local_grid.SERVERS + 2
    assert {file for file in before if before[file] != after[file]} <= {broken / "tahoe.cfg"}


def test_a_directory_with_other_things_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "server3").mkdir()
    with pytest.raises(LocalGridError, match="something else"):
        prepare(tmp_path)
    assert os.listdir(tmp_path) == ["server3"]


async def test_two_users_share_one_child_which_leaves_with_the_last(directory: Path) -> None:
    async with attached(directory):
        child = child_of(directory)
        async with attached(directory):
            assert child_of(directory) == child
            assert await servers_found(directory) == local_grid.SERVERS
        assert is_running(child)
        os.kill(child, signal.SIGTERM)  # as a service manager may, while there is a mount that still sends
        assert await servers_found(directory) == local_grid.SERVERS
    await until(lambda: not is_running(child))


async def test_two_users_at_once_start_one_child(directory: Path) -> None:
    children: set[int] = set()

    async def use() -> None:
        async with attached(directory):
            children.add(child_of(directory))
            arrived.append(None)
            await until(lambda: len(arrived) == 2)

    arrived: list[None] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(use)
        nursery.start_soon(use)
    assert len(children) == 1


async def test_a_crash_is_noticed_and_a_taken_port_is_given_up(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_grid, "RESTART_DELAY_S", 0.5)
    introducer = ServerDirectory.open(directory / "introducer")
    async with attached(directory):
        child = child_of(directory)
        with socket.socket() as thief:
            thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            async with locked(directory / local_grid.LOCK, 60):  # until then nobody may start another one
                os.kill(child, signal.SIGKILL)
                await until(lambda: steals(thief, introducer.endpoints[0].port))
                thief.listen()
            await until(lambda: child_of(directory) not in (0, child), 60)
            async with attached(directory):
                assert await servers_found(directory) == local_grid.SERVERS
    assert ServerDirectory.open(directory / "introducer").endpoints != introducer.endpoints
    await until(lambda: not is_running(child_of(directory)))


async def test_a_user_that_is_killed_counts_as_gone(directory: Path) -> None:
    program = (
        "import sys, trio; from pathlib import Path; from tahoefs.local_grid import attached\n"
        "async def main():\n"
        "    async with attached(Path(sys.argv[1])):\n"
        "        print('attached', flush=True)\n"
        "        await trio.sleep_forever()\n"
        "trio.run(main)\n"
    )
    user = await trio.lowlevel.open_process([sys.executable, "-c", program, str(directory)], stdout=subprocess.PIPE)
    try:
        assert user.stdout is not None
        said = b""
        while not said.endswith(b"\n") and (piece := await user.stdout.receive_some(100)):
            said += piece
        assert said == b"attached\n"
        await user.stdout.aclose()
        child = child_of(directory)
    finally:
        user.kill()
        await user.wait()
    await until(lambda: not is_running(child))


async def test_a_child_that_cannot_start_says_why(directory: Path) -> None:
    furl = directory / "server5" / "private" / "storage.furl"
    kept = furl.read_text()
    furl.write_text("nonsense\n")
    try:
        with pytest.RaisesGroup(pytest.RaisesExc(LocalGridError, match=r"storage\.furl is not a valid FURL")):
            async with attached(directory):
                raise AssertionError("it did not start")
    finally:
        furl.write_text(kept)


@needs_fuse
def test_a_mount(tmp_path: Path) -> None:
    """From nothing to a folder, twice; what was written is there the second time."""
    directory, where = tmp_path / "grid", tmp_path / "folder"
    where.mkdir()
    tahoefs("mount", f"local:{directory}", where)
    assert stat.S_IMODE((directory / "root.cap").stat().st_mode) == 0o600
    cap = (directory / "root.cap").read_text().strip()
    assert json.loads(tahoefs("cap", f"local:{directory}", "--json").stdout)["cap"] == cap
    status = Mount(where).status()
    assert (status["source"], status["servers"]) == (f"local:{directory}", {"connected": 10, "known": 10})
    (where / "file").write_bytes(b"kept" * 1000)
    again = tmp_path / "again"
    again.mkdir()
    tahoefs("mount", f"local:{directory}", again)
    tahoefs("umount", where)
    child = child_of(directory)
    assert is_running(child)
    wait_until((again / "file").exists, "the other mount to look again", 30)
    assert (again / "file").read_bytes() == b"kept" * 1000
    tahoefs("umount", again)
    assert filesystem_at(again) is None
    wait_until(lambda: not is_running(child), "the grid's end", 30)
    tahoefs("mount", f"local:{directory}", where)
    assert (where / "file").read_bytes() == b"kept" * 1000
    tahoefs("umount", where)
    assert (directory / "root.cap").read_text().strip() == cap
