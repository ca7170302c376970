"""`mount.tahoefs`: what mount(8) may say to it; and `mount -t tahoefs`, by hand and from an fstab, without HOME."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tahoefs.cli import default_node_dir
from tahoefs.mount_helper import UsageError, parse_arguments
from tahoefs.mountpoint import FUSE_TYPE, filesystem_at
from tahoefs.options import OptionError
from tests.real.mounting import tahoefs
from tests.tahoefs.mounts import needs_fuse

BARE = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}  # what a program started at boot has: no HOME


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (["home:", "/mnt"], ()),
        (["home:", "/mnt", "-o", "rw"], ("rw",)),
        (["-o", "ro,poll=2", "home:", "/mnt"], ("ro", "poll=2")),
        (["home:", "/mnt", "-n", "-v", "-t", "fuse.tahoefs", "-o", "ro", "-o", "noatime"], ("ro", "noatime")),
        (
            ["home:", "/mnt", "-o", "noauto,_netdev,nofail,x-systemd.requires=a.service"],
            ("noauto", "_netdev", "nofail", "x-systemd.requires=a.service"),
        ),
        (["home:", "/mnt", "-s", "-o", "ro,nonsense,whatever=1"], ("ro",)),
    ],
)
def test_arguments(arguments: list[str], options: tuple[str, ...]) -> None:
    request = parse_arguments(arguments)
    assert (request.what, request.mountpoint, request.options) == ("home:", "/mnt", options)
    assert (request.node_dir, request.fake) == (None, False)


def test_options_of_its_own() -> None:
    request = parse_arguments(["-f", "home:", "/mnt", "-o", "node_dir=/srv/node,ro"])
    assert (request.node_dir, request.options, request.fake) == ("/srv/node", ("ro",), True)
    assert "secret" not in repr(parse_arguments(["URI:secret", "/mnt"]))


@pytest.mark.parametrize(
    "arguments", [[], ["home:"], ["a", "b", "c"], ["home:", "/mnt", "-x"], ["a:", "/b", "-N", "1"], ["-o"], ["-h"]]
)
def test_usage_errors(arguments: list[str]) -> None:
    with pytest.raises(UsageError):
        parse_arguments(arguments)


def test_an_unknown_option_is_named() -> None:
    with pytest.raises(OptionError, match="nonsense"):
        parse_arguments(["home:", "/mnt", "-o", "ro,nonsense"])
    with pytest.raises(OptionError, match="poll"):  # a wrong value is wrong even to -s
        parse_arguments(["home:", "/mnt", "-s", "-o", "poll=soon"])


def test_exit_codes(tmp_path: Path) -> None:
    def helper(*arguments: str) -> tuple[int, int]:
        command = [sys.executable, "-c", "from tahoefs.mount_helper import main; main()", *arguments]
        done = subprocess.run(command, env=BARE, capture_output=True, text=True, check=False)
        return done.returncode, len(done.stderr.splitlines())

    assert helper("one") == (1, 1)
    assert helper("nobody:", str(tmp_path), "-o", f"node_dir={tmp_path}/node") == (32, 1)
    assert helper("-f", "nobody:", str(tmp_path), "-o", f"node_dir={tmp_path}/node") == (32, 1)
    assert helper("-f", f"local:{tmp_path}/new", str(tmp_path / "missing")) == (32, 1)


@needs_fuse
def test_a_fake_mount_mounts_nothing(tmp_path: Path) -> None:
    where = tmp_path / "folder"
    where.mkdir()
    command = [
        sys.executable,
        "-c",
        "from tahoefs.mount_helper import main; main()",
        "-f",
        f"local:{tmp_path}/g",
        where,
    ]
    assert subprocess.run(command, env=BARE, check=False).returncode == 0
    assert filesystem_at(where) is None and not (tmp_path / "g").exists()


def test_home_is_looked_up_where_the_environment_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TAHOEFS_NODE_DIR", raising=False)
    with_home = default_node_dir()
    monkeypatch.delenv("HOME", raising=False)
    assert default_node_dir().is_absolute()
    if os.getuid() == 0 and with_home.parent == Path("/root"):
        assert default_node_dir() == with_home


@needs_fuse
@pytest.mark.usefixtures("helper_installed")
def test_mount_by_hand_and_from_an_fstab_without_home(tmp_path: Path) -> None:
    where, grid = tmp_path / "folder", tmp_path / "grid"
    where.mkdir()
    by_hand = ["mount", "-t", "tahoefs", f"local:{grid}", str(where), "-o", "poll=1,nosuid"]
    subprocess.run(by_hand, env=BARE, check=True)
    assert filesystem_at(where) == FUSE_TYPE
    (where / "file").write_bytes(b"written through mount(8)")
    tahoefs("umount", where)
    cap = (grid / "root.cap").read_text()
    alias = grid / "client" / "private" / "aliases"
    alias.write_text(f"home: {cap}")
    fstab = tmp_path / "fstab"
    fstab.write_text(f"local:{grid} {where} tahoefs ro,noauto,_netdev,nofail,x-systemd.automount 0 0\n")
    subprocess.run(["mount", "-T", fstab, str(where)], env=BARE, check=True)
    assert (where / "file").read_bytes() == b"written through mount(8)"
    with pytest.raises(OSError, match="Read-only"):
        (where / "other").write_bytes(b"")
    subprocess.run(["umount", str(where)], env=BARE, check=True)
    assert filesystem_at(where) is None
    failed = subprocess.run(
        ["mount", "-t", "tahoefs", f"local:{grid}", where, "-o", "nonsense"], env=BARE, capture_output=True, check=False
    )
    assert failed.returncode != 0 and b"nonsense" in failed.stderr
