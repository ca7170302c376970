"""What the real client sees of names and attributes made here, and what becomes of the metadata it wrote itself."""

from __future__ import annotations

import base64
import hashlib
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from attrs import frozen

from tests.real.mounting import Mounter, tahoefs
from tests.real.tahoe_grid import TahoeGrid, wait_until
from tests.tahoefs.posix_calls import RENAME_EXCHANGE, renameat2
from tests.tahoefs.posix_machine import digests, run_machine

pytestmark = [pytest.mark.interop, pytest.mark.mount]

EXAMPLES = 300 if os.environ.get("TAHOEFS_SOAK") else 12
STEPS = 25
MTIME_NS = 1_500_000_000_123_456_789
CONTENTS = b"more than the 55 bytes that fit into a literal cap, so it has shares"
# The entries that the real client makes here have all this, the `tahoe` part too.
FOREIGN: dict[str, Any] = {
    "mtime": 1_000_000_000.5,
    "ctime": 1_000_000_001,
    "colour": "r\u00f6t",
    "another-program": {"nested": [1, {"deeper": None}], "tahoe": {"linkmotime": 0}},
    "tahoefs": {"of a later version": {"a": 1}},
    "tahoe": {"linkcrtime": 1_100_000_000.25, "linkmotime": 1_200_000_000.25, "of a later version": [1]},
}


# --- ours, seen by the real client -------------------------------------------------------------------------------


def test_everything_that_is_not_a_file_shows_as_a_small_file(
    real_grid: TahoeGrid, root_cap: str, mounted: Mounter
) -> None:
    """A link holds its target, FIFOs and sockets are empty; the real client moves them, and they are what they were."""
    targets = {"link": "file", "dangling": "../not/there", "long": "a/" * 200 + "ü"}
    with mounted(root_cap) as mount:
        for name, target in targets.items():
            (mount.path / name).symlink_to(target)
        os.mkfifo(mount.path / "fifo")
        os.mknod(mount.path / "socket", stat.S_IFSOCK | 0o600)
        (mount.path / "fifo").chmod(0o620)
        os.utime(mount.path / "link", ns=(0, MTIME_NS), follow_symlinks=False)
    types = {"fifo": "fifo", "socket": "socket"} | dict.fromkeys(targets, "symlink")
    own = {}
    for name, kind, info in real_grid.walk(root_cap):
        data = targets.get(name, "").encode()
        assert (kind, info["size"]) == ("filenode", len(data)), name
        assert real_grid.get(root_cap, name) == data
        own[name] = info["metadata"]["tahoefs"]
    assert {name: part["type"] for name, part in own.items()} == types
    assert (own["fifo"]["mode"], own["link"]["mtime_ns"]) == (0o620, MTIME_NS)
    for name in types:
        real_grid.rename(root_cap, name, f"moved-{name}")
    with mounted(root_cap) as mount:
        for name, target in targets.items():
            assert str((mount.path / f"moved-{name}").readlink()) == target
        assert (mount.path / "moved-link").lstat().st_mtime_ns == MTIME_NS
        assert (mount.path / "moved-fifo").lstat().st_mode == stat.S_IFIFO | 0o620
        assert stat.S_ISSOCK((mount.path / "moved-socket").lstat().st_mode)


def test_attributes_are_metadata_and_nothing_else(real_grid: TahoeGrid, root_cap: str, mounted: Mounter) -> None:
    """Equal contents have equal caps whatever their attributes; the listing of the real client shows what was set."""
    values = {"user.colour": b"\x00red\xff", "user.\u00fc": b""}
    with mounted(root_cap) as mount:
        (mount.path / "plain").write_bytes(CONTENTS)
        (mount.path / "dressed").write_bytes(CONTENTS)
        (mount.path / "folder").mkdir()
        (mount.path / "folder" / "inside").write_bytes(b"small")
        for name in ("dressed", "folder", "folder/inside"):
            for attribute, value in values.items():
                os.setxattr(mount.path / name, attribute, value)
            (mount.path / name).chmod(0o4750)
            os.utime(mount.path / name, ns=(0, MTIME_NS))
    found = {path: (kind, info) for path, kind, info in real_grid.walk(root_cap)}
    kinds = {"plain": "filenode", "dressed": "filenode", "folder": "dirnode", "folder/inside": "filenode"}
    assert {path: kind for path, (kind, _) in found.items()} == kinds
    assert found["plain"][1]["ro_uri"] == found["dressed"][1]["ro_uri"]
    for path in ("dressed", "folder", "folder/inside"):
        metadata = found[path][1]["metadata"]
        own = metadata["tahoefs"]
        assert set(metadata) == {"tahoe", "tahoefs"}
        assert (own["mode"], own["mtime_ns"]) == (0o4750, MTIME_NS)
        assert {name: base64.b64decode(text) for name, text in own["xattrs"].items()} == values
    assert real_grid.get(root_cap, "dressed") == CONTENTS
    assert real_grid.get(root_cap, "folder/inside") == b"small"


# --- theirs, after our changes -----------------------------------------------------------------------------------


def rewrite(path: Path) -> None:
    path.write_bytes(b"other contents, " + CONTENTS)


def write_inside(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(3)
        file.write(b"!")


Change = Callable[[Path], None]
OF_ATTRIBUTES: dict[str, Change] = {
    "chmod": lambda path: path.chmod(0o640),
    "chown": lambda path: os.chown(path, os.getuid(), os.getgid()),
    "utime": lambda path: os.utime(path, ns=(0, MTIME_NS)),
    "setxattr": lambda path: os.setxattr(path, "user.colour", b"blue"),
}
OF_CONTENTS: dict[str, Change] = {
    "rewrite": rewrite,
    "write-inside": write_inside,
    "truncate": lambda path: os.truncate(path, 2),
}
OF_NAMES = {  # where the name goes
    "rename": "renamed-{}",
    "move": "theirs/{}",
    "move-into-new": "ours/{}",
    "exchange": "partner-{}",
}
KINDS = {  # which changes each of them takes
    "literal": (*OF_ATTRIBUTES, *OF_CONTENTS, *OF_NAMES),
    "immutable": (*OF_ATTRIBUTES, *OF_CONTENTS, *OF_NAMES),
    "sdmf": (*OF_ATTRIBUTES, *OF_CONTENTS, *OF_NAMES),
    "directory": (*OF_ATTRIBUTES, *OF_NAMES),
    "unknown": tuple(OF_NAMES),
}


def their_entry(grid: TahoeGrid, kind: str) -> list[Any]:
    """A child with FOREIGN metadata, as the web API takes it."""
    if kind == "unknown":
        return ["unknown", {"ro_uri": "ro.lafs://from_the_future", "metadata": FOREIGN}]
    if kind == "directory":
        return ["dirnode", {"rw_uri": grid.mkdir(), "metadata": FOREIGN}]
    cap = grid.put(b"tiny" if kind == "literal" else CONTENTS, "SDMF" if kind == "sdmf" else "CHK")
    return ["filenode", {"rw_uri" if kind == "sdmf" else "ro_uri": cap, "metadata": FOREIGN}]


def others_part(metadata: dict[str, Any]) -> dict[str, Any]:
    """What is neither ours nor of the `tahoe` part, and what a later version of ours may have put into our part."""
    rest = {key: value for key, value in metadata.items() if key not in ("tahoe", "tahoefs")}
    return rest | {"ours, later": metadata["tahoefs"]["of a later version"]}


def test_what_other_clients_noted_stays(real_grid: TahoeGrid, mounted: Mounter) -> None:
    """Whatever is changed here, for every kind of entry. The `tahoe` part becomes what the real client makes of it."""
    names = {f"{kind}-{change}": (kind, change) for kind, changes in KINDS.items() for change in changes}
    children = {name: their_entry(real_grid, kind) for name, (kind, _) in names.items()}
    children |= {"control": their_entry(real_grid, "literal"), "untouched": their_entry(real_grid, "literal")}
    children["theirs"] = ["dirnode", {"rw_uri": real_grid.mkdir()}]
    root_cap = real_grid.mkdir_with_children(children)
    began = time.time()
    real_grid.rename(root_cap, "control", "renamed-control")
    with mounted(root_cap) as mount:
        (mount.path / "ours").mkdir()
        for name, (_, change) in names.items():
            path = mount.path / name
            if change in OF_NAMES:
                new = mount.path / OF_NAMES[change].format(name)
                if change == "exchange":
                    new.write_bytes(b"the partner")
                renameat2(path, new, RENAME_EXCHANGE if change == "exchange" else 0)
            else:
                (OF_ATTRIBUTES | OF_CONTENTS)[change](path)
        mount.sync()
        found = {path: info["metadata"] for path, _, info in real_grid.walk(root_cap)}
    assert found["untouched"] == FOREIGN
    for name, (_, change) in names.items():
        metadata = found[OF_NAMES.get(change, "{}").format(name)]
        assert others_part(metadata) == others_part(FOREIGN), name
        times = metadata["tahoe"]
        assert began <= times.pop("linkmotime") <= time.time(), name
        if change in OF_NAMES:  # a new link, to every client
            assert times.keys() | {"linkmotime"} == found["renamed-control"]["tahoe"].keys(), name
            assert began <= times["linkcrtime"] <= time.time(), name
        else:
            assert times == {key: FOREIGN["tahoe"][key] for key in ("linkcrtime", "of a later version")}, name


def test_what_another_client_notes_meanwhile_stays(real_grid: TahoeGrid, root_cap: str, mounted: Mounter) -> None:
    """Metadata that the real client changes under a running mount; its time tells when it was seen here."""
    cap = real_grid.put_at(root_cap, "file", CONTENTS)
    with mounted(root_cap, "poll=1") as mount:
        (mount.path / "file").chmod(0o640)
        mount.sync()
        noted = real_grid.json(root_cap, "file")[1]["metadata"]
        theirs = {"colour": "blue", "tahoefs": noted["tahoefs"] | {"mtime_ns": MTIME_NS}}
        real_grid.set_children(root_cap, {"file": ["filenode", {"ro_uri": cap, "metadata": theirs}]})
        wait_until(lambda: (mount.path / "file").stat().st_mtime_ns == MTIME_NS, "their change to be seen here", 30)
        os.setxattr(mount.path / "file", "user.one", b"1")
        mount.sync()
        metadata = real_grid.json(root_cap, "file")[1]["metadata"]
    assert metadata["colour"] == "blue"
    assert (metadata["tahoefs"]["mode"], metadata["tahoefs"]["mtime_ns"]) == (0o640, MTIME_NS)
    assert metadata["tahoe"]["linkcrtime"] == noted["tahoe"]["linkcrtime"]
    assert metadata["tahoe"]["linkmotime"] > noted["tahoe"]["linkmotime"]


@pytest.mark.parametrize("change", ["chmod", "rewrite"])
def test_what_another_client_noted_unseen_stays(
    real_grid: TahoeGrid, root_cap: str, mounted: Mounter, change: str
) -> None:
    """The same, before this mount could know; what both changed is as we changed it."""
    cap = real_grid.put_at(root_cap, "file", CONTENTS)
    with mounted(root_cap, "poll=300") as mount:
        (mount.path / "file").chmod(0o600)
        mount.sync()
        theirs = {"colour": "blue", "tahoefs": {"mode": 0o644}}
        real_grid.set_children(root_cap, {"file": ["filenode", {"ro_uri": cap, "metadata": theirs}]})
        (OF_ATTRIBUTES | OF_CONTENTS)[change](mount.path / "file")
        mount.sync()
        metadata = real_grid.json(root_cap, "file")[1]["metadata"]
    assert metadata["colour"] == "blue"
    assert metadata["tahoefs"]["mode"] == (0o640 if change == "chmod" else 0o600)


def test_what_another_client_notes_of_an_open_file_stays(real_grid: TahoeGrid, root_cap: str, mounted: Mounter) -> None:
    """It is stored when it is closed, with what was noted since it was first written to."""
    cap = real_grid.put_at(root_cap, "file", CONTENTS)
    with mounted(root_cap, "poll=1") as mount:
        with (mount.path / "file").open("ab", buffering=0) as file:
            file.write(b"more")
            os.fchmod(file.fileno(), 0o600)
            child = ["filenode", {"ro_uri": cap, "metadata": {"colour": "blue"}}]
            real_grid.set_children(root_cap, {"file": child, "seen": child})
            wait_until(lambda: "seen" in os.listdir(mount.path), "their change to be seen here", 30)
        mount.sync()
        metadata = real_grid.json(root_cap, "file")[1]["metadata"]
        assert real_grid.get(root_cap, "file") == CONTENTS + b"more"
    assert (metadata["colour"], metadata["tahoefs"]["mode"]) == ("blue", 0o600)


# --- anything, in any order --------------------------------------------------------------------------------------


@frozen
class Remountable:
    """A mount as `run_machine` wants it."""

    path: Path
    cap: str
    node_dir: Path

    def remount(self) -> None:
        tahoefs("umount", self.path)
        tahoefs("mount", "-", self.path, "-d", self.node_dir, stdin=self.cap)


def test_a_mount_of_a_real_grid_answers_as_the_local_disk_does(
    real_grid: TahoeGrid, root_cap: str, mounted: Mounter, node_dir: Path, tmp_path: Path
) -> None:
    """Random calls on both, and in the end the real client finds what is on the local disk: contents, types, modes."""
    local = tmp_path / "local"
    local.mkdir()
    with mounted(root_cap) as mount:
        run_machine(Remountable(mount.path, root_cap, node_dir), local, examples=EXAMPLES, steps=STEPS)
    contents, attributes = {}, {}
    for path, kind, info in real_grid.walk(root_cap):
        own = info["metadata"]["tahoefs"]
        contents[path] = None if kind == "dirnode" else hashlib.sha256(real_grid.get(info["ro_uri"])).hexdigest()
        attributes[path] = (own.get("type"), own["mode"])
    assert len(contents) > EXAMPLES
    assert contents == digests(local)
    assert attributes == {path: of_local(local / path) for path in contents}


def of_local(path: Path) -> tuple[str | None, int]:
    """(type as our metadata calls it, permissions)."""
    mode = path.lstat().st_mode
    return {stat.S_IFLNK: "symlink", stat.S_IFIFO: "fifo"}.get(stat.S_IFMT(mode)), stat.S_IMODE(mode)
