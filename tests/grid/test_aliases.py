"""Aliases: what a user types, and the file it is looked up in."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from grid.aliases import add_alias, load_aliases, resolve
from grid.errors import BadCapError, NodeDirectoryError
from tests import vectors

DIRECTORY_CAP = next(v["cap"] for v in vectors.section("formats.json", "caps.caps") if v["cap"].startswith("URI:DIR2:"))
FILE_CAP = next(v["cap"] for v in vectors.section("formats.json", "caps.caps") if v["cap"].startswith("URI:CHK:"))


def write_aliases(node: Path, text: str) -> None:
    (node / "private").mkdir(exist_ok=True)
    (node / "private" / "aliases").write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("tahoe:", ("ROOT", [])),
        (" tahoe: ", ("ROOT", [])),
        ("tahoe:/", ("ROOT", [])),
        ("tahoe:a/b", ("ROOT", ["a", "b"])),
        ("tahoe:/a//b/", ("ROOT", ["a", "b"])),
        ("work:x y", ("WORK", ["x y"])),
        ("", ("ROOT", [])),
        ("a/b", ("ROOT", ["a", "b"])),
        ("a/b:c", ("ROOT", ["a", "b:c"])),
        ("work:a:b", ("WORK", ["a:b"])),
        ("URI:DIR2:x:y", ("URI:DIR2:x:y", [])),
        ("URI:DIR2:x:y/a/b", ("URI:DIR2:x:y", ["a", "b"])),
        ("URI:DIR2:x:y:./a/b", ("URI:DIR2:x:y", ["a", "b"])),
        ("ro.URI:x/a", ("ro.URI:x", ["a"])),
        ("imm.URI:x/a", ("imm.URI:x", ["a"])),
        ("tahoe:e\u0301", ("ROOT", ["\u00e9"])),
    ],
)
def test_resolve(argument: str, expected: tuple[str, list[str]]) -> None:
    assert resolve(argument, {"tahoe": "ROOT", "work": "WORK"}) == expected


def test_an_unknown_alias_says_what_to_do() -> None:
    with pytest.raises(NodeDirectoryError, match=r"'home:'.*add-alias"):
        resolve("home:x", {"tahoe": "ROOT"})
    with pytest.raises(NodeDirectoryError, match="'tahoe:'"):
        resolve("x", {})


def test_the_file_as_tahoe_reads_it(tmp_path: Path) -> None:
    write_aliases(tmp_path, "# a comment: URI:DIR2:no\n\n tahoe: URI:A \nno alias here\nwork:URI:B\nwork: URI:C\n")
    assert load_aliases(tmp_path) == {"tahoe": "URI:A", "work": "URI:C"}


def test_root_dir_cap_is_the_old_tahoe_alias(tmp_path: Path) -> None:
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "root_dir.cap").write_text("URI:OLD\n")
    assert load_aliases(tmp_path) == {"tahoe": "URI:OLD"}
    write_aliases(tmp_path, "tahoe: URI:NEW\n")
    assert load_aliases(tmp_path) == {"tahoe": "URI:NEW"}


def test_no_files_no_aliases(tmp_path: Path) -> None:
    assert load_aliases(tmp_path) == {}


def test_adding_keeps_what_is_there(tmp_path: Path) -> None:
    before = "# mine\nodd line\n  work:   URI:B   "
    write_aliases(tmp_path, before)
    add_alias(tmp_path, "home:", DIRECTORY_CAP)
    assert (tmp_path / "private" / "aliases").read_text() == f"{before}\nhome: {DIRECTORY_CAP}\n"
    assert load_aliases(tmp_path)["home"] == DIRECTORY_CAP
    assert list((tmp_path / "private").iterdir()) == [tmp_path / "private" / "aliases"]  # no temporary file stays


def test_a_new_alias_file_is_private(tmp_path: Path) -> None:
    add_alias(tmp_path, "home", DIRECTORY_CAP)
    assert stat.S_IMODE((tmp_path / "private" / "aliases").stat().st_mode) == 0o600


@pytest.mark.parametrize("name", ["", "a b", "a:b", "a/b", "#a", "a\n", "a\tb", "work"])
def test_names_that_cannot_be_added(tmp_path: Path, name: str) -> None:
    write_aliases(tmp_path, "work: URI:B\n")
    if name == "a\n":  # spaces at the ends are not part of it
        add_alias(tmp_path, name, DIRECTORY_CAP)
        return
    with pytest.raises(NodeDirectoryError):
        add_alias(tmp_path, name, DIRECTORY_CAP)


@pytest.mark.parametrize("cap", [FILE_CAP, "URI:DIR2:garbled", "x-something", ""])
def test_only_directories_can_have_an_alias(tmp_path: Path, cap: str) -> None:
    with pytest.raises(BadCapError) as caught:
        add_alias(tmp_path, "home", cap)
    assert not cap or cap not in str(caught.value)
    assert load_aliases(tmp_path) == {}
