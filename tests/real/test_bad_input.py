"""What a user can get wrong: one line that says what to do, the right exit code, nothing left mounted."""

from __future__ import annotations

from pathlib import Path

import pytest

from tahoefs.mountpoint import filesystem_at
from tests.real.mounting import can_mount, tahoefs
from tests.real.tahoe_grid import TahoeGrid

pytestmark = [pytest.mark.interop, pytest.mark.mount]

OK, FAILED, USAGE, UNREACHABLE, CAP = 0, 1, 2, 3, 4
UNREACHABLE_FURL = "pb://aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa@tcp:127.0.0.1:1/introducer"


@pytest.fixture(autouse=True)
def _can_mount() -> None:
    if (reason := can_mount()) is not None:
        pytest.skip(reason)


def refused(exit_code: int, *arguments: str | Path, where: Path, stdin: str = "", says: str) -> None:
    done = tahoefs("mount", *arguments, check=False, stdin=stdin)
    assert done.returncode == exit_code, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert says in done.stderr
    assert "URI:" not in done.stderr
    assert filesystem_at(where) is None


@pytest.fixture
def where(tmp_path: Path) -> Path:
    (tmp_path / "mnt").mkdir()
    return tmp_path / "mnt"


def test_garbled_caps(node_dir: Path, where: Path, root_cap: str) -> None:
    for text in ("URI:DIR2:garbled", root_cap[:-3], "lafs://unknown", "nonsense"):
        refused(CAP, "-", where, "-d", node_dir, where=where, stdin=text, says="cap")


def test_no_cap(node_dir: Path, where: Path, tmp_path: Path) -> None:
    refused(USAGE, "-", where, "-d", node_dir, where=where, says="no cap")
    refused(USAGE, f"@{tmp_path}/missing", where, "-d", node_dir, where=where, says="No such file")
    refused(USAGE, "nobody:", where, "-d", node_dir, where=where, says="create-alias")


def test_a_file_is_not_a_directory(real_grid: TahoeGrid, node_dir: Path, where: Path, root_cap: str) -> None:
    cap = real_grid.put_at(root_cap, "file", b"not a directory, and long enough not to be a literal in a cap")
    refused(CAP, "-", where, "-d", node_dir, where=where, stdin=cap, says="directory")
    refused(CAP, "-", where, "-d", node_dir, where=where, stdin=f"{root_cap}/file", says="directory")
    refused(FAILED, "-", where, "-d", node_dir, where=where, stdin=f"{root_cap}/missing", says="missing")


def test_mount_points(node_dir: Path, where: Path, root_cap: str, tmp_path: Path) -> None:
    refused(FAILED, "-", tmp_path / "no", "-d", node_dir, where=where, stdin=root_cap, says="no such directory")
    (tmp_path / "file").touch()
    refused(FAILED, "-", tmp_path / "file", "-d", node_dir, where=where, stdin=root_cap, says="not a directory")
    (where / "file").touch()
    refused(FAILED, "-", where, "-d", node_dir, where=where, stdin=root_cap, says="not empty")


def test_unknown_options(node_dir: Path, where: Path, root_cap: str) -> None:
    for option in ("nonsense", "poll=soon", "durability=maybe", "umask=9"):
        refused(USAGE, "-", where, "-d", node_dir, "-o", option, where=where, stdin=root_cap, says=option.split("=")[0])


def test_missing_node_directory(tmp_path: Path, where: Path, root_cap: str) -> None:
    refused(FAILED, "-", where, "-d", tmp_path / "no", where=where, stdin=root_cap, says="create-client")


def test_unreachable_introducer(tmp_path: Path, where: Path, root_cap: str) -> None:
    tahoefs("create-client", tmp_path / "node", "--introducer", UNREACHABLE_FURL)
    refused(UNREACHABLE, "-", where, "-d", tmp_path / "node", where=where, stdin=root_cap, says="servers")


def test_too_few_servers(real_grid: TahoeGrid, node_dir: Path, where: Path, root_cap: str) -> None:
    with real_grid.without(range(8)):
        refused(UNREACHABLE, "-", where, "-d", node_dir, where=where, stdin=root_cap, says="servers")


def test_not_mounted(where: Path) -> None:
    done = tahoefs("umount", where, check=False)
    assert (done.returncode, len(done.stderr.strip().splitlines())) == (FAILED, 1)
    assert "not a tahoefs mount" in done.stderr
