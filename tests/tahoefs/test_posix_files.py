"""Opening, reading and writing: flags, several handles, offsets, holes. On a mount and on the control."""

from __future__ import annotations

import mmap
import os
import shutil
import stat
import threading
from pathlib import Path

import pytest

from tests.tahoefs.posix_calls import as_user, needs_root, opened, outcome, umask

CREATE = os.O_RDWR | os.O_CREAT
PAGE = mmap.PAGESIZE
DATA = bytes(range(256)) * 1024


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


# --- open ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002, 0o777, 0])
def test_a_new_thing_has_the_mode_asked_for_less_the_umask(place: Path, mask: int) -> None:
    with umask(mask):
        os.close(os.open(place / "file", CREATE, 0o6777))
        os.mkdir(place / "dir", 0o1777)
        os.mkfifo(place / "fifo", 0o666)
        os.mknod(place / "node", stat.S_IFREG | 0o644)
        os.symlink("file", place / "link")
    assert mode_of(place / "file") == 0o6777 & ~mask
    assert mode_of(place / "dir") == 0o1777 & ~mask
    assert mode_of(place / "fifo") == 0o666 & ~mask
    assert mode_of(place / "node") == 0o644 & ~mask
    assert mode_of(place / "link") == 0o777


def test_open_of_what_exists_changes_nothing_of_it(place: Path) -> None:
    path = place / "file"
    path.write_bytes(b"data")
    path.chmod(0o640)
    os.utime(path, ns=(1, 2))
    before = path.stat()
    with opened(path, CREATE, 0o777):
        pass
    after = path.stat()
    assert (after.st_mode, after.st_size, after.st_mtime_ns, after.st_ctime_ns, after.st_ino) == (
        (before.st_mode, before.st_size, before.st_mtime_ns, before.st_ctime_ns, before.st_ino)
    )


@needs_root
def test_who_created_a_file_writes_it_whatever_its_mode(place: Path) -> None:
    place.chmod(0o777)

    def create() -> None:
        with opened("own", CREATE | os.O_EXCL, 0o000) as descriptor:
            os.write(descriptor, b"written")
        os.open("own", os.O_RDONLY)

    assert as_user(place, create) == "EACCES"
    assert ((place / "own").read_bytes(), mode_of(place / "own")) == (b"written", 0)


@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_RDWR, os.O_RDONLY])
def test_truncating_at_open_empties_and_counts_as_a_change(place: Path, flags: int) -> None:
    path = place / "file"
    path.write_bytes(DATA)
    os.utime(path, ns=(1, 2))
    with opened(path, flags | os.O_TRUNC) as descriptor:
        assert os.fstat(descriptor).st_size == path.stat().st_size == 0
    assert path.read_bytes() == b"" and path.stat().st_mtime_ns > 2


def test_truncating_at_open_is_seen_by_who_has_it_open(place: Path) -> None:
    (place / "file").write_bytes(DATA)
    with opened(place / "file") as one, opened(place / "file", os.O_WRONLY | os.O_TRUNC) as other:
        assert (os.fstat(one).st_size, os.pread(one, 10, 0)) == (0, b"")
        os.pwrite(other, b"end", 5)
        assert os.pread(one, 10, 0) == bytes(5) + b"end"


def test_a_directory_and_a_link_can_be_opened_as_what_they_are(place: Path) -> None:
    (place / "link").symlink_to("nowhere")
    with opened(place, os.O_RDONLY | os.O_DIRECTORY) as descriptor:
        assert os.listdir(descriptor) == ["link"]
        os.fsync(descriptor)
    with opened(place / "link", os.O_PATH | os.O_NOFOLLOW) as descriptor:
        assert stat.S_ISLNK(os.fstat(descriptor).st_mode)


def test_a_new_file_is_there_from_open_on(place: Path) -> None:
    with opened(place / "new", CREATE | os.O_EXCL):
        assert os.listdir(place) == ["new"] and (place / "new").stat().st_size == 0
        assert outcome(lambda: os.open(place / "new", CREATE | os.O_EXCL)) == "EEXIST"
        assert outcome(lambda: os.rmdir(place)) == "ENOTEMPTY"


# --- reading and writing ---------------------------------------------------------------------------------------------


def test_appends_of_two_handles_come_one_after_the_other(place: Path) -> None:
    path = place / "file"
    with opened(path, CREATE | os.O_APPEND) as one, opened(path, os.O_WRONLY | os.O_APPEND) as other:
        for number in range(20):
            os.write(one if number % 3 else other, b"%02d;" % number)
        os.pwrite(one, b"end", 0)  # Linux appends all the same
        assert os.lseek(one, 0, os.SEEK_CUR) > 0
    assert path.read_bytes() == b"".join(b"%02d;" % number for number in range(20)) + b"end"


def test_appends_of_many_threads_do_not_mix(place: Path) -> None:
    lines = [f"{number:05}".encode() * 2000 + b"\n" for number in range(8)]

    def append(line: bytes) -> None:
        with opened(place / "file", os.O_WRONLY | os.O_APPEND | os.O_CREAT) as descriptor:
            for _ in range(5):
                assert os.write(descriptor, line) == len(line)

    threads = [threading.Thread(target=append, args=(line,)) for line in lines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = (place / "file").read_bytes().splitlines(keepends=True)
    assert sorted(found) == sorted(lines * 5)


def test_handles_see_what_others_wrote_at_once(place: Path) -> None:
    path = place / "file"
    with opened(path, CREATE) as one, opened(path) as other, opened(path, os.O_RDONLY) as reader:
        os.write(one, b"first")
        assert os.pread(other, 10, 0) == os.pread(reader, 10, 0) == path.read_bytes() == b"first"
        os.pwrite(other, b"second", 3)
        assert os.pread(one, 10, 0) == os.pread(reader, 10, 0) == b"firsecond"
        os.ftruncate(one, 2)
        assert (os.pread(reader, 10, 0), os.fstat(other).st_size, path.stat().st_size) == (b"fi", 2, 2)
    assert path.read_bytes() == b"fi"


def test_a_duplicate_shares_its_place_and_keeps_the_file_open(place: Path) -> None:
    one = os.open(place / "file", CREATE)
    other = os.dup(one)
    os.write(one, b"one")
    os.close(one)
    os.write(other, b"two")
    os.close(other)
    assert (place / "file").read_bytes() == b"onetwo"


def test_between_what_was_written_there_are_zeros(place: Path) -> None:
    path = place / "file"
    with opened(path, CREATE) as descriptor:
        os.pwrite(descriptor, b"end", 3 * PAGE + 7)
        os.pwrite(descriptor, b"middle", PAGE - 3)
        assert os.lseek(descriptor, 0, os.SEEK_END) == 3 * PAGE + 10
        assert os.pread(descriptor, 10, 4 * PAGE) == b""
        assert os.pread(descriptor, 100, 3 * PAGE + 5) == b"\0\0end"
    expected = bytearray(3 * PAGE + 10)
    expected[PAGE - 3 : PAGE + 3], expected[-3:] = b"middle", b"end"
    assert path.read_bytes() == expected


def test_what_was_cut_off_does_not_come_back(place: Path) -> None:
    path = place / "file"
    path.write_bytes(DATA)
    os.truncate(path, 100)
    os.truncate(path, 2 * PAGE)
    assert path.read_bytes() == DATA[:100] + bytes(2 * PAGE - 100)
    with opened(path) as descriptor:
        os.ftruncate(descriptor, 50)
        os.pwrite(descriptor, b"x", 200)
        os.ftruncate(descriptor, 300)
    assert path.read_bytes() == DATA[:50] + bytes(150) + b"x" + bytes(99)


def test_files_larger_than_four_gigabytes(place: Path) -> None:
    far = 5 << 30
    with opened(place / "file", CREATE) as descriptor:
        os.pwrite(descriptor, b"far", far)
        assert os.fstat(descriptor).st_size == far + 3
        assert os.pread(descriptor, 10, far - 2) == b"\0\0far"
        os.ftruncate(descriptor, far + 1)
        assert os.pread(descriptor, 10, far - 2) == b"\0\0f"
        os.ftruncate(descriptor, 3)
    assert (place / "file").read_bytes() == bytes(3)


def test_vectors_and_copies_within_the_kernel(place: Path) -> None:
    (place / "source").write_bytes(DATA)
    with opened(place / "source") as source, opened(place / "target", CREATE) as target:
        assert os.copy_file_range(source, target, 5000, 10, 0) == 5000
        assert os.sendfile(target, source, 100, 300) == 300
        assert os.pwritev(target, [b"ab", b"cd"], 6000) == 4
        parts = [bytearray(2), bytearray(2)]
        assert os.preadv(target, parts, 6000) == 4
        assert parts == [b"ab", b"cd"]
    found = (place / "target").read_bytes()
    assert found[:300] == DATA[100:400] and found[300:5000] == DATA[310:5010]
    shutil.copyfile(place / "source", place / "copy")
    assert (place / "copy").read_bytes() == DATA


def test_nothing_written_is_no_change(place: Path) -> None:
    path = place / "file"
    path.write_bytes(b"data")
    os.utime(path, ns=(1, 2))
    before = path.stat().st_ctime_ns
    with opened(path) as descriptor:
        os.write(descriptor, b"")
        os.fsync(descriptor)
        os.fdatasync(descriptor)
    assert (path.stat().st_mtime_ns, path.stat().st_ctime_ns) == (2, before)


def test_posix_fallocate_makes_room_that_is_zeros(place: Path) -> None:
    with opened(place / "file", CREATE) as descriptor:
        os.write(descriptor, b"data")
        os.posix_fallocate(descriptor, 0, 3 * PAGE)
        assert os.fstat(descriptor).st_size == 3 * PAGE
        os.posix_fallocate(descriptor, 0, PAGE)
    assert (place / "file").read_bytes() == b"data" + bytes(3 * PAGE - 4)


def test_blocks_tell_of_what_is_there(place: Path) -> None:
    (place / "empty").touch()
    (place / "full").write_bytes(DATA)
    assert (place / "empty").stat().st_blocks == 0
    assert (place / "full").stat().st_blocks * 512 >= len(DATA)
    assert (place / "full").stat().st_blksize > 0
