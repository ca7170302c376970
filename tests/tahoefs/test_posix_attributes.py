"""Attributes: modes, owners, times, extended attributes; what changes them, and what does not. On both file systems."""

from __future__ import annotations

import os
import random
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tahoefs.posix_calls import RENAME_EXCHANGE, opened, outcome, renameat2, utimensat

UTIME_NOW, UTIME_OMIT = (1 << 30) - 1, (1 << 30) - 2
CLOCK_S = 0.05  # file systems keep time in ticks
KINDS = ("file", "dir", "fifo")
Call = Callable[[Path], object]


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


# --- modes and owners ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", [0o000, 0o777, 0o640, 0o4755, 0o2711, 0o1777, 0o7777])
def test_modes_are_kept_as_they_are(furnished: Path, kind: str, mode: int) -> None:
    (furnished / kind).chmod(mode)
    assert mode_of(furnished / kind) == mode
    if kind == "file":
        (furnished / "link").chmod(mode ^ 0o777)
        assert (mode_of(furnished / "file"), mode_of(furnished / "link")) == (mode ^ 0o777, 0o777)
        with opened(furnished / "file") as descriptor:
            os.fchmod(descriptor, mode)
            assert stat.S_IMODE(os.fstat(descriptor).st_mode) == mode


@pytest.mark.parametrize("kind", [*KINDS, "link", "dangling"])
def test_owners_are_kept(furnished: Path, kind: str) -> None:
    def owner() -> tuple[int, int]:
        status = (furnished / kind).lstat()
        return status.st_uid, status.st_gid

    os.lchown(furnished / kind, 1234, 5678)
    assert owner() == (1234, 5678)
    os.lchown(furnished / kind, -1, 9)
    assert owner() == (1234, 9)
    os.lchown(furnished / kind, 0, -1)
    assert owner() == (0, 9)
    (furnished / kind).rename(furnished / "renamed")
    (furnished / "renamed").rename(furnished / kind)
    assert owner() == (0, 9)
    if kind == "link":
        assert (furnished / "file").stat().st_gid == 0


@pytest.mark.parametrize(
    ("kind", "mode", "expected"),
    [("file", 0o6777, 0o0777), ("file", 0o6767, 0o2767), ("file", 0o1644, 0o1644), ("dir", 0o7755, 0o7755)],
)
def test_a_new_owner_takes_set_id_bits_from_programs(furnished: Path, kind: str, mode: int, expected: int) -> None:
    (furnished / kind).chmod(mode)
    os.chown(furnished / kind, 1234, -1)
    assert mode_of(furnished / kind) == expected


def test_a_setgid_directory_hands_its_group_down(place: Path) -> None:
    os.chown(place, -1, 4321)
    place.chmod(0o2775)
    (place / "dir").mkdir()
    (place / "dir" / "deeper").mkdir()
    (place / "dir" / "file").touch()
    os.mkfifo(place / "fifo")
    (place / "link").symlink_to("x")
    for name in ("dir", "dir/deeper", "dir/file", "fifo", "link"):
        assert (place / name).lstat().st_gid == 4321
    assert mode_of(place / "dir") & mode_of(place / "dir" / "deeper") & stat.S_ISGID
    place.chmod(0o775)
    (place / "other").mkdir()
    assert (place / "other").stat().st_gid == os.getgid() and not mode_of(place / "other") & stat.S_ISGID


# --- times -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*KINDS, "link", "dangling"])
def test_times_are_kept_to_the_nanosecond(furnished: Path, kind: str) -> None:
    for atime_ns, mtime_ns in (1_000_000_001, 2_000_000_000_123_456_789), (0, 1), (1, 4_000_000_000_999_999_999):
        os.utime(furnished / kind, ns=(atime_ns, mtime_ns), follow_symlinks=False)
        found = (furnished / kind).lstat()
        assert (found.st_atime_ns, found.st_mtime_ns) == (atime_ns, mtime_ns)


def test_times_before_1970(place: Path) -> None:
    (place / "file").touch()
    os.utime(place / "file", ns=(-1_500_000_000, -86_400_000_000_000))
    assert ((place / "file").stat().st_atime_ns, (place / "file").stat().st_mtime_ns) == (
        (-1_500_000_000, -86_400_000_000_000)
    )


def test_times_one_at_a_time_and_now(place: Path) -> None:
    path = place / "file"
    path.touch()
    os.utime(path, ns=(1, 2))
    utimensat(path, (5, 5), (0, UTIME_OMIT))
    assert (path.stat().st_atime_ns, path.stat().st_mtime_ns) == (5_000_000_005, 2)
    utimensat(path, (0, UTIME_OMIT), (6, 6))
    assert (path.stat().st_atime_ns, path.stat().st_mtime_ns) == (5_000_000_005, 6_000_000_006)
    before = time.time() - 1
    utimensat(path, (0, UTIME_OMIT), (0, UTIME_NOW))
    assert path.stat().st_atime_ns == 5_000_000_005 and before < path.stat().st_mtime < time.time() + 1
    utimensat(path, (0, UTIME_NOW), (0, UTIME_OMIT))
    assert before < path.stat().st_atime < time.time() + 1


# What a call does to the times of `file`: "m" of modification, "c" of change, "" neither.
EFFECTS: dict[str, tuple[str, Call]] = {
    "write": ("mc", lambda p: rewrite(p, lambda fd: os.write(fd, b"D"))),
    "write and close later": ("mc", lambda p: rewrite(p, lambda fd: (os.write(fd, b"D"), os.fsync(fd)))),
    "append": ("mc", lambda p: append(p / "file")),
    "truncate": ("mc", lambda p: os.truncate(p / "file", 2)),
    "truncate longer": ("mc", lambda p: os.truncate(p / "file", 100)),
    "truncate to the same": ("mc", lambda p: os.truncate(p / "file", 4)),
    "ftruncate to the same": ("mc", lambda p: rewrite(p, lambda fd: os.ftruncate(fd, 4))),
    "open to empty": ("mc", lambda p: os.close(os.open(p / "file", os.O_WRONLY | os.O_TRUNC))),
    "chmod": ("c", lambda p: os.chmod(p / "file", 0o600)),
    "chmod to the same": ("c", lambda p: os.chmod(p / "file", mode_of(p / "file"))),
    "chown": ("c", lambda p: os.chown(p / "file", 1, 1)),
    "chown to the same": ("c", lambda p: os.chown(p / "file", 0, 0)),
    "utime": ("c", lambda p: utimensat(p / "file", (9, 9), (0, UTIME_OMIT))),
    "setxattr": ("c", lambda p: os.setxattr(p / "file", "user.x", b"x")),
    "rename": ("c", lambda p: (os.rename(p / "file", p / "x"), os.rename(p / "x", p / "file"))),
    "exchange": ("c", lambda p: [renameat2(p / "file", p / "fifo", RENAME_EXCHANGE) for _ in range(2)]),
    "read": ("", lambda p: (p / "file").read_bytes()),
    "open and close": ("", lambda p: rewrite(p, lambda fd: None)),
    "stat": ("", lambda p: os.stat(p / "file")),
    "rename the directory": ("", lambda p: (os.rename(p, f"{p}x"), os.rename(f"{p}x", p))),
    "fail": ("", lambda p: outcome(lambda: os.truncate(p / "file", 1 << 62))),
}


def rewrite(place: Path, call: Callable[[int], object]) -> None:
    with opened(place / "file") as descriptor:
        call(descriptor)


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


@pytest.mark.parametrize("name", EFFECTS)
def test_what_moves_the_times_of_a_file(furnished: Path, name: str) -> None:
    moved, call = EFFECTS[name]
    os.utime(furnished / "file", ns=(1, 2))
    before = (furnished / "file").stat()
    clock_ticks()
    call(furnished)
    after = (furnished / "file").stat()
    assert after.st_mtime_ns >= before.st_ctime_ns if "m" in moved else after.st_mtime_ns == 2
    assert after.st_ctime_ns > before.st_ctime_ns if "c" in moved else after.st_ctime_ns == before.st_ctime_ns
    assert after.st_ino == before.st_ino


def test_the_last_name_to_go_moves_ctime(place: Path) -> None:
    (place / "file").write_bytes(b"data")
    with opened(place / "file", os.O_RDONLY) as descriptor:
        before = os.fstat(descriptor)
        clock_ticks()
        (place / "file").unlink()
        after = os.fstat(descriptor)
        assert (after.st_ctime_ns > before.st_ctime_ns, after.st_mtime_ns) == (True, before.st_mtime_ns)


def test_times_while_a_file_is_being_written(place: Path) -> None:
    path = place / "file"
    with opened(path, os.O_RDWR | os.O_CREAT) as descriptor:
        os.write(descriptor, b"one")
        os.utime(path, ns=(1, 2))
        assert os.fstat(descriptor).st_mtime_ns == 2
    assert path.stat().st_mtime_ns == 2  # `cp -p` and `tar` set it before they close
    with opened(path) as descriptor:
        os.write(descriptor, b"two")
        written = path.stat().st_mtime_ns
        assert written > 2
        clock_ticks()
    assert path.stat().st_mtime_ns == written  # when it was written, not when it was closed


def clock_ticks() -> None:
    """Return once the file systems' clock has moved."""
    started = time.monotonic()
    while time.monotonic() - started < CLOCK_S:
        pass


# --- extended attributes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["file", "dir"])
def test_extended_attributes(furnished: Path, kind: str) -> None:
    path = furnished / kind
    assert os.listxattr(path) == []
    os.setxattr(path, "user.name", b"value", os.XATTR_CREATE)
    os.setxattr(path, "user.empty", b"")
    os.setxattr(path, "user.\u00fc", bytes(range(256)))
    assert sorted(os.listxattr(path)) == ["user.empty", "user.name", "user.\u00fc"]
    assert (os.getxattr(path, "user.name"), os.getxattr(path, "user.empty")) == (b"value", b"")
    os.setxattr(path, "user.name", b"other", os.XATTR_REPLACE)
    os.removexattr(path, "user.empty")
    path.rename(furnished / "renamed")
    (furnished / "renamed").chmod(0o700)
    assert {name: os.getxattr(furnished / "renamed", name) for name in os.listxattr(furnished / "renamed")} == (
        {"user.name": b"other", "user.\u00fc": bytes(range(256))}
    )


def test_extended_attributes_of_an_open_file(place: Path) -> None:
    with opened(place / "file", os.O_RDWR | os.O_CREAT) as descriptor:
        os.setxattr(descriptor, "user.x", b"before")
        os.write(descriptor, b"data")
        os.setxattr(place / "file", "user.y", b"after")
        assert (os.getxattr(place / "file", "user.x"), os.getxattr(descriptor, "user.y")) == (b"before", b"after")
    assert (os.getxattr(place / "file", "user.x"), os.getxattr(place / "file", "user.y")) == (b"before", b"after")
    (place / "file").write_bytes(b"others")
    assert os.getxattr(place / "file", "user.x") == b"before"


def test_extended_attributes_end_with_no_space_and_what_was_there_stays(place: Path) -> None:
    (place / "file").touch()
    values = {}
    source = random.Random(1)
    for number in range(1000):
        value = source.randbytes(200)
        if outcome(lambda: os.setxattr(place / "file", f"user.number{number}", value)) == "OK":  # noqa: B023
            values[f"user.number{number}"] = value
        else:
            assert outcome(lambda: os.setxattr(place / "file", "user.more", bytes(300))) == "ENOSPC"
            break
    assert 5 < len(values) < 1000
    assert {name: os.getxattr(place / "file", name) for name in os.listxattr(place / "file")} == values
    os.removexattr(place / "file", "user.number3")
    os.setxattr(place / "file", "user.again", bytes(200))
