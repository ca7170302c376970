"""The import direction: tahoefs → cache → grid, the order inside grid, and who alone may import what.

Read from the syntax trees, so an import inside a function counts as well.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("grid", "cache", "tahoefs")  # each may import itself and those before it

# Inside grid, a module may import its own room and those before it. What has no room here is a room by itself.
GRID_ORDER = (
    ("grid.errors", "grid.interfaces", "grid.interfaces_servers", "grid.stats"),
    ("grid.crypto",),
    ("grid.erasure",),
    ("grid.formats",),
    ("grid.wire",),
    ("grid.transports",),
    ("grid.peers",),
    ("grid.operations",),
    ("grid.nodes",),
    ("grid.server",),
    ("grid.client", "grid.measure", "grid.control", "grid.services"),
)
# Disk layouts of a node: they stand beside the rooms, on the formats, and peers may be given what they read.
NODE_FILES = (
    "grid.aliases",
    "grid.atomic_file",
    "grid.check_history",
    "grid.node_directory",
    "grid.node_files",
    "grid.server_directory",
    "grid.storage_settings",
)

SOLE_IMPORTERS = {
    "cryptography": {"grid.crypto"},
    "zfec": {"grid.erasure"},
    "OpenSSL": {"grid.transports.tls"},
    "ssl": {"grid.transports.tls"},
    "prometheus_client": {"tahoefs.exposition"},
    "pyfuse3": {"tahoefs.fuse"},
}
# Bytes-only rooms: no I/O, no clock, no random source, no event loop.
PURE_ROOMS = (*GRID_ORDER[0], "grid.crypto", "grid.erasure", "grid.formats", "grid.wire")
IMPURE_MODULES = {"trio", "socket", "os", "io", "pathlib", "shutil", "subprocess", "threading", "time", "random"}
IMPURE_MODULES |= {"secrets", "select", "asyncio", "tempfile"}


def _modules() -> dict[str, Path]:
    """{dotted name: file} of all our sources."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = _modules()


def _imports(module: str) -> Iterator[str]:
    """Dotted names of all it imports, `from a import b` as a.b when b is a module of ours and as a otherwise."""
    path = MODULES[module]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import"
            base = node.module or ""
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield full if full in MODULES else base


def _within(module: str, room: str) -> bool:
    return module == room or module.startswith(room + ".")


def _rank(module: str) -> int | None:
    """Which room of grid; None outside of the rooms."""
    for rank, rooms in enumerate(GRID_ORDER):
        if any(_within(module, room) for room in rooms):
            return rank
    return None


def test_there_is_something_to_check() -> None:
    assert {"grid.errors", "grid.formats.base32"} <= set(MODULES)
    assert set(_imports("grid.formats.hashutil")) >= {"hashlib", "grid.formats.netstring", "grid.interfaces"}


@pytest.mark.parametrize("module", MODULES)
def test_packages_import_downwards(module: str) -> None:
    own = PACKAGES.index(module.split(".")[0])
    above = {name for name in _imports(module) if name.split(".")[0] in PACKAGES[own + 1 :]}
    assert not above, f"{module} imports {above} from above it"


@pytest.mark.parametrize("module", [module for module in MODULES if _rank(module) is not None])
def test_rooms_of_grid_import_those_before_them(module: str) -> None:
    own = _rank(module)
    assert own is not None
    for name in _imports(module):
        if not _within(name, "grid"):
            continue
        rank = _rank(name)
        if rank is None:
            formats = next(i for i, rooms in enumerate(GRID_ORDER) if "grid.formats" in rooms)
            assert name in NODE_FILES and own > formats, f"{module} imports {name}, which belongs to no room"
        else:
            assert rank <= own, f"{module} imports {name}, a room after its own"


@pytest.mark.parametrize("module", [module for module in MODULES if module in NODE_FILES])
def test_node_files_stand_on_the_formats(module: str) -> None:
    allowed = (*GRID_ORDER[0], "grid.crypto", "grid.formats", *NODE_FILES)
    for name in _imports(module):
        assert not _within(name, "grid") or any(_within(name, room) for room in allowed), f"{module} imports {name}"


def test_every_module_of_grid_has_a_place() -> None:
    homeless = [m for m in MODULES if _within(m, "grid") and m != "grid" and _rank(m) is None and m not in NODE_FILES]
    assert not homeless


@pytest.mark.parametrize("library", SOLE_IMPORTERS)
def test_libraries_behind_one_module(library: str) -> None:
    users = {module for module in MODULES if any(_within(name, library) for name in _imports(module))}
    assert users <= SOLE_IMPORTERS[library]


@pytest.mark.parametrize("module", [m for m in MODULES if any(_within(m, room) for room in PURE_ROOMS)])
def test_bytes_only_rooms_do_no_io(module: str) -> None:
    impure = {name for name in _imports(module) if name.split(".")[0] in IMPURE_MODULES}
    assert not impure
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    calls = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert not calls & {"open", "print", "input"}
