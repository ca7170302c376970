"""From nothing to a mounted folder with the commands alone; aliases; what a cap is; a mount's life."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
from pathlib import Path

import pytest

from tahoefs.mountpoint import FUSE_TYPE, filesystem_at, is_dead
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
