"""From nothing to a mounted folder with the commands alone; aliases; what a cap is; a mount's life."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tahoefs.mountpoint import FUSE_TYPE, filesystem_at, is_dead
from tahoefs.registry import find_mount
from tests.real.mounting import Mount, Mounter, can_mount, tahoefs
from tests.real.tahoe_grid import TahoeGrid, free_ports, wait_until

pytestmark = [pytest.mark.interop, pytest.mark.mount]


def test_from_nothing_to_a_folder(real_grid: TahoeGrid, tmp_path: Path) -> None:
    """create-client, create-alias, mount, write, umount; and the real client sees the file."""
    if (reason := can_mount()) is not None:
        pytest.skip(reason)
    node, where = tmp_path / "node", tmp_path / "folder"
    where.mkdir()
    tahoefs("create-client", node, "--introducer", real_grid.introducer_furl)
    assert stat.S_IMODE((node / "private").stat().st_mode) == 0o700
    tahoefs("create-alias", "-d", node, "home")
    tahoefs("mount", "home:", where, "-d", node)
    (where / "hello").write_bytes(b"hello, grid")
    listed = json.loads(tahoefs("status", "--json").stdout)["mounts"]
    assert str(where) in {each["mountpoint"] for each in listed}
    (where / "below").mkdir()
    assert json.loads(tahoefs("status", where / "below", "--json").stdout)["mountpoint"] == str(where)
    tahoefs("umount", where)
    assert filesystem_at(where) is None
    cap = json.loads(tahoefs("list-aliases", "-d", node, "--json").stdout)["home"]
    assert real_grid.get(cap, "hello") == b"hello, grid"
    again = tahoefs("create-alias", "-d", node, "home", check=False)
    assert (again.returncode, json.loads(tahoefs("list-aliases", "-d", node, "--json").stdout)["home"]) == (1, cap)


def test_the_real_client_takes_our_node_directory(real_grid: TahoeGrid, tmp_path: Path) -> None:
    """The real program runs on a node directory that we made, and lists the alias that we added."""
    node = tmp_path / "node"
    tahoefs("create-client", node, "--introducer", real_grid.introducer_furl)
    tahoefs("create-alias", "-d", node, "mine")
    config = (node / "tahoe.cfg").read_text()
    assert "web.port = tcp:3456:" in config
    (node / "tahoe.cfg").write_text(config.replace("tcp:3456:", f"tcp:{free_ports(1)[0]}:"))
    with (tmp_path / "log").open("wb") as log:
        running = subprocess.Popen(
            [real_grid.tahoe, "run", "--allow-stdin-close", node], stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    try:
        wait_until((node / "node.url").exists, "the real client on our node directory")
        list_it = [real_grid.tahoe, "-d", node, "ls", "mine:"]
        wait_until(lambda: subprocess.run(list_it, capture_output=True, check=False).returncode == 0, "its listing")
    finally:
        running.kill()
        running.wait()


def test_aliases_and_caps(real_grid: TahoeGrid, tmp_path: Path, root_cap: str) -> None:
    node = tmp_path / "node"
    tahoefs("create-client", node, "--introducer", real_grid.introducer_furl)
    info = real_grid.json(root_cap)[1]
    (tmp_path / "cap").write_text(root_cap + "\n")
    tahoefs("add-alias", "-d", node, "theirs", f"@{tmp_path / 'cap'}")
    tahoefs("add-alias", "-d", node, "readonly", "-", stdin=info["ro_uri"])
    told = json.loads(tahoefs("cap", "theirs:", "-d", node, "--json").stdout)
    assert (told["cap"], told["readonly_cap"], told["verify_cap"]) == (root_cap, info["ro_uri"], info["verify_uri"])
    assert (told["kind"], told["writeable"]) == ("dir-sdmf", True)
    told = json.loads(tahoefs("cap", "readonly:", "-d", node, "--json").stdout)
    assert (told["cap"], told["writeable"]) == (info["ro_uri"], False)
    bad = tahoefs("add-alias", "-d", node, "file", "-", stdin=real_grid.put(b"x" * 100), check=False)
    assert bad.returncode == 4
    garbled = tahoefs("cap", "-", stdin="URI:CHK:xyzzy", check=False)
    assert (garbled.returncode, "xyzzy" in garbled.stderr) == (4, False)


def test_killed_daemon_leaves_a_mount_point_that_mounts_again(
    real_grid: TahoeGrid, root_cap: str, mounted: Mounter, node_dir: Path
) -> None:
    real_grid.put_at(root_cap, "file", b"x")
    with mounted(root_cap) as mount:
        os.kill(mount.pid, signal.SIGKILL)
        wait_until(lambda: is_dead(mount.path), "the kernel to notice", 30)
        tahoefs("mount", "-", mount.path, "-d", node_dir, stdin=root_cap)
        assert (mount.path / "file").read_bytes() == b"x"
        assert Mount(mount.path).pid != mount.pid


def test_terminated_daemon_sends_what_is_unsent(real_grid: TahoeGrid, root_cap: str, mounted: Mounter) -> None:
    """SIGTERM, as systemd sends it: unmounted, sent, ended."""
    with mounted(root_cap, drain=False) as mount:
        (mount.path / "file").write_bytes(b"written just before the end" * 100)
        os.kill(mount.pid, signal.SIGTERM)
        wait_until(lambda: not Path(f"/proc/{mount.pid}").exists() or _is_zombie(mount.pid), "the daemon's end", 60)
        assert filesystem_at(mount.path) != FUSE_TYPE
    assert real_grid.get(root_cap, "file") == b"written just before the end" * 100


def test_a_copy_of_the_mount_elsewhere_does_not_hold_up_umount(
    real_grid: TahoeGrid, root_cap: str, mounted: Mounter
) -> None:
    """A container or a service with mounts of its own keeps the file system in use: the kernel says nothing then."""
    if os.getuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("needs unshare, and root, to make a mount namespace")
    with mounted(root_cap, drain=False) as mount:
        elsewhere = subprocess.Popen(
            ["unshare", "--mount", "--propagation", "private", "sh", "-c", "echo made; exec sleep 600"],
            stdout=subprocess.PIPE,
        )
        try:
            assert elsewhere.stdout is not None
            if elsewhere.stdout.readline() != b"made\n":
                pytest.skip("no mount namespace can be made here (in a chroot, or forbidden)")
            (mount.path / "file").write_bytes(b"sent all the same" * 100)
            tahoefs("umount", mount.path)
        finally:
            elsewhere.kill()
            elsewhere.communicate()
    assert filesystem_at(mount.path) != FUSE_TYPE
    assert real_grid.get(root_cap, "file") == b"sent all the same" * 100


def _is_zombie(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def test_no_cap_in_the_process_list_or_the_log(
    real_grid: TahoeGrid, root_cap: str, mounted: Mounter, node_dir: Path
) -> None:
    with mounted(root_cap) as mount:
        (mount.path / "file").write_bytes(b"y" * 1000)
        mount.sync()
        secret = root_cap.split(":")[2]
        assert secret not in Path(f"/proc/{mount.pid}/cmdline").read_text()
        assert secret not in Path(f"/proc/{mount.pid}/environ").read_text(errors="replace")
        log = mount.log(node_dir)
    assert secret not in log and "URI:" not in log and "pb://" not in log


def test_ln_and_clone_in_a_mount_and_without(
    real_grid: TahoeGrid, root_cap: str, mounted: Mounter, tmp_path: Path
) -> None:
    """What is linked and cloned, the real client sees; a clone stays as it is when the original changes."""
    theirs = real_grid.mkdir()
    real_grid.put_at(theirs, "deep/mutable", b"first", "sdmf")
    real_grid.put_at(theirs, "deep/file", b"x" * 1000)
    (tmp_path / "theirs").write_text(theirs)
    other = real_grid.mkdir()
    node = tmp_path / "node"
    tahoefs("create-client", node, "--introducer", real_grid.introducer_furl)
    (node / "private" / "aliases").write_text(f"other: {other}\n")
    with mounted(root_cap) as mount:
        (mount.path / "new").mkdir()
        (mount.path / "new" / "pending").write_bytes(b"y" * 1000)
        (mount.path / "new" / "link").symlink_to("pending")
        tahoefs("ln", f"@{tmp_path}/theirs", mount.path / "linked")
        tahoefs("clone", mount.path / "linked", mount.path / "cloned")
        tahoefs("clone", mount.path / "new", mount.path / "copy")
        assert (mount.path / "copy" / "link").read_bytes() == b"y" * 1000  # seen at once
        real_grid.put_at(theirs, "deep/mutable", b"second", "sdmf")
        assert (mount.path / "cloned" / "deep" / "mutable").read_bytes() == b"first"
        tahoefs("clone", mount.path / "copy", "other:", "-d", node)  # from a mount, to where there is none
        tahoefs("clone", "other:copy/pending", mount.path / "back", "-d", node)
        tahoefs("ln", f"@{tmp_path}/theirs", "other:theirs", "-d", node)
        tahoefs("clone", "other:theirs/deep", "other:copy", "-d", node)
        tahoefs("clone", "--mutable", "mdmf", mount.path / "linked", mount.path / "converted")
        tahoefs("clone", "--mutable", "none", "other:theirs/deep", "other:frozen", "-d", node)
        refused = tahoefs("ln", f"@{tmp_path}/theirs", "other:theirs/deep/file", "-d", node, check=False)
        assert (refused.returncode, refused.stderr) == (1, "tahoefs: other:theirs/deep/file: File exists\n")
        assert (mount.path / "back").read_bytes() == b"y" * 1000
    assert real_grid.get(root_cap, "cloned/deep/mutable") == b"first"
    assert real_grid.get(root_cap, "linked/deep/mutable") == b"second"
    assert real_grid.get(root_cap, "copy/pending") == b"y" * 1000
    for cap, path, kind, contents in (
        (root_cap, "converted/deep/file", "MDMF", b"x" * 1000),
        (root_cap, "converted/deep/mutable", "MDMF", b"second"),
        (other, "frozen/mutable", "CHK", b"second"),
    ):
        assert (real_grid.json(cap, path)[1]["format"], real_grid.get(cap, path)) == (kind, contents)
    for path, contents in (
        ("copy/deep/mutable", b"second"),
        ("theirs/deep/file", b"x" * 1000),
        ("copy/link", b"pending"),
    ):
        assert real_grid.get(other, path) == contents


def test_status_and_sync_tell_what_is_not_sent(real_grid: TahoeGrid, root_cap: str, mounted: Mounter) -> None:
    with mounted(root_cap) as mount:
        with real_grid.hung(range(10)):
            (mount.path / "file").write_bytes(b"z" * 100_000)
            status = mount.status()
            assert status["pending"] == {"files": 1, "bytes": 100_000, "directories": 1}
            [upload] = status["uploads"]
            assert (upload["name"], upload["bytes"], upload["shares_placed"]) == ("file", 100_000, 0)
            late = tahoefs("sync", mount.path, "--timeout", "1", check=False)
            assert (
                late.returncode == 3 and "not on the grid: 1 file (97.7 KiB), 1 directory, such as file" in late.stderr
            )
        mount.sync()
        status = mount.status()
        assert status["pending"] == {"files": 0, "bytes": 0, "directories": 0}
        assert status["throughput"]["pushed_bytes"] >= 100_000 * 10 // 3


def test_umount_without_waiting_leaves_the_rest_to_the_next_mount(
    real_grid: TahoeGrid, root_cap: str, mounted: Mounter
) -> None:
    contents = b"left in the journal" * 1000
    with mounted(root_cap, drain=False) as mount, real_grid.hung(range(10)):
        (mount.path / "file").write_bytes(contents)
        said = tahoefs("umount", "--no-wait", mount.path).stdout
        assert said.endswith("unmounted; left for the next mount to send: 1 file (18.6 KiB), 1 directory\n")
        assert filesystem_at(mount.path) is None
    with mounted(root_cap) as mount:
        assert (mount.path / "file").read_bytes() == contents
        mount.sync()
        assert real_grid.get(root_cap, "file") == contents


def test_ctrl_c_of_a_mount_in_the_foreground(
    real_grid: TahoeGrid, root_cap: str, node_dir: Path, tmp_path: Path
) -> None:
    """The first sends what is unsent, the second leaves that to the journal."""
    if (reason := can_mount()) is not None:
        pytest.skip(reason)
    where = tmp_path / "mnt1"
    where.mkdir()
    with subprocess.Popen(
        [sys.executable, "-m", "tahoefs.cli", "mount", "-f", "-", where, "-d", node_dir],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None and process.stderr is not None
        process.stdin.write(root_cap)
        process.stdin.close()
        wait_until(lambda: filesystem_at(where) == FUSE_TYPE and find_mount(where), "the mount")
        with real_grid.hung(range(10)):
            (where / "file").write_bytes(b"w" * 1000)
            process.send_signal(signal.SIGINT)
            wait_until(lambda: filesystem_at(where) is None, "it to be unmounted")
            wait_until(lambda: b"draining" in tahoefs("status", where, "--json").stdout.encode(), "it to drain")
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 1
        said = process.stderr.read()
    assert "sending 1 file (1000 B), 1 directory" in said
    assert said.splitlines()[-1] == (
        "tahoefs: stopped before this was sent: 1 file (1000 B), 1 directory, such as file;"
        " it is in the journal, and is sent by the next mount"
    )
