"""Names: renames, links, listings that change while they are read, odd names. On a mount and on the control."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import unicodedata
from pathlib import Path

import pytest

from tests.tahoefs.posix_calls import RENAME_EXCHANGE, RENAME_NOREPLACE, listing, opened, outcome, renameat2

MANY = 1500  # more than the kernel asks for at a time


def numbered(place: Path, count: int = MANY) -> set[str]:
    names = {f"name-{number:04}-{'x' * 80}" for number in range(count)}
    for name in names:
        (place / name).touch()
    return names


def snapshot(place: Path) -> dict[str, object]:
    """Everything below, by path: type and contents."""
    found: dict[str, object] = {}
    for path in sorted(place.rglob("*")):
        name = str(path.relative_to(place))
        found[name] = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
    return found


# --- rename ----------------------------------------------------------------------------------------------------------


def test_rename_over_what_may_be_replaced(furnished: Path) -> None:
    (furnished / "dir").rename(furnished / "empty")  # a directory over an empty one
    assert os.listdir(furnished / "empty") == ["inner"]
    (furnished / "file").rename(furnished / "link")  # over a link: the link goes, not what it points to
    assert not (furnished / "link").is_symlink() and (furnished / "link").read_bytes() == b"data"
    (furnished / "link").rename(furnished / "fifo")
    (furnished / "dangling").rename(furnished / "fifo")
    assert os.readlink(furnished / "fifo") == "nowhere"
    (furnished / "fifo").rename(furnished / "fifo")
    assert set(os.listdir(furnished)) == {"empty", "fifo", "loop"}


def test_a_directory_may_be_named_with_a_slash(place: Path) -> None:
    os.mkdir(f"{place}/one/")
    os.rename(f"{place}/one/", f"{place}/two/")
    (place / "link").symlink_to("two")
    assert os.stat(f"{place}/link/.").st_ino == os.stat(f"{place}//two/../two/").st_ino
    assert outcome(lambda: os.rmdir(f"{place}/link/")) == "ENOTDIR"
    os.rmdir(f"{place}/two/")
    assert os.listdir(place) == ["link"]


def test_rename_of_a_directory_takes_along_all_that_is_in_it(place: Path) -> None:
    (place / "one" / "deep" / "deeper").mkdir(parents=True)
    (place / "other").mkdir()
    (place / "one" / "deep" / "file").write_bytes(b"data")
    os.chdir(place / "one" / "deep")
    with opened("file") as descriptor:
        (place / "one").rename(place / "other" / "two")
        os.write(descriptor, b"DATA")
        assert Path("file").read_bytes() == b"DATA"
    assert Path.cwd() == place / "other" / "two" / "deep"
    assert os.stat("../..").st_ino == (place / "other").stat().st_ino
    assert sorted(snapshot(place)) == [
        "other", "other/two", "other/two/deep", "other/two/deep/deeper", "other/two/deep/file"
    ]  # fmt: skip
    assert outcome(lambda: os.stat(place / "one")) == "ENOENT"


def test_a_number_stays_with_what_it_was_given_to(furnished: Path) -> None:
    before = {name: (furnished / name).lstat().st_ino for name in os.listdir(furnished)}
    assert len(set(before.values())) == len(before)
    with os.scandir(furnished) as entries:
        assert {entry.name: entry.inode() for entry in entries} == before
    (furnished / "file").rename(furnished / "dir" / "moved")
    (furnished / "empty").rename(furnished / "elsewhere")
    assert (furnished / "dir" / "moved").stat().st_ino == before["file"]
    assert (furnished / "elsewhere").stat().st_ino == before["empty"]
    (furnished / "file").touch()
    assert (furnished / "file").stat().st_ino != before["file"]


def test_noreplace_makes_a_name_that_is_free(furnished: Path) -> None:
    renameat2(furnished / "file", furnished / "dir" / "moved", RENAME_NOREPLACE)
    assert (furnished / "dir" / "moved").read_bytes() == b"data"
    assert outcome(lambda: renameat2(furnished / "dir", furnished / "empty", RENAME_NOREPLACE)) == "EEXIST"


@pytest.mark.parametrize(
    ("one", "other"),
    [("file", "dir"), ("file", "link"), ("dir", "empty"), ("file", "dir/inner"), ("dir/inner", "fifo")],
)
def test_exchange_swaps_two_names_whatever_they_are(furnished: Path, one: str, other: str) -> None:
    numbers = (furnished / one).lstat().st_ino, (furnished / other).lstat().st_ino
    types = (furnished / one).lstat().st_mode, (furnished / other).lstat().st_mode
    renameat2(furnished / one, furnished / other, RENAME_EXCHANGE)
    assert ((furnished / other).lstat().st_ino, (furnished / one).lstat().st_ino) == numbers
    assert ((furnished / other).lstat().st_mode, (furnished / one).lstat().st_mode) == types
    renameat2(furnished / one, furnished / one, RENAME_EXCHANGE)
    renameat2(furnished / other, furnished / one, RENAME_EXCHANGE)
    assert ((furnished / one).lstat().st_ino, (furnished / other).lstat().st_ino) == numbers


def test_exchange_of_files_that_are_open(place: Path) -> None:
    with opened(place / "one", os.O_RDWR | os.O_CREAT) as one, opened(place / "two", os.O_RDWR | os.O_CREAT) as two:
        os.write(one, b"one")
        os.write(two, b"two")
        renameat2(place / "one", place / "two", RENAME_EXCHANGE)
        os.write(one, b"!")
        os.write(two, b"?")
        assert (os.fstat(one).st_nlink, os.fstat(two).st_nlink) == (1, 1)
    assert snapshot(place) == {"one": b"two?", "two": b"one!"}


# --- counts and times of directories ---------------------------------------------------------------------------------


def test_a_directory_counts_those_below(place: Path) -> None:
    def links(name: str) -> int:
        return (place / name).stat().st_nlink

    for name in ("one", "two", "one/a", "one/b", "two/c"):
        (place / name).mkdir()
    (place / "one" / "file").touch()
    assert (links("one"), links("two"), links("one/a")) == (4, 3, 2)
    (place / "one" / "a").rename(place / "two" / "a")
    assert (links("one"), links("two")) == (3, 4)
    renameat2(place / "one" / "file", place / "two" / "a", RENAME_EXCHANGE)
    assert (links("one"), links("two")) == (4, 3)
    (place / "one" / "b").rmdir()
    assert links("one") == 3
    with opened(place / "two" / "c", os.O_RDONLY) as descriptor:
        (place / "two" / "c").rmdir()
        assert os.fstat(descriptor).st_nlink == 0 and os.listdir(descriptor) == []
        assert outcome(lambda: os.mkdir("x", dir_fd=descriptor)) == "ENOENT"
    assert links("two") == 2
    assert (links("one/file"), links("two/a"), links("one")) == (2, 1, 3)


CHANGES = {
    "create": lambda p: (p / "new").touch(),
    "mkdir": lambda p: (p / "new").mkdir(),
    "symlink": lambda p: (p / "new").symlink_to("x"),
    "mkfifo": lambda p: os.mkfifo(p / "new"),
    "unlink": lambda p: (p / "file").unlink(),
    "rmdir": lambda p: (p / "empty").rmdir(),
    "rename": lambda p: (p / "file").rename(p / "new"),
    "rename over": lambda p: (p / "file").rename(p / "link"),
    "rename away": lambda p: (p / "file").rename(p / "dir" / "new"),
    "rename here": lambda p: (p / "dir" / "inner").rename(p / "new"),
    "exchange": lambda p: renameat2(p / "file", p / "dir" / "inner", RENAME_EXCHANGE),
}
KEEPERS = {
    "write": lambda p: (p / "file").write_bytes(b"other"),
    "chmod": lambda p: (p / "file").chmod(0o600),
    "list": lambda p: os.listdir(p),
    "create below": lambda p: (p / "dir" / "new").touch(),
    "fail": lambda p: outcome(lambda: (p / "dir").mkdir()),
}


@pytest.mark.parametrize("name", [*CHANGES, *KEEPERS])
def test_the_time_of_a_directory_is_that_of_its_last_change_of_names(furnished: Path, name: str) -> None:
    os.utime(furnished, ns=(1, 2))
    changed = furnished.stat().st_ctime_ns
    (CHANGES | KEEPERS)[name](furnished)
    found = furnished.stat()
    assert (found.st_mtime_ns > 2) is (name in CHANGES)
    assert found.st_ctime_ns >= changed


# --- listings --------------------------------------------------------------------------------------------------------


def test_a_listing_has_dots_types_and_numbers(furnished: Path) -> None:
    with listing(furnished) as names:
        assert sorted(names) == sorted([".", "..", *os.listdir(furnished)])
    with os.scandir(furnished) as entries:
        for entry in entries:
            status = (furnished / entry.name).lstat()
            assert entry.is_dir(follow_symlinks=False) == stat.S_ISDIR(status.st_mode)
            assert entry.is_symlink() == stat.S_ISLNK(status.st_mode)
            assert entry.is_file(follow_symlinks=False) == stat.S_ISREG(status.st_mode)
            assert entry.inode() == status.st_ino


def test_what_is_removed_while_it_is_listed_is_seen_once(place: Path) -> None:
    wanted = numbered(place)
    seen = []
    with listing(place) as names:
        for name in names:
            if name not in (".", ".."):
                seen.append(name)
                (place / name).unlink()
    assert sorted(seen) == sorted(wanted)
    assert os.listdir(place) == []


def test_what_stays_is_seen_once_while_others_come_and_go(place: Path) -> None:
    stay = {name for name in numbered(place, 600) if int(name[5:9]) % 2}
    seen = []
    with listing(place) as names:
        for number, name in enumerate(names):
            seen.append(name)
            (place / f"new-{number}").touch()
            if name not in stay and name.startswith("name"):
                (place / name).unlink()
            if number == 5000:
                break  # new ones may be seen, or not, as they like
    assert sorted(name for name in seen if name in stay) == sorted(stay)


def test_telldir_seekdir_and_rewinddir(place: Path) -> None:
    numbered(place, 300)
    with listing(place) as names:
        walk = iter(names)
        first = [next(walk) for _ in range(100)]
        here = names.tell()
        rest = list(names)
        names.seek(here)
        assert list(names) == rest
        (place / rest[-1]).unlink()
        names.seek(here)
        assert list(names) == rest[:-1]
        (place / "new").touch()
        names.rewind()
        assert set(names) == {*first, *rest[:-1], "new"}


def test_two_listings_of_one_directory_do_not_disturb_each_other(place: Path) -> None:
    wanted = numbered(place, 300) | {".", ".."}
    with listing(place) as one, listing(place) as other:
        pairs = list(zip(one, other, strict=True))
    assert {a for a, _ in pairs} == {b for _, b in pairs} == wanted


# --- links and odd names ---------------------------------------------------------------------------------------------


def test_symbolic_links(place: Path) -> None:
    for target in ("x", "t" * 4095, "../a b/ü\n", "/"):
        (place / "link").symlink_to(target)
        assert os.readlink(place / "link") == target
        assert (place / "link").lstat().st_size == len(os.fsencode(target))
        (place / "link").unlink()
    (place / "dir").mkdir()
    (place / "dir" / "up").symlink_to("../file")
    (place / "down").symlink_to("dir")
    (place / "down" / "up").write_bytes(b"made through two links")
    assert (place / "file").read_bytes() == b"made through two links"
    for number in range(40):
        (place / f"link{number}").symlink_to(f"link{number + 1}" if number < 39 else "file")
    assert (place / "link0").read_bytes() == b"made through two links"
    os.truncate(place / "link30", 4)
    assert (place / "file").read_bytes() == b"made" and os.readlink(place / "link0") == "link1"


NFC = [
    "ü" * 127 + "x", "n" * 255, "\U0001f600" * 63, " ", "a b", "-rf", "a\nb", "tab\t", "back\\slash", "*?[", "'\"",
    "...", ".hidden", "trailing.", "trailing ", "%2F", "a:b", "\x01\x7f", "CON", "ﬁ", "\u202e",
]  # fmt: skip


@pytest.mark.parametrize("name", NFC)
def test_any_name_works_everywhere(place: Path, name: str) -> None:
    assert unicodedata.is_normalized("NFC", name)
    (place / name).write_bytes(b"1")
    assert os.listdir(place) == [name]
    (place / name).rename(place / "short")
    (place / "short").rename(place / name)
    assert (place / name).read_bytes() == b"1"
    (place / name).unlink()
    (place / name).mkdir()
    (place / name / name).symlink_to(name)
    assert os.readlink(place / name / name) == name
    shutil.rmtree(place / name)
    assert os.listdir(place) == []


def test_upper_and_lower_case_are_different_names(place: Path) -> None:
    for name in ("a", "A", "ä", "Ä"):
        (place / name).write_text(name)
    assert snapshot(place) == {name: name.encode() for name in ("a", "A", "ä", "Ä")}
    (place / "a").rename(place / "A")
    assert (place / "A").read_text() == "a"


def test_a_working_directory_that_is_gone(place: Path) -> None:
    (place / "dir").mkdir()
    os.chdir(place / "dir")
    (place / "dir").rmdir()
    assert outcome(os.getcwd) == "ENOENT"
    assert outcome(lambda: Path("x").touch()) == "ENOENT"
    assert outcome(lambda: os.mkdir("x")) == "ENOENT"
    assert os.listdir(".") == []
    assert os.stat("..").st_ino == place.stat().st_ino


def test_trees_a_hundred_deep(place: Path) -> None:
    os.chdir(place)
    for number in range(100):
        os.mkdir(f"level{number}")
        os.chdir(f"level{number}")
    Path("bottom").write_bytes(b"down here")
    path = place.joinpath(*(f"level{number}" for number in range(100)))
    assert (path / "bottom").read_bytes() == b"down here"
    assert subprocess.run(["find", place, "-name", "bottom"], capture_output=True, check=True).stdout
    os.chdir("/")
    (place / "level0").rename(place / "top")
    shutil.rmtree(place / "top")
