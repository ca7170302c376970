"""Open files in other company: names that went, mappings, locks; and what is no regular file. On both as well."""

from __future__ import annotations

import fcntl
import mmap
import os
import shutil
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tahoefs.posix_calls import as_user, needs_root, opened, outcome

CREATE = os.O_RDWR | os.O_CREAT
PAGE = mmap.PAGESIZE
DATA = bytes(range(256)) * 1024


# --- names that went -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["unlinked", "replaced"])
@pytest.mark.parametrize("made", ["before", "now"])
def test_a_file_whose_name_went_lives_on_while_open(place: Path, how: str, made: str) -> None:
    path = place / "file"
    if made == "before":
        path.write_bytes(b"data")
    with opened(path, CREATE) as descriptor, opened(path, os.O_RDONLY) as reader:
        os.pwrite(descriptor, b"D", 0)
        if how == "unlinked":
            path.unlink()
        else:
            (place / "other").write_bytes(b"new")
            (place / "other").rename(path)
        assert os.fstat(descriptor).st_nlink == 0
        os.ftruncate(descriptor, 3)
        os.pwrite(descriptor, b"end", 5)
        expected = (b"Dat" if made == "before" else b"D\0\0") + b"\0\0end"
        assert os.pread(reader, 100, 0) == os.pread(descriptor, 100, 0) == expected
        assert os.fstat(reader).st_size == 8
        os.fchmod(descriptor, 0o600)
        os.utime(descriptor, ns=(5, 6))
        os.setxattr(descriptor, "user.x", b"y")
        found = os.fstat(reader)
        assert (stat.S_IMODE(found.st_mode), found.st_mtime_ns, os.getxattr(reader, "user.x")) == (0o600, 6, b"y")
        os.fsync(descriptor)
        with opened(f"/proc/self/fd/{reader}", os.O_RDONLY) as again:
            assert os.read(again, 100) == expected
    assert os.listdir(place) == ([] if how == "unlinked" else ["file"])
    assert how == "unlinked" or path.read_bytes() == b"new"


def test_a_new_file_under_the_name_of_one_that_is_open_is_another_file(place: Path) -> None:
    path = place / "file"
    path.write_bytes(b"old")
    with opened(path) as old:
        path.unlink()
        with opened(path, CREATE | os.O_EXCL) as new:
            os.write(new, b"new")
            os.write(old, b"OLD")
            assert os.fstat(old).st_ino != os.fstat(new).st_ino
            assert (os.pread(old, 9, 0), os.pread(new, 9, 0)) == (b"OLD", b"new")
    assert path.read_bytes() == b"new"


def test_a_file_being_written_keeps_its_handles_through_renames(place: Path) -> None:
    (place / "dir").mkdir()
    with opened(place / "one", CREATE) as descriptor:
        os.write(descriptor, b"1")
        (place / "one").rename(place / "two")
        os.write(descriptor, b"2")
        (place / "two").rename(place / "dir" / "three")
        os.write(descriptor, b"3")
        assert (place / "dir" / "three").read_bytes() == b"123"
        (place / "dir").rename(place / "moved")
        os.write(descriptor, b"4")
    assert (place / "moved" / "three").read_bytes() == b"1234"
    assert os.listdir(place) == ["moved"]


# --- mappings --------------------------------------------------------------------------------------------------------


def test_what_is_written_to_a_shared_mapping_others_read(place: Path) -> None:
    path = place / "file"
    path.write_bytes(bytes(3 * PAGE))
    with (
        opened(path) as descriptor,
        opened(path, os.O_RDONLY) as reader,
        mmap.mmap(descriptor, 3 * PAGE) as one,
        mmap.mmap(reader, 3 * PAGE, access=mmap.ACCESS_READ) as other,
    ):
        one[PAGE - 2 : PAGE + 2] = b"abcd"
        assert other[PAGE - 2 : PAGE + 2] == os.pread(reader, 4, PAGE - 2) == b"abcd"
        os.pwrite(descriptor, b"efgh", 2 * PAGE)
        assert one[2 * PAGE : 2 * PAGE + 4] == other[2 * PAGE : 2 * PAGE + 4] == b"efgh"
        one.flush()
    expected = bytearray(3 * PAGE)
    expected[PAGE - 2 : PAGE + 2], expected[2 * PAGE : 2 * PAGE + 4] = b"abcd", b"efgh"
    assert path.read_bytes() == expected


def test_a_mapping_outlives_its_descriptor_and_its_name(place: Path) -> None:
    path = place / "file"
    path.write_bytes(b"x" * PAGE)
    with opened(path) as descriptor:
        mapped = mmap.mmap(descriptor, PAGE)
    mapped[:4] = b"MMAP"
    assert path.read_bytes()[:5] == b"MMAPx"
    path.unlink()
    mapped[4:6] = b"!!"
    mapped.flush()
    assert mapped[:7] == b"MMAP!!x"
    mapped.close()
    assert os.listdir(place) == []


def test_a_private_mapping_changes_nothing(place: Path) -> None:
    (place / "file").write_bytes(b"data")
    with (
        opened(place / "file", os.O_RDONLY) as descriptor,
        mmap.mmap(descriptor, 4, access=mmap.ACCESS_COPY) as mapped,
    ):
        mapped[:4] = b"DATA"
    assert (place / "file").read_bytes() == b"data"


# --- locks -----------------------------------------------------------------------------------------------------------

LOCKER = """
import fcntl, sys
with open(sys.argv[1], "r+") as file:
    try:
        (fcntl.flock if sys.argv[2] == "flock" else fcntl.lockf)(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print("held")
    else:
        print("free")
"""


@pytest.mark.parametrize("call", ["flock", "lockf"])
def test_locks_hold_between_programs(place: Path, call: str) -> None:
    path = place / "file"
    path.touch()

    def another() -> str:
        done = subprocess.run([sys.executable, "-c", LOCKER, path, call], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    with path.open("r+") as file:
        getattr(fcntl, call)(file, fcntl.LOCK_EX)
        assert another() == "held"
        getattr(fcntl, call)(file, fcntl.LOCK_UN)
        assert another() == "free"
        getattr(fcntl, call)(file, fcntl.LOCK_EX)
    assert another() == "free"


# --- what is no regular file -----------------------------------------------------------------------------------------


def test_a_fifo_and_a_socket_pass_data_on(place: Path) -> None:
    os.mkfifo(place / "fifo")
    with opened(place / "fifo", os.O_RDONLY | os.O_NONBLOCK) as reader, opened(place / "fifo", os.O_WRONLY) as writer:
        os.write(writer, b"through")
        assert os.read(reader, 100) == b"through"
    os.chdir(place)  # its path may be longer than a socket address
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind("socket")
        server.listen()
        client.connect("socket")
        client.sendall(b"through")
        connection, _ = server.accept()
        assert connection.recv(100) == b"through"
        connection.close()
    assert stat.S_ISSOCK((place / "socket").stat().st_mode) and stat.S_ISFIFO((place / "fifo").stat().st_mode)


@needs_root
def test_programs_run_from_there_and_are_not_written_meanwhile(place: Path) -> None:
    program = place / "sleep"
    shutil.copy(shutil.which("sleep") or "", program)
    with subprocess.Popen([program, "60"]) as running:
        assert outcome(lambda: os.open(program, os.O_WRONLY)) == "ETXTBSY"
        running.kill()
    os.close(os.open(program, os.O_WRONLY))
    script = place / "script"
    script.write_text("#!/bin/sh\nexit 0\n")
    script.chmod(0o755)
    assert as_user(place, lambda: os.execv("script", ["script"])) == "OK"
    script.chmod(0o754)
    assert as_user(place, lambda: os.execv("script", ["script"])) == "EACCES"
