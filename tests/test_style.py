"""Rules of style that a machine can check, over every file of the repository."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[1]
LINES_MAX: Final = 600
PACKAGES: Final = ("grid", "cache", "tahoefs")
NOT_OURS: Final = {"__pycache__", "vectors", "demo", "dist", "build"}
HIDDEN_BUT_OURS: Final = {".ci", ".gitignore"}
TEXT: Final = {".py", ".md", ".toml", ".sh", ".service", ".mount", ".yml", ".yaml", ".cfg", ""}

UNFINISHED: Final = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")
# A home or a working directory of somebody's, and where somebody gets packages from.
ABSOLUTE_PATH: Final = re.compile(r"(?<![\w.~}/])/(home/(?!me/)|root/|Users/|work/|workspace/)\w")
REGISTRY: Final = re.compile(r"index-url|index_url|pypi\.|pythonhosted|devpi|artifactory", re.IGNORECASE)


def _is_ours(path: Path) -> bool:
    parts = path.relative_to(ROOT).parts
    hidden = {part for part in parts if part.startswith(".")}
    return path.is_file() and not hidden - HIDDEN_BUT_OURS and not NOT_OURS & {*parts}


FILES: Final = [path for path in sorted(ROOT.rglob("*")) if _is_ours(path) and path.suffix in TEXT]
SOURCES: Final = [path for path in FILES if path.suffix == ".py"]
SHIPPED: Final = [path for path in SOURCES if path.relative_to(ROOT).parts[0] in PACKAGES]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def found(pattern: re.Pattern[str], path: Path) -> list[str]:
    lines = enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
    return [f"{number}: {line.strip()}" for number, line in lines if pattern.search(line)]


def test_there_is_something_to_check() -> None:
    names = {name_of(path) for path in FILES}
    assert {"README.md", "Makefile", "pyproject.toml", ".ci/run", "tools/setup", "grid/errors.py"} <= names
    assert len(SHIPPED) > 100


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_module_is_short_and_says_what_it_is(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LINES_MAX
    assert not text or ast.get_docstring(ast.parse(text))


@pytest.mark.parametrize("path", SHIPPED, ids=name_of)
def test_nothing_is_left_for_later(path: Path) -> None:
    assert not found(UNFINISHED, path)


def methods() -> Iterator[tuple[ast.ClassDef, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for path in SHIPPED:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for each in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(node, ast.ClassDef) and isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef):
                    yield node, each


def test_what_is_not_implemented_is_implemented_by_a_subclass() -> None:
    unfinished = {(cls.name, method.name) for cls, method in methods() if "NotImplementedError" in ast.unparse(method)}
    overridden = {(ast.unparse(base), method.name) for cls, method in methods() for base in cls.bases}
    mentions = sum(len(found(re.compile(r"raise NotImplementedError"), path)) for path in SHIPPED)
    assert mentions == len(unfinished)
    assert unfinished <= overridden


@pytest.mark.parametrize("path", [path for path in FILES if path != Path(__file__)], ids=name_of)
def test_nothing_is_true_on_one_machine_only(path: Path) -> None:
    assert not found(ABSOLUTE_PATH, path)
    assert not found(REGISTRY, path)
