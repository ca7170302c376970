"""The commands that talk to a mount's daemon: the real programs, the real socket and workspace, servers in memory.

There is no FUSE here: that a command reaches the daemon of a real mount is shown in tests/real/test_commands.py.
"""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from attrs import define

from cache import Workspace
from grid.formats.caps import LiteralCap
from tahoefs.control import serve_control
from tahoefs.mount_config import MountConfig
from tahoefs.mount_control import MountControl
from tahoefs.options import MountOptions
from tahoefs.progress import Progress, human_bytes, human_time, in_words
from tahoefs.registry import find_mount, registered
from tahoefs.targets import cap_of
from tahoefs.vfs import VFS
from tests.cache.memory_client import MemoryClient, mounted, put
from tests.grid.peers.loopback import until

DATA = bytes(range(256)) * 16
COMMAND_TIMEOUT_S = 60.0


@define
class Daemon:
    """What there is of a mount without its folder."""

    where: Path
    client: MemoryClient
    workspace: Workspace
    control: MountControl
    gone: trio.Event

    async def run(self, *arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[bytes]:
        with trio.fail_after(COMMAND_TIMEOUT_S):
            return await trio.run_process(
                command(*arguments), **{"capture_stdout": True, "capture_stderr": True, "check": False, **options}
            )


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "tahoefs.cli", *map(str, arguments)]


@pytest.fixture
async def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Daemon]:
    async with running_daemon(tmp_path, monkeypatch) as daemon:
        yield daemon


@asynccontextmanager
async def running_daemon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, disk_bytes: int = 0
) -> AsyncIterator[Daemon]:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    where = tmp_path / "folder"
    where.mkdir()
    config = MountConfig(str(tmp_path / "node"), "", (), "home:", str(where))
    async with mounted(tmp_path, disk_bytes=disk_bytes) as (client, workspace), trio.open_nursery() as nursery:
        control = MountControl(config, client, workspace, VFS(workspace, options=MountOptions()))  # type: ignore[arg-type]

        async def serve(*, task_status: trio.TaskStatus[None]) -> None:
            with registered(tmp_path / "node", where) as socket:
                await serve_control(socket, control.commands(), task_status=task_status)

        await nursery.start(serve)
        daemon = Daemon(where, client, workspace, control, trio.Event())
        nursery.start_soon(end_when_detached, daemon, nursery.cancel_scope)
        yield daemon
        nursery.cancel_scope.cancel()


async def end_when_detached(daemon: Daemon, everything: trio.CancelScope) -> None:
    await daemon.control.detached.wait()
    daemon.gone.set()
    await trio.sleep(0.1)  # the answer has to get out
    everything.cancel()


async def test_sync_returns_when_all_is_on_the_grid(daemon: Daemon) -> None:
    (daemon.where / "below").mkdir()
    await put(daemon.workspace, daemon.workspace.root, "file", DATA)
    done = await daemon.run("sync", daemon.where / "below")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert "file" in await daemon.client.listing(daemon.workspace.root.cap)


async def test_sync_says_what_is_not_on_the_grid(daemon: Daemon) -> None:
    with daemon.client.broken():
        await put(daemon.workspace, daemon.workspace.root, "important", DATA)
        done = await daemon.run("sync", daemon.where)
    [line] = done.stderr.decode().splitlines()
    assert done.returncode == 3
    assert line.startswith("tahoefs: not on the grid: 1 file (4 KiB), 1 directory, such as important: ")
    daemon.client.pause()
    done = await daemon.run("sync", daemon.where, "--timeout", "0.1")
    assert done.returncode == 3 and b"important" in done.stderr
    daemon.client.resume()
    assert (await daemon.run("sync", daemon.where)).returncode == 0


async def test_a_path_in_no_mount(daemon: Daemon, tmp_path: Path) -> None:
    for name in ("sync", "status"):
        done = await daemon.run(name, tmp_path)
        assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)


async def test_a_mount_is_found_from_inside_and_through_links(daemon: Daemon, tmp_path: Path) -> None:
    (daemon.where / "below").mkdir()
    (tmp_path / "link").symlink_to(daemon.where / "below")
    (daemon.where / "out").symlink_to("/")
    found = find_mount(daemon.where)
    assert found is not None and (found.mountpoint, found.inside) == (daemon.where, ())
    for path, inside in (
        (daemon.where / "below", ("below",)),
        (daemon.where / "not" / "there", ("not", "there")),
        (tmp_path / "link", ("below",)),
        (daemon.where / "out", ("out",)),
    ):
        assert find_mount(path) == (daemon.where, found.socket, inside)
    assert find_mount(tmp_path) is None and find_mount("/") is None


async def test_status_for_people_and_programs(daemon: Daemon) -> None:
    daemon.client.pause()
    await put(daemon.workspace, daemon.workspace.root, "odd\n\x1b[31mname", DATA)
    await until(lambda: daemon.workspace.status()["uploads"][0]["stage"] == "encoding")
    text = (await daemon.run("status", daemon.where)).stdout.decode()
    assert "home: on " in text and "unsent    1 file (4 KiB), 1 directory" in text
    assert "odd??[31mname  4 KiB  encoding" in text and "\x1b" not in text
    one = json.loads((await daemon.run("status", daemon.where, "--json")).stdout)
    every = json.loads((await daemon.run("status", "--json")).stdout)
    for found in (one, *every["mounts"]):
        assert found["mountpoint"] == str(daemon.where) and found["source"] == "home:"
        assert found["pending"] == {"files": 1, "bytes": len(DATA), "directories": 1}
        assert found["servers"] == {"connected": 3, "known": 3} and found["state"] == "online"
        upload = {"name": "odd\n\x1b[31mname", "bytes": 4096, "unsent_bytes": 4096, "stage": "encoding"}
        assert found["uploads"] == [{**upload, "shares_placed": 0, "shares_total": 3}]
        assert set(found["throughput"]) == {"pushed_bytes", "pushed_bytes_per_s"}
    assert len(every["mounts"]) == 1
    daemon.client.resume()


@pytest.mark.parametrize("connected", [True, False])
async def test_status_tells_of_the_upload_helper(daemon: Daemon, connected: bool) -> None:
    daemon.client.helper = SimpleNamespace(connected=connected)
    found = json.loads((await daemon.run("status", daemon.where, "--json")).stdout)
    assert found["helper"] == {"connected": connected}
    text = (await daemon.run("status", daemon.where)).stdout.decode()
    assert ("helper    connected" if connected else "helper    not connected, uploads go without it") in text


async def test_status_watch_goes_on_until_interrupted(daemon: Daemon) -> None:
    for arguments in (("--watch",), ("--watch", "--json")):
        async with trio.open_nursery() as nursery:
            process = await nursery.start(
                partial(trio.run_process, command("status", daemon.where, *arguments), stdout=subprocess.PIPE)
            )
            seen = b""
            with trio.fail_after(COMMAND_TIMEOUT_S):
                while seen.count(b"home:") < 3:
                    seen += await process.stdout.receive_some()
            process.send_signal(signal.SIGINT)  # run_process raises unless it ends with 0
    assert [json.loads(line)["source"] for line in seen.splitlines()[:3]] == ["home:"] * 3


async def test_a_terminal_sees_progress(daemon: Daemon) -> None:
    daemon.client.pause()
    await put(daemon.workspace, daemon.workspace.root, "file", DATA)
    ours, theirs = pty.openpty()
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(daemon.run, "sync", daemon.where, capture_stderr=False, stderr=theirs))
            shown = await read_until(ours, b"1 file (4 KiB), 1 directory left")
            daemon.client.resume()
        shown += os.read(ours, 1000)
        assert b"sending [" in shown and shown.endswith(b"\r\x1b[K")
    finally:
        os.close(ours)
        os.close(theirs)


async def test_an_interrupted_command_says_that_it_goes_on(daemon: Daemon) -> None:
    daemon.client.pause()
    daemon.control.state = "draining"  # as after the kernel's unmount
    await put(daemon.workspace, daemon.workspace.root, "file", DATA)
    for name, said in (("sync", "goes on being sent"), ("umount", "unmounted; its daemon goes on sending")):
        ours, theirs = pty.openpty()
        try:
            async with trio.open_nursery() as nursery:
                start = partial(trio.run_process, command(name, daemon.where), stderr=theirs, check=False)
                process = await nursery.start(start)
                shown = await read_until(ours, b"1 directory left")
                process.send_signal(signal.SIGINT)
            assert process.returncode == 130
            shown = await read_until(ours, b"1 directory")
            assert said.encode() in shown and b"1 file (4 KiB), 1 directory" in shown
        finally:
            os.close(ours)
            os.close(theirs)
    daemon.client.resume()
    assert (await daemon.run("sync", daemon.where)).returncode == 0


async def read_until(terminal: int, wanted: bytes) -> bytes:
    shown = b""
    with trio.fail_after(COMMAND_TIMEOUT_S):
        while wanted not in shown:
            await trio.lowlevel.wait_readable(terminal)
            shown += os.read(terminal, 1000)
    return shown


async def test_umount_without_waiting_needs_a_durable_journal(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    daemon.client.pause()
    await put(daemon.workspace, daemon.workspace.root, "file", DATA)
    monkeypatch.setattr(Workspace, "durable", False, raising=False)
    done = await daemon.run("umount", "--no-wait", daemon.where)
    assert done.returncode == 1 and b"would be lost: 1 file (4 KiB), 1 directory; leave out --no-wait" in done.stderr
    assert not daemon.control.detached.is_set()
    daemon.client.resume()


async def test_umount_without_waiting_leaves_the_rest_in_the_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Workspace, "durable", True, raising=False)
    async with running_daemon(tmp_path, monkeypatch) as daemon:
        daemon.control.state = "draining"  # as after the kernel's unmount
        daemon.client.pause()
        await put(daemon.workspace, daemon.workspace.root, "file", DATA)
        done: list[subprocess.CompletedProcess[bytes]] = []

        async def umount() -> None:
            with trio.CancelScope(shield=True):
                done.append(await daemon.run("umount", "--no-wait", daemon.where))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(umount)
    [ended] = done
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert ended.stdout.decode() == (
        f"{tmp_path}/folder: unmounted; left for the next mount to send: 1 file (4 KiB), 1 directory\n"
    )


async def test_ln_and_clone_in_a_mount(daemon: Daemon, tmp_path: Path) -> None:
    (tmp_path / "cap").write_text(f"{LiteralCap(b'hello')}\n")
    for arguments in (
        ("ln", f"@{tmp_path}/cap", "one"),
        ("clone", "one", "two"),
        ("clone", "./two", f"{daemon.where}/3"),
    ):
        done = await daemon.run(*arguments, cwd=daemon.where)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    done = await daemon.run("ln", "-", daemon.where / "4", stdin=str(LiteralCap(b"four")).encode())
    assert done.returncode == 0
    root = daemon.workspace.root
    assert {name: entry.target.data for name, entry in root.entries().items()} == {
        "one": b"hello",
        "two": b"hello",
        "3": b"hello",
        "4": b"four",
    }
    done = await daemon.run("clone", "--mutable", "mdmf", "one", "5", cwd=daemon.where)
    assert (done.returncode, done.stderr) == (0, b"")
    await daemon.workspace.wait()
    assert cap_of(daemon.workspace.root.get("5").target).kind == "mdmf"
    for arguments, code, said in (
        (("clone", "one", "two"), 1, "two: File exists"),
        (("clone", "nothing", "new"), 1, "nothing: no child named 'nothing'"),
        (("ln", f"@{tmp_path}/missing", "new"), 2, "cannot read a cap"),
        (("ln", "URI:CHK:nonsense", "new"), 4, "the cap is garbled"),
        (("ln", f"@{tmp_path}/cap", "new/below"), 1, "new/below: no child named 'new'"),
        (("clone", "one", tmp_path / "outside"), 1, "neither in a tahoefs mount of yours nor alias:path"),
        (("ln", f"@{tmp_path}/cap", "."), 1, ".: Is a directory"),
    ):
        done = await daemon.run(*arguments, cwd=daemon.where)
        line = done.stderr.decode().splitlines()[-1]
        assert (done.returncode, line.startswith("tahoefs: "), said in line) == (code, True, True), line
        assert b"nonsense" not in done.stderr


def test_words_and_numbers() -> None:
    assert in_words({"files": 0, "bytes": 0, "directories": 0}) == "nothing"
    assert in_words({"files": 2, "bytes": 3 << 20, "directories": 1}) == "2 files (3 MiB), 1 directory"
    assert in_words({"files": 0, "bytes": 0, "directories": 2}) == "2 directories"
    assert [human_bytes(count) for count in (0, 1023, 1536, 5 << 40)] == ["0 B", "1023 B", "1.5 KiB", "5 TiB"]
    assert [human_time(s) for s in (0.4, 99, 100, 5999, 7260)] == ["0 s", "99 s", "1:40 min", "99:59 min", "2:01 h"]


def test_nothing_is_drawn_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("sending") as progress:
        progress.pending({"files": 1, "bytes": 10, "directories": 0})
    assert capsys.readouterr() == ("", "") and progress.last is not None
