"""Where a mount differs from a local file system on purpose: one table. Each line is shown on both, and has its reason.

`SEMANTICS.md` says the same to users: its section on differences must name each line here.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from attrs import frozen

from tests.tahoefs.posix_calls import (
    FALLOC_KEEP_SIZE,
    FALLOC_PUNCH_HOLE,
    RENAME_WHITEOUT,
    fallocate,
    needs_root,
    opened,
    outcome,
    renameat2,
)

MIB = 1 << 20
SEMANTICS = Path(__file__).parents[2] / "SEMANTICS.md"


@frozen
class Difference:
    call: Callable[[Path], object]
    local: object  # what it gives on ext4, the control
    mount: object  # on a mount
    reason: str


def answer(call: Callable[[], object]) -> Callable[[Path], object]:
    return lambda place: outcome(call)


def sparse(place: Path) -> Path:
    with opened(place / "sparse", os.O_RDWR | os.O_CREAT) as descriptor:
        os.pwrite(descriptor, b"x", 8 * MIB)
    return place / "sparse"


def first_data(place: Path) -> int:
    with opened(sparse(place)) as descriptor:
        return os.lseek(descriptor, 0, os.SEEK_DATA)


def first_hole(place: Path) -> int:
    with opened(sparse(place)) as descriptor:
        return os.lseek(descriptor, 0, os.SEEK_HOLE)


def with_file(place: Path, call: Callable[[int], object]) -> str:
    with opened(place / "file") as descriptor:
        return outcome(lambda: call(descriptor))


def decomposed(place: Path) -> list[str]:
    (place / "u\u0308").touch()
    return sorted(name.encode("unicode-escape").decode() for name in os.listdir(place) if name != "file")


def read_moves_atime(place: Path) -> bool:
    if os.statvfs(place).f_flag & os.ST_NOATIME:
        pytest.skip("the local file system does not note times of access either")
    os.utime(place / "file", ns=(1, 2))
    (place / "file").read_bytes()
    return (place / "file").stat().st_atime_ns != 1


DIFFERENCES = {
    "hard links": Difference(
        lambda p: outcome(lambda: os.link(p / "file", p / "second")),
        "OK",
        "EPERM",
        "attributes are kept with names, so two names cannot have one set of them",
    ),
    "device nodes": Difference(
        lambda p: outcome(lambda: os.mknod(p / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))),
        "OK",
        "EPERM",
        "who mounts a folder of somebody else's should not find devices there",
    ),
    "whiteouts": Difference(
        lambda p: outcome(lambda: renameat2(p / "file", p / "other", RENAME_WHITEOUT)),
        "OK",
        "EINVAL",
        "they are device nodes",
    ),
    "O_TMPFILE": Difference(
        lambda p: outcome(lambda: os.close(os.open(p, os.O_TMPFILE | os.O_RDWR))),
        "OK",
        "ENOTSUP",
        "the FUSE binding does not pass the call on; programs then make a named file and remove it",
    ),
    "fallocate": Difference(
        lambda p: with_file(p, lambda fd: fallocate(fd, FALLOC_KEEP_SIZE, 0, MIB)),
        "OK",
        "ENOTSUP",
        "the FUSE binding does not pass the call on; posix_fallocate(3) writes instead, which works",
    ),
    "punched holes": Difference(
        lambda p: with_file(p, lambda fd: fallocate(fd, FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE, 0, 1)),
        "OK",
        "ENOTSUP",
        "the same call",
    ),
    "SEEK_DATA": Difference(first_data, 8 * MIB, 0, "the FUSE binding does not pass the call on: all is data"),
    "SEEK_HOLE": Difference(first_hole, 0, 8 * MIB + 1, "the same: the only hole is at the end"),
    "blocks of sparse files": Difference(
        lambda p: sparse(p).stat().st_blocks * 512 < MIB,
        True,
        False,
        "the grid holds zeros like other bytes",
    ),
    "sizes of directories": Difference(
        lambda p: p.stat().st_size > 0,
        True,
        False,
        "what a directory takes on the grid is known only when it is packed",
    ),
    "times of access": Difference(
        read_moves_atime,
        True,
        False,
        "reading is not noted, as with `noatime`",
    ),
    "trusted attributes": Difference(
        lambda p: outcome(lambda: os.setxattr(p / "file", "trusted.x", b"x")),
        "OK",
        "ENOTSUP",
        "what others wrote on the grid must not be trusted by this machine",
    ),
    "security attributes": Difference(
        lambda p: outcome(lambda: os.setxattr(p / "file", "security.x", b"x")),
        "OK",
        "ENOTSUP",
        "the same: capabilities of programs, say",
    ),
    "large attributes": Difference(
        lambda p: outcome(lambda: os.setxattr(p / "file", "user.x", bytes(64 << 10))),
        "ENOSPC",
        "OK",
        "ext4 has a block for all of a file's attributes, a mount has 64 KiB for their values",
    ),
    "names that are not UTF-8": Difference(
        lambda p: outcome(lambda: os.mkdir(os.fsencode(p) + b"/\xff")),
        "OK",
        "EILSEQ",
        "names on the grid are text",
    ),
    "NFC": Difference(
        decomposed,
        ["u\\u0308"],
        ["\\xfc"],
        "Tahoe clients keep names in this form; any spelling finds them",
    ),
}


@needs_root
@pytest.mark.parametrize("name", DIFFERENCES)
def test_differs_on_purpose(place: Path, name: str, request: pytest.FixtureRequest) -> None:
    difference = DIFFERENCES[name]
    kind = request.node.callspec.params["place"]
    if kind not in ("mount", "ext4"):
        pytest.skip(f"the control is ext4, this is {kind}")
    (place / "file").write_bytes(b"data")
    assert difference.call(place) == (difference.mount if kind == "mount" else difference.local)


def test_users_are_told_of_every_difference() -> None:
    text = SEMANTICS.read_text().partition("## What differs from a local disk")[2].partition("\n## ")[0]
    rows = [line.split("|")[1].strip(" `") for line in text.splitlines() if line.startswith("| ")]
    assert rows[2:] == list(DIFFERENCES)
