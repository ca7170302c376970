"""The journal: wherever it is cut off, a store that is opened afterwards shows old or new, never a mixture."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grid.server import journal
from grid.server.errors import NoSpaceError
from grid.server.journal import FileChange, Journal, Rename, Resize, Step, Unlink, Write, Zero

SI = bytes(16)
PAGE = journal.PAGE_BYTES


class Directory(journal.Places):
    def __init__(self, path: Path) -> None:
        self.path = path

    def share(self, storage_index: bytes, number: int) -> str:
        return str(self.path / "bucket" / str(number))

    def temporary(self, storage_index: bytes, number: int) -> str:
        return str(self.path / f"{number}.new")

    def open(self) -> Journal:
        return Journal(str(self.path / "journal"), self, durable=False)

    def contents(self) -> dict[str, bytes]:
        bucket = self.path / "bucket"
        return {file.name: file.read_bytes() for file in bucket.iterdir()} if bucket.exists() else {}


class Killed(BaseException):
    """What a kill leaves behind: nothing after it is done."""


class Killer:
    """Lets so many changing system calls through, the last of them in part."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
        self.left = calls
        for name in ("pwrite", "pwritev", "ftruncate", "unlink", "rename", "rmdir", "posix_fallocate"):
            monkeypatch.setattr(journal.os, name, self._counted(name, getattr(os, name)))

    def _counted(self, name: str, real: Any) -> Any:
        def call(*args: Any) -> Any:
            if self.left > 0:
                self.left -= 1
                return real(*args)
            if self.left == 0 and name.startswith("pwrite"):
                self._tear(*args)
            self.left = -1
            raise Killed

        return call

    @staticmethod
    def _tear(fd: int, data: Any, position: int) -> None:
        """The kernel stops between two pages."""
        data = b"".join(map(bytes, data)) if isinstance(data, list) else bytes(data)
        whole_pages = (position + len(data) // 2) // PAGE * PAGE
        with open(fd, "wb", closefd=False, buffering=0) as file:
            file.seek(position)
            file.write(data[: max(0, whole_pages - position)])


BIG = os.urandom(3 * PAGE)
CHANGES: dict[str, list[FileChange]] = {
    "several writes": [FileChange(SI, 0, [Write(0, b"new"), Write(PAGE - 1, b"across"), Write(100, BIG)])],
    "write over pages": [FileChange(SI, 0, [Write(10, BIG)], grows_to=10 + len(BIG))],
    "hole": [FileChange(SI, 0, [Zero(5, 10 * PAGE), Write(10 * PAGE, b"end")], grows_to=11 * PAGE)],
    "shorter": [FileChange(SI, 0, [Write(0, b"head"), Resize(6)])],
    "two shares": [FileChange(SI, 0, [Write(0, b"a")]), FileChange(SI, 1, [Write(0, b"b"), Resize(1)])],
    "made, changed, deleted": [
        FileChange(SI, 2, [Rename()]),
        FileChange(SI, 0, [Write(3, b"x"), Write(9000, b"y")]),
        FileChange(SI, 1, [Unlink()]),
    ],
    "all deleted": [FileChange(SI, 0, [Unlink()]), FileChange(SI, 1, [Unlink()])],
    "one write": [FileChange(SI, 0, [Write(8, b"four")])],
    "one rename": [FileChange(SI, 2, [Rename()])],
}


def prepare(path: Path) -> Directory:
    directory = Directory(path)
    (path / "bucket").mkdir(parents=True)
    (path / "bucket" / "0").write_bytes(b"0" * 2 * PAGE)
    (path / "bucket" / "1").write_bytes(b"1" * 50)
    (path / "2.new").write_bytes(b"2" * 60)
    return directory


def apart_from_room(contents: dict[str, bytes]) -> dict[str, bytes]:
    """Room may have been made at a file's end: for slots, where no length is derived from the file's."""
    return {name: data.rstrip(b"\0") for name, data in contents.items()}


@pytest.mark.parametrize("what", CHANGES)
def test_killed_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    changes = CHANGES[what]
    undisturbed = prepare(tmp_path / "undisturbed")
    old = apart_from_room(undisturbed.contents())
    opened = undisturbed.open()
    opened.commit(changes)
    opened.close()
    new = apart_from_room(undisturbed.contents())
    assert old != new
    assert not (undisturbed.path / "journal").exists()
    seen = []
    for calls in range(40):
        directory = prepare(tmp_path / str(calls))
        opened = directory.open()
        with monkeypatch.context() as patch:
            Killer(patch, calls)
            try:
                opened.commit(changes)
            except Killed:
                pass
            else:
                break
        os.close(opened._fd)
        with monkeypatch.context() as patch:  # and killed again while finishing
            Killer(patch, 1)
            with suppress(Killed):
                os.close(directory.open()._fd)
        directory.open().close()
        found = apart_from_room(directory.contents())
        assert found in (old, new), f"mixed after {calls} calls"
        seen.append(found == new)
    else:
        pytest.fail("never finished")
    assert seen == sorted(seen), "old again after it was new"
    opened.close()


@given(st.binary(max_size=200))
@settings(max_examples=60)
def test_garbage_in_the_journal_does_nothing(tmp_path_factory: pytest.TempPathFactory, garbage: bytes) -> None:
    directory = prepare(tmp_path_factory.mktemp("garbage"))
    before = directory.contents()
    (directory.path / "journal").write_bytes(journal._RECORD.pack(journal._MAGIC, 53, 0) + garbage)
    directory.open().close()
    assert directory.contents() == before


def test_a_full_disk_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = prepare(tmp_path)
    before = directory.contents()
    opened = directory.open()

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "full")

    for call in ("posix_fallocate", "pwritev"):
        with monkeypatch.context() as patch:
            patch.setattr(journal.os, call, full)
            with pytest.raises(NoSpaceError):
                opened.commit(CHANGES["hole"])
        assert apart_from_room(directory.contents()) == apart_from_room(before)
    opened.commit(CHANGES["hole"])
    assert directory.contents() != before
    opened.close()


def test_what_failed_half_way_is_finished_by_the_next_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = prepare(tmp_path)
    opened = directory.open()

    def broken(*_: Any) -> None:
        raise OSError(errno.EIO, "broken")

    with monkeypatch.context() as patch:
        patch.setattr(journal.os, "ftruncate", broken)
        with pytest.raises(OSError, match="broken"):
            opened.commit(CHANGES["shorter"])
    assert opened.unfinished
    opened.commit([FileChange(SI, 1, [Write(0, b"next")])])
    assert directory.contents()["0"] == b"head00"
    assert directory.contents()["1"][:4] == b"next"
    opened.close()


def test_large_changes_do_not_keep_the_disk(tmp_path: Path) -> None:
    directory = prepare(tmp_path)
    opened = directory.open()
    opened.commit([FileChange(SI, 0, [Write(0, bytes(9 << 20)), Write(9, b"x")], grows_to=9 << 20)])
    assert (tmp_path / "journal").stat().st_size <= journal.KEPT_BYTES
    opened.close()


@given(st.lists(st.binary(min_size=1, max_size=30), min_size=1, max_size=1500), st.integers(1, 5000))
@settings(max_examples=30)
def test_writes_taken_in_parts(tmp_path_factory: pytest.TempPathFactory, buffers: list[bytes], at_once: int) -> None:
    path = tmp_path_factory.mktemp("parts") / "file"
    with path.open("wb+") as file, pytest.MonkeyPatch.context() as patch:
        real = os.pwrite
        patch.setattr(
            journal.os, "pwritev", lambda fd, pieces, at: real(fd, b"".join(map(bytes, pieces))[:at_once], at)
        )
        patch.setattr(journal.os, "pwrite", lambda fd, data, at: real(fd, bytes(data)[:at_once], at))
        journal.write_all(file.fileno(), buffers, 7)
    assert path.read_bytes() == bytes(7) + b"".join(buffers)


def test_steps_are_what_they_were() -> None:
    steps: list[Step] = [Write(5, b"data"), Zero(1, 2), Resize(9)]
    changes = [FileChange(SI, 7, steps), FileChange(SI, 8, [Unlink()]), FileChange(b"x" * 16, 8, [Rename()])]
    body = b"".join(map(bytes, journal._encode(changes)[1:]))
    assert journal._decode(memoryview(body)) == changes
