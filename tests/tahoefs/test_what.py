"""WHAT: aliases, files, standard input, caps; and that the cap stays out of repr and errors."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from tahoefs.what import WhatError, resolve_what

CAP = "URI:DIR2:" + "a" * 26 + ":" + "a" * 52


@pytest.fixture
def node(tmp_path: Path) -> Path:
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "aliases").write_text(f"tahoe: {CAP}\nwork: {CAP}/inner\n")
    return tmp_path


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("tahoe:", ()),
        ("tahoe:/", ()),
        ("tahoe:a/b", ("a", "b")),
        ("tahoe:/a//b/", ("a", "b")),
        ("work:x", ("inner", "x")),
    ],
)
def test_aliases(node: Path, text: str, path: tuple[str, ...]) -> None:
    what = resolve_what(text, node)
    assert (what.cap, what.path) == (CAP, path)
    assert what.label.startswith(text.split(":")[0])


def test_files_and_standard_input(node: Path) -> None:
    (node / "cap").write_text(f"{CAP}\n")
    assert resolve_what(f"@{node}/cap", node).cap == CAP
    assert resolve_what("-", node, stdin=io.StringIO(f"  {CAP}/a \nmore")).path == ("a",)


def test_a_literal_cap_warns(node: Path) -> None:
    for text in (CAP, f"{CAP}/a/b", f"{CAP}:./a/b"):
        what = resolve_what(text, node)
        assert what.cap == CAP and what.warnings and CAP not in what.label


def test_caps_are_not_shown(node: Path) -> None:
    assert CAP not in repr(resolve_what("tahoe:", node))


@pytest.mark.parametrize("text", ["nobody:", "plain", "a/b:c", "@/nonexistent/file", "local:dir", ""])
def test_errors(node: Path, text: str) -> None:
    with pytest.raises(WhatError):
        resolve_what(text, node)


def test_a_node_directory_that_is_not_there(node: Path) -> None:
    with pytest.raises(WhatError, match="no node directory"):
        resolve_what("tahoe:", node / "nowhere")


def test_an_embedded_grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its directory may be new to a mount; to all else it has a root by then."""
    monkeypatch.chdir(tmp_path)
    what = resolve_what("local:grid", tmp_path, may_be_new=True)
    assert (what.local, what.cap, what.label) == (tmp_path / "grid", "", f"local:{tmp_path}/grid")
    (tmp_path / "grid").mkdir()
    (tmp_path / "grid" / "root.cap").write_text(f"{CAP}\n")
    what = resolve_what(f"local:{tmp_path}/grid", tmp_path)
    assert (what.cap, what.path) == (CAP, ()) and CAP not in repr(what)
    with pytest.raises(WhatError, match="directory"):
        resolve_what("local:", tmp_path, may_be_new=True)
