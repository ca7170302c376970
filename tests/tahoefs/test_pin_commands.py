"""`tahoefs pin`, `unpin`, and what `status` says of pins: the real programs, a real socket, servers in memory."""

from __future__ import annotations

import json
import os
import pty
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio

from cache import Pins
from grid.formats.caps import UnknownCap
from tahoefs.vfs import VFS
from tests.cache.memory_client import put
from tests.grid.peers.loopback import until
from tests.tahoefs.test_mount_control import DATA, Daemon, command, running_daemon

CACHE_BYTES = 6 << 20


@pytest.fixture
async def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Daemon]:
    """With docs/inside, docs/large (300 KiB) and file, all on the grid."""
    async with running_daemon(tmp_path, monkeypatch, disk_bytes=CACHE_BYTES) as daemon:
        workspace = daemon.workspace
        docs = await workspace.make_directory(workspace.root, "docs", {})
        await put(workspace, docs, "inside", DATA)
        await put(workspace, docs, "large", bytes(300 << 10))
        await put(workspace, workspace.root, "file", DATA)
        await workspace.wait()
        (daemon.where / "docs").mkdir()
        yield daemon


def pins_of(daemon: Daemon) -> Pins:
    assert daemon.workspace.pins is not None
    return daemon.workspace.pins


async def refused(daemon: Daemon, *arguments: str | Path) -> tuple[int, str]:
    done = await daemon.run(*arguments)
    (line,) = done.stderr.decode().splitlines()
    return done.returncode or 0, line


async def test_pin_status_and_unpin(daemon: Daemon) -> None:
    done = await daemon.run("pin", daemon.where / "docs")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    done = await daemon.run("pin", daemon.where / "file", "--no-wait")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    await until(lambda: pins_of(daemon).status()[1]["state"] == "complete", timeout_s=30)
    status = json.loads((await daemon.run("status", daemon.where, "--json")).stdout)
    size = len(DATA) + (300 << 10)
    docs: dict[str, Any] = {"path": "/docs", "state": "complete", "files": 2, "files_held": 2, "message": None}
    assert status["pinned"][0] == docs | {"bytes": size, "bytes_held": size}
    text = (await daemon.run("status", daemon.where)).stdout.decode()
    assert "  pinned    /docs  complete, 2 files (304 KiB)\n  pinned    /file  complete, 1 file (4 KiB)" in text
    listing = (await daemon.run("pin")).stdout.decode()
    assert listing.splitlines()[0] == f"{daemon.where}/docs  complete, 2 files (304 KiB)"
    listed = json.loads((await daemon.run("pin", "--list", "--json", daemon.where / "docs")).stdout)
    assert [(pin["path"], pin["mountpoint"]) for pin in listed] == [(p, str(daemon.where)) for p in ("/docs", "/file")]
    code, line = await refused(daemon, "unpin", daemon.where / "docs" / "inside")
    assert code == 1 and line.endswith("/docs/inside: not pinned; it is kept with /docs, which is")
    assert (await daemon.run("unpin", daemon.where / "docs")).returncode == 0
    code, line = await refused(daemon, "unpin", daemon.where / "docs")
    assert code == 1 and line.endswith("/docs: not pinned")
    assert [pin["path"] for pin in pins_of(daemon).status()] == ["/file"]


async def test_what_cannot_be_pinned(daemon: Daemon, tmp_path: Path) -> None:
    code, line = await refused(daemon, "pin", tmp_path)
    assert code == 1 and "not in a tahoefs mount of yours" in line
    code, line = await refused(daemon, "pin", daemon.where / "nothing")
    assert code == 1 and line.startswith(f"tahoefs: {daemon.where}/nothing: ")
    await daemon.workspace.link(daemon.workspace.root, "odd", UnknownCap("new:rw", "ro.new:ro", None), {})
    code, line = await refused(daemon, "pin", daemon.where / "odd")
    assert code == 4 and line.endswith("its cap cannot be read, so there is nothing to keep")
    await put(daemon.workspace, daemon.workspace.root, "huge", bytes(5 << 20))
    code, line = await refused(daemon, "pin", daemon.where / "huge")  # which is sent before
    assert code == 1 and "does not fit: it takes 5.0 MiB more, and pins may take 4.5 MiB of the cache" in line
    assert "cache_size=" in line
    assert pins_of(daemon).status() == []


async def test_offline_it_stays_pinned(daemon: Daemon, tmp_path: Path) -> None:
    for path in (tmp_path / "state" / "cache").rglob("*.pack"):
        os.truncate(path, 0)  # what was uploaded is not here
    await daemon.workspace.load(daemon.workspace.root)
    for server in daemon.client.servers:
        server.connected = False
    await until(lambda: daemon.workspace.offline)
    code, line = await refused(daemon, "pin", daemon.where / "file")
    assert code == 3 and "it stays pinned, and goes on with the grid" in line
    assert pins_of(daemon).status()[0]["state"] == "waiting"
    for server in daemon.client.servers:
        server.connected = True
    await until(lambda: pins_of(daemon).status()[0]["state"] == "complete", timeout_s=30)


async def test_ctrl_c_ends_the_waiting_only(daemon: Daemon, tmp_path: Path) -> None:
    for path in (tmp_path / "state" / "cache").rglob("*.pack"):
        os.truncate(path, 0)
    for server in daemon.client.servers:
        server.hang_on.add("read")
    leader, follower = pty.openpty()
    async with trio.open_nursery() as nursery:
        stopped = command("pin", daemon.where / "docs")
        process = await trio.lowlevel.open_process(stopped, stdin=follower, stdout=follower, stderr=follower)
        os.close(follower)
        shown = bytearray()

        async def watch() -> None:
            while b"fetching" not in shown:
                shown.extend(await trio.to_thread.run_sync(os.read, leader, 4096))
            process.send_signal(signal.SIGINT)

        with trio.fail_after(60):
            await watch()
            await process.wait()
        nursery.cancel_scope.cancel()
    rest = os.read(leader, 65536).decode()
    os.close(leader)
    assert process.returncode == 130
    assert "no longer waiting; it stays pinned, and goes on being fetched" in shown.decode() + rest
    for server in daemon.client.servers:
        server.hang_on.clear()
    assert pins_of(daemon).status()[0]["path"] == "/docs"


async def test_a_pin_goes_with_its_directory(daemon: Daemon) -> None:
    vfs: VFS = daemon.control._links._linking._vfs
    await daemon.run("pin", daemon.where / "docs" / "inside")
    await daemon.run("pin", daemon.where / "file")
    await vfs.rename(1, b"docs", 1, b"papers")
    await vfs.rename(1, b"file", 1, b"file~")  # a program makes a backup: the pin stays where it is
    assert [pin["path"] for pin in pins_of(daemon).status()] == ["/file", "/papers/inside"]
    await vfs.mkdir(1, b"other", 0o755, _Caller())
    await vfs.rename(1, b"other", 1, b"papers", 2)  # RENAME_EXCHANGE
    assert [pin["path"] for pin in pins_of(daemon).status()] == ["/file", "/other/inside"]
    await daemon.workspace.wait()
    await until(lambda: pins_of(daemon).status()[1]["state"] == "complete", timeout_s=30)
    await until(lambda: pins_of(daemon).status()[0]["state"] == "missing", timeout_s=30)


class _Caller:
    uid, gid, pid, umask = os.getuid(), os.getgid(), os.getpid(), 0o022
