"""What systemd is told, by a socket that listens as it does; and the units, by systemd's own checker."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tahoefs import sdnotify
from tahoefs.mountpoint import FUSE_TYPE, filesystem_at
from tests.real.mounting import tahoefs
from tests.tahoefs.mounts import needs_fuse

UNITS = Path(__file__).parents[2] / "contrib" / "systemd"
TIMEOUT_S = 120


@pytest.fixture
def listener(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(tmp_path / "notify"))
        receiver.settimeout(TIMEOUT_S)
        monkeypatch.setenv(sdnotify.VARIABLE, str(tmp_path / "notify"))
        yield receiver


def test_datagrams(listener: socket.socket) -> None:
    sdnotify.ready("all is well")
    assert listener.recv(1000) == b"READY=1\nSTATUS=all is well"
    sdnotify.stopping()
    assert listener.recv(1000) == b"STOPPING=1"


def test_abstract_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(f"\0tahoefs-test-{os.getpid()}")
        monkeypatch.setenv(sdnotify.VARIABLE, f"@tahoefs-test-{os.getpid()}")
        sdnotify.ready()
        assert receiver.recv(1000) == b"READY=1"


@pytest.mark.parametrize("address", [None, "", "relative", "/nonexistent/socket", "vsock:2:1"])
def test_nobody_to_tell(monkeypatch: pytest.MonkeyPatch, address: str | None) -> None:
    if address is None:
        monkeypatch.delenv(sdnotify.VARIABLE, raising=False)
    else:
        monkeypatch.setenv(sdnotify.VARIABLE, address)
    assert sdnotify.notify("READY=1") is False


def test_run_says_ready_and_ends_when_told(listener: socket.socket, tmp_path: Path) -> None:
    tahoefs("create-introducer", tmp_path / "node", "--port", f"tcp:{free_port()}:interface=127.0.0.1")
    command = [sys.executable, "-m", "tahoefs.cli", "run", tmp_path / "node"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        furl_file = tmp_path / "node" / "private" / "introducer.furl"
        assert re.fullmatch(rf"ready services=introducer port=\d+ furl_file={re.escape(str(furl_file))}\n", line)
        assert listener.recv(1000) == b"READY=1"
        process.send_signal(signal.SIGTERM)
        assert listener.recv(1000) == b"STOPPING=1"
        out, log = process.communicate(timeout=TIMEOUT_S)
        assert (process.returncode, out) == (0, "")
        assert "stopping" in log and furl_file.read_text().strip() not in log
    finally:
        process.kill()
        process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@needs_fuse
def test_a_mount_is_ready_when_it_lists_and_sends_everything_when_stopped(
    listener: socket.socket, tmp_path: Path
) -> None:
    """As `tahoefs@.service` runs it. What is told in between is for people to read."""
    where = tmp_path / "folder"
    where.mkdir()
    command = [sys.executable, "-m", "tahoefs.cli", "mount", "-f", f"local:{tmp_path}/grid", str(where), "-o", "rw"]

    def started() -> subprocess.Popen[bytes]:
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        while (told := listener.recv(1000)) != b"READY=1":
            assert told.startswith(b"STATUS=") and b"is mounted" not in told
        assert filesystem_at(where) == FUSE_TYPE
        return process

    for run in (1, 2):
        process = started()
        try:
            assert os.listdir(where) == [f"file{each}" for each in range(1, run)]
            (where / f"file{run}").write_bytes(b"just before the stop" * 1000)
            process.send_signal(signal.SIGTERM)
            assert process.wait(TIMEOUT_S) == 0
        finally:
            process.kill()
            process.wait()
        assert filesystem_at(where) is None
        listener.setblocking(False)
        while _told(listener):
            pass
        listener.settimeout(TIMEOUT_S)


def _told(listener: socket.socket) -> bytes:
    try:
        return listener.recv(1000)
    except BlockingIOError:
        return b""


@pytest.fixture
def units(tmp_path: Path) -> dict[str, Path]:
    """Copies that name programs which are there."""
    program = tmp_path / "tahoefs"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    copies = {}
    for unit in UNITS.iterdir():
        copies[unit.name] = tmp_path / unit.name
        copies[unit.name].write_text(unit.read_text().replace("/usr/local/bin/tahoefs", str(program)))
    return copies


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here")
def test_systemd_finds_nothing_wrong_with_the_units(units: dict[str, Path]) -> None:
    assert {"tahoefs@.service", "tahoefs-node@.service", "srv-grid.mount"} == set(units)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *units.values()], capture_output=True, text=True, check=False
    )
    ours = [line for line in done.stderr.splitlines() if any(name.partition(".")[0] in line for name in units)]
    assert (done.returncode, ours) == (0, [])


def test_what_the_units_rely_on() -> None:
    """A stop must reach the mount alone: the servers of a local grid are in its control group."""
    mount = (UNITS / "tahoefs@.service").read_text()
    assert "Type=notify" in mount and "KillMode=mixed" in mount and "TimeoutStopSec=infinity" in mount
    assert "mount -f" in mount
    where = re.search(r"Where=(.*)", (UNITS / "srv-grid.mount").read_text())
    assert where is not None and where[1].strip("/").replace("/", "-") == "srv-grid"


SYSTEMD = Path("/lib/systemd/systemd")
SESSION = r"""
set -e
mount --make-rprivate /
mount -t tmpfs tmpfs /run
mkdir -p /run/systemd/system /run/user
chmod 700 /run/user
export XDG_RUNTIME_DIR=/run/user SYSTEMD_UNIT_PATH=$1 SYSTEMD_GENERATOR_PATH=/nonexistent DBUS_SESSION_BUS_ADDRESS=
"$2" --user --log-target=console >"$1/../systemd.log" 2>&1 &
systemd=$!
until systemctl --user list-units >/dev/null 2>&1; do kill -0 $systemd; sleep 0.1; done
"""


def under_systemd(tmp_path: Path, script: str) -> str:
    """What a shell script says that runs beside a systemd of its own: a user's instance, in a mount namespace."""
    if os.getuid() != 0 or not SYSTEMD.exists() or shutil.which("unshare") is None:
        pytest.skip("neither root, nor a systemd and unshare to start it with")
    for target in ("default", "basic", "shutdown", "network-online"):
        (tmp_path / "units" / f"{target}.target").write_text("[Unit]\n")
    # with the shell, which is the first process of its own space, all others end
    command = [
        "unshare",
        "--mount",
        "--pid",
        "--fork",
        "--mount-proc",
        "bash",
        "-c",
        SESSION + script,
        "bash",
        tmp_path / "units",
        SYSTEMD,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    log = tmp_path / "systemd.log"
    if "Failed to allocate manager object" in log.read_text() or "Failed to create" in log.read_text():
        pytest.skip(f"no systemd can run here: {log.read_text().splitlines()[0]}")
    assert done.returncode == 0, done.stderr + log.read_text()
    return done.stdout


@pytest.fixture
def started_units(tmp_path: Path) -> Path:
    """The units, with programs and settings where they are here, without what only the system's instance can do."""
    program = Path(sys.executable).with_name("tahoefs")
    if not program.exists():
        pytest.skip("tahoefs is not installed beside this Python")
    (tmp_path / "units").mkdir()
    (tmp_path / "mnt").mkdir()
    for unit in UNITS.iterdir():
        text = unit.read_text().replace("/usr/local/bin/tahoefs", str(program))
        text = text.replace("/etc/tahoefs", str(tmp_path)).replace("/var/lib/tahoefs", str(tmp_path))
        text = re.sub(r"(?m)^(User|Protect\w*|Private\w*|ReadWritePaths|NoNewPrivileges|Restrict\w*)=.*\n", "", text)
        (tmp_path / "units" / unit.name).write_text(text)
    return tmp_path


@needs_fuse
def test_a_real_systemd_starts_and_stops_a_mount(started_units: Path) -> None:
    """Started: the folder lists. Stopped: what was written a moment before is on the grid."""
    where, grid = started_units / "mnt", started_units / "grid"
    (started_units / "it.conf").write_text(f"WHAT=local:{grid}\nMOUNTPOINT={where}\nOPTIONS=poll=1\n")
    said = under_systemd(
        started_units,
        f"""
        systemctl --user start tahoefs@it
        ls {where}
        head -c 3000000 /dev/zero | tr '\\0' x >{where}/file
        systemctl --user stop tahoefs@it
        systemctl --user show tahoefs@it -p Result -p ActiveState
        ls {where}
        systemctl --user start tahoefs@it
        wc -c <{where}/file
        systemctl --user stop tahoefs@it
        """,
    )
    assert said.split() == ["Result=success", "ActiveState=inactive", "3000000"]


def test_a_real_systemd_starts_and_stops_a_node(started_units: Path) -> None:
    node = started_units / "intro"
    tahoefs("create-introducer", node, "--port", f"tcp:{free_port()}:interface=127.0.0.1")
    said = under_systemd(
        started_units,
        """
        systemctl --user start tahoefs-node@intro
        systemctl --user show tahoefs-node@intro -p ActiveState -p SubState
        systemctl --user stop tahoefs-node@intro
        systemctl --user show tahoefs-node@intro -p Result -p ActiveState
        """,
    )
    assert set(said.split()) == {"ActiveState=active", "SubState=running", "Result=success", "ActiveState=inactive"}


@needs_fuse
@pytest.mark.usefixtures("helper_installed")
@pytest.mark.skipif(shutil.which("systemd-escape") is None, reason="no systemd-escape here")
def test_a_real_systemd_mounts_by_a_mount_unit(started_units: Path) -> None:
    where = started_units / "mnt"
    name = subprocess.run(
        ["systemd-escape", "--path", "--suffix=mount", where], capture_output=True, text=True, check=True
    ).stdout.strip()
    text = (started_units / "units" / "srv-grid.mount").read_text()
    text = re.sub("What=.*", f"What=local:{started_units}/grid", text).replace("Where=/srv/grid", f"Where={where}")
    text = re.sub("Options=.*", "Options=_netdev,poll=1", text)
    (started_units / "units" / name).write_text(text)
    said = under_systemd(
        started_units,
        f"""
        systemctl --user start '{name}'
        echo written >{where}/file
        {sys.executable} -m tahoefs.cli sync {where}
        systemctl --user stop '{name}'
        ls {where}
        systemctl --user start '{name}'
        cat {where}/file
        systemctl --user stop '{name}'
        """,
    )
    assert said.split() == ["written"]
