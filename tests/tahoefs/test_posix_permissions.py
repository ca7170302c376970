"""Who may do what: as other users than the one who mounted. On a mount and on the control."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tahoefs.posix_calls import GUEST, RENAME_EXCHANGE, STRANGER, as_user, needs_root, opened, renameat2

pytestmark = needs_root

TEAM = 5555  # a group
Action = Callable[[], object]


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def write(path: str, flags: int = os.O_WRONLY) -> None:
    with opened(path, flags) as descriptor:
        os.write(descriptor, b"x")


def give(path: Path, uid: int, gid: int, mode: int) -> None:
    os.chown(path, uid, gid)
    path.chmod(mode)


# Whose class of bits counts: the owner's for the owner alone, even where the group's or others' would allow more.
@pytest.mark.parametrize(
    ("mode", "uid", "groups", "can_read", "can_write"),
    [
        (0o400, STRANGER, (), True, False),
        (0o600, STRANGER, (), True, True),
        (0o077, STRANGER, (TEAM,), False, False),
        (0o040, GUEST, (TEAM,), True, False),
        (0o060, GUEST, (TEAM,), True, True),
        (0o707, GUEST, (TEAM,), False, False),
        (0o004, GUEST, (), True, False),
        (0o002, GUEST, (), False, True),
        (0o770, GUEST, (), False, False),
    ],
)
def test_mode_bits_decide(
    place: Path, mode: int, uid: int, groups: tuple[int, ...], can_read: bool, can_write: bool
) -> None:
    (place / "file").write_bytes(b"data")
    give(place / "file", STRANGER, TEAM, mode)

    def may(call: Action) -> bool:
        found = as_user(place, call, uid, groups)
        assert found in ("OK", "EACCES")
        return found == "OK"

    assert may(lambda: os.open("file", os.O_RDONLY)) is can_read
    assert may(lambda: os.open("file", os.O_WRONLY)) is can_write
    assert may(lambda: os.open("file", os.O_RDWR)) is (can_read and can_write)
    assert may(lambda: os.open("file", os.O_RDONLY | os.O_TRUNC)) is (can_read and can_write)
    assert may(lambda: os.truncate("file", 1)) is can_write
    assert may(lambda: os.utime("file")) is (can_write or uid == STRANGER)
    assert may(lambda: os.setxattr("file", "user.x", b"x")) is can_write
    os.setxattr(place / "file", "user.y", b"y")
    assert may(lambda: os.getxattr("file", "user.y")) is can_read
    assert may(lambda: accessible("file", os.R_OK)) is can_read
    assert may(lambda: accessible("file", os.W_OK)) is can_write
    assert may(lambda: os.stat("file"))


def accessible(path: str, mode: int) -> None:
    if not os.access(path, mode):
        raise PermissionError(13, "no access")


@pytest.mark.parametrize(
    ("mode", "refused"),
    [
        (0o755, {"create", "remove", "rename"}),
        (0o744, {"create", "remove", "rename", "find", "enter"}),
        (0o711, {"create", "remove", "rename", "list"}),
        (0o733, {"list"}),
        (0o722, {"create", "remove", "rename", "find", "enter", "list"}),
        (0o777, set()),
    ],
)
def test_mode_bits_of_directories_decide(place: Path, mode: int, refused: set[str]) -> None:
    (place / "dir").mkdir()
    for name in ("old", "gone", "found"):
        (place / "dir" / name).touch()
    (place / "dir").chmod(mode)
    calls: dict[str, Action] = {
        "create": lambda: os.mkdir("dir/new"),
        "rename": lambda: os.rename("dir/old", "dir/other"),
        "remove": lambda: os.unlink("dir/gone"),
        "find": lambda: os.stat("dir/found"),
        "enter": lambda: os.chdir("dir"),
        "list": lambda: os.listdir("dir"),
    }
    outcomes = {name: as_user(place, call) for name, call in calls.items()}
    assert outcomes == {name: "EACCES" if name in refused else "OK" for name in calls}


# The call, and what it answers to the owner: who owns a file cannot give it away.
OWNERS_ONLY: dict[str, tuple[Action, str]] = {
    "chmod": (lambda: os.chmod("file", 0o777), "OK"),
    "chown": (lambda: os.chown("file", GUEST, -1), "EPERM"),
    "chgrp": (lambda: os.chown("file", -1, GUEST), "EPERM"),
    "utime to a time": (lambda: os.utime("file", (1, 1)), "OK"),
    "open without noting access": (lambda: os.open("file", os.O_RDONLY | os.O_NOATIME), "OK"),
}


@pytest.mark.parametrize("name", OWNERS_ONLY)
def test_what_only_an_owner_may(place: Path, name: str) -> None:
    call, to_owner = OWNERS_ONLY[name]
    (place / "file").write_bytes(b"data")
    give(place / "file", STRANGER, STRANGER, 0o666)
    assert as_user(place, call, GUEST) == "EPERM"
    assert as_user(place, call, STRANGER) == to_owner


def test_an_owner_may_hand_a_file_to_a_group_of_its_own(place: Path) -> None:
    (place / "file").touch()
    give(place / "file", STRANGER, STRANGER, 0o6755)
    assert as_user(place, lambda: os.chown("file", STRANGER, TEAM), STRANGER, (TEAM,)) == "OK"
    assert ((place / "file").stat().st_gid, mode_of(place / "file")) == (TEAM, 0o755)
    assert as_user(place, lambda: os.chown("file", -1, GUEST), STRANGER, (TEAM,)) == "EPERM"


def test_setgid_goes_when_an_owner_is_not_of_the_group(place: Path) -> None:
    (place / "file").touch()
    give(place / "file", STRANGER, TEAM, 0o644)
    assert as_user(place, lambda: os.chmod("file", 0o2755), STRANGER) == "OK"
    assert mode_of(place / "file") == 0o755
    assert as_user(place, lambda: os.chmod("file", 0o2755), STRANGER, (TEAM,)) == "OK"
    assert mode_of(place / "file") == 0o2755


CHANGERS: dict[str, Action] = {
    "write": lambda: write("file"),
    "append": lambda: write("file", os.O_WRONLY | os.O_APPEND),
    "open to empty": lambda: os.close(os.open("file", os.O_WRONLY | os.O_TRUNC)),
    "truncate": lambda: os.truncate("file", 1),
    "ftruncate": lambda: truncate_open("file"),
}


def truncate_open(path: str) -> None:
    with opened(path) as descriptor:
        os.ftruncate(descriptor, 1)


@pytest.mark.parametrize("how", CHANGERS)
@pytest.mark.parametrize(("mode", "left"), [(0o6777, 0o0777), (0o4767, 0o0767), (0o1666, 0o1666)])
def test_set_id_bits_go_when_others_change_contents(place: Path, how: str, mode: int, left: int) -> None:
    (place / "file").write_bytes(b"data")
    (place / "file").chmod(mode)
    assert as_user(place, CHANGERS[how]) == "OK"
    assert mode_of(place / "file") == left


def test_root_writes_without_taking_set_id_bits(place: Path) -> None:
    (place / "file").write_bytes(b"data")
    (place / "file").chmod(0o6755)
    with opened(place / "file", os.O_WRONLY | os.O_APPEND) as descriptor:
        os.write(descriptor, b"x")
    os.truncate(place / "file", 2)
    assert mode_of(place / "file") == 0o6755


def test_in_a_sticky_directory_only_owners_remove_and_rename(place: Path) -> None:
    place.chmod(0o1777)
    for name in ("root's", "over"):
        (place / name).touch()
    assert as_user(place, lambda: os.mkdir("own"), STRANGER) == "OK"
    assert as_user(place, lambda: write("mine", os.O_WRONLY | os.O_CREAT), STRANGER) == "OK"
    assert (place / "own").stat().st_uid == (place / "mine").stat().st_uid == STRANGER
    refused: list[Action] = [
        lambda: os.unlink("mine"),
        lambda: os.rmdir("own"),
        lambda: os.rename("mine", "other"),
        lambda: os.rename("guest's", "mine"),
        lambda: renameat2("guest's", "mine", RENAME_EXCHANGE),
        lambda: os.unlink("root's"),
    ]
    assert as_user(place, lambda: write("guest's", os.O_WRONLY | os.O_CREAT), GUEST) == "OK"
    assert [as_user(place, call, GUEST) for call in refused] == ["EPERM"] * len(refused)
    assert as_user(place, lambda: os.rename("mine", "renamed"), STRANGER) == "OK"
    assert as_user(place, lambda: os.unlink("renamed"), STRANGER) == "OK"
    assert as_user(place, lambda: os.rmdir("own"), STRANGER) == "OK"
    os.chown(place, GUEST, GUEST)
    assert as_user(place, lambda: os.unlink("root's"), GUEST) == "OK"  # the directory's own owner may


def test_a_file_made_in_a_setgid_directory_by_one_who_is_not_of_the_group(place: Path) -> None:
    give(place, 0, TEAM, 0o2777)
    assert as_user(place, lambda: os.close(os.open("file", os.O_WRONLY | os.O_CREAT, 0o2775))) == "OK"
    assert as_user(place, lambda: os.mkdir("dir")) == "OK"
    assert ((place / "file").stat().st_uid, (place / "file").stat().st_gid) == (STRANGER, TEAM)
    assert (mode_of(place / "file"), mode_of(place / "dir")) == (0o755, 0o2755)


def test_a_directory_moves_only_if_its_owner_may_change_it(place: Path) -> None:
    """Its entry .. changes, so writing to it is asked for when it gets another parent."""
    place.chmod(0o777)
    (place / "dir").mkdir()
    (place / "elsewhere").mkdir()
    (place / "elsewhere").chmod(0o777)
    assert as_user(place, lambda: os.rename("dir", "renamed")) == "OK"
    assert as_user(place, lambda: os.rename("renamed", "elsewhere/dir")) == "EACCES"
