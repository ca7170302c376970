"""`tahoefs check`, `manifest` and `tend` beside the real client: the same walk, and what we repair it finds whole."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.parse
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import pytest
import trio

from grid.check_history import CheckHistory
from grid.client import join_grid
from grid.formats.caps import parse_known_cap
from grid.formats.mutable_share import parse_header
from grid.node_directory import NodeDirectory
from grid.operations import recode
from grid.operations.repair_mutable import marker_of
from tests.real.damage import (
    Damage,
    another,
    copies_of,
    deleted,
    field_flipped,
    first,
    read_share,
    truncated,
    write_share,
)
from tests.real.mounting import tahoefs
from tests.real.sample_tree import content
from tests.real.tahoe_grid import TahoeGrid, wait_until

pytestmark = pytest.mark.interop

CAPS: Final = ("cap", "verifycap", "repaircap", "readcap")


def operation(grid: TahoeGrid, cap: str, name: str) -> Any:
    path = f"/uri/{urllib.parse.quote(cap, safe='')}?t={name}"
    return [json.loads(line) for line in grid.request("POST", path, b"").splitlines()]


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def make_tree(grid: TahoeGrid) -> str:
    """Every kind of child, a cycle, and things that are linked twice, deeper first and later first."""
    root = grid.mkdir()
    grid.put_at(root, "b.txt", content(100, 1))
    grid.put_at(root, "a-lit", b"l")
    grid.put_at(root, "größe", b"mutable", "SDMF")
    for path in ("sub", "sub/deep", "another"):
        grid.mkdir_at(root, path)
    twice = grid.put_at(root, "sub/deep/x", content(5000, 2))
    grid.link(root, "sub/y", twice)
    grid.link(root, "loop", root)
    shared = grid.mkdir()
    grid.put_at(shared, "inside", content(70, 3))
    grid.link(root, "another/shared", shared)
    grid.link(root, "zz", shared)
    literal = grid.put(b"hi")
    frozen = {"a": ["filenode", {"ro_uri": twice}], "l": ["filenode", {"ro_uri": literal}]}
    grid.link(root, "imm", grid.mkdir_immutable(frozen))
    grid.link(root, "litdir", grid.mkdir_immutable({}))
    grid.set_children(root, {"unk": ["unknown", {"ro_uri": "ro.lafs://x"}]})
    return root


def outputs(commands: Sequence[Sequence[str | Path]], stdin: str) -> list[str]:
    """What each says; they mostly wait, so they run at once."""
    with ThreadPoolExecutor(len(commands)) as pool:
        return [done.stdout for done in pool.map(lambda command: tahoefs(*command, stdin=stdin), commands)]


def test_the_same_walk_as_the_real_client(real_grid: TahoeGrid, node_dir: Path) -> None:
    root = make_tree(real_grid)
    manifest = operation(real_grid, root, "stream-manifest")
    found = operation(real_grid, root, "stream-deep-check")
    walked, counted, verify_caps, checked = outputs(
        [
            ("manifest", "-", "--json", "-d", node_dir),
            ("manifest", "-", "--stats", "--json", "-d", node_dir),
            ("manifest", "-", "--verify-caps", "-d", node_dir),
            ("check", "-", "--deep", "--json", "-d", node_dir),
        ],
        stdin=root,
    )
    assert lines(walked) == manifest
    assert json.loads(counted) == manifest[-1]["stats"]
    assert verify_caps.split() == [unit["verifycap"] for unit in manifest[:-1] if unit["verifycap"]]

    for unit in found:
        for name in CAPS:
            unit.pop(name, None)
    *units, stats, totals = lines(checked)
    for unit in (*units, *found[:-1]):
        results = unit["check-results"]["results"]
        for name in ("list-invalid-shares", "list-incompatible-shares", "servers-silent"):
            results.pop(name, None)
        if results.get("servers-responding"):
            results["servers-responding"].sort()
    assert [*units, stats] == found
    assert (totals["count-objects-checked"], totals["count-objects-healthy"]) == (10, 10)
    said = tahoefs("check", "-", "--deep", "-d", node_dir, stdin=root).stdout.splitlines()
    assert said[:3] == ["'<root>': Healthy", "'unk': of an unknown kind, not checked", "'a-lit': Healthy (LIT)"]
    assert "'imm/a': Healthy" in said
    assert said[-1] == "done: 10 objects checked, 10 healthy, 0 unhealthy"


DAMAGES: Final[dict[str, Damage]] = {
    "three deleted": deleted(1, 5, 9),
    "corrupt": field_flipped("data", 2, 4),
    "cut": truncated(300, 7),
    "only k left": deleted(*range(7)),
}


KINDS: Final = ("CHK", "SDMF", "MDMF", "DIR2")


def assert_whole(grid: TahoeGrid, cap: str, name: str, corrupt_before: int) -> None:
    """A corrupt immutable share stays: its number is made elsewhere."""
    results = grid.check(cap)["results"]
    assert results["healthy"] and results["count-shares-good"] == 10, name
    assert all(len(servers) == 1 for servers in results["sharemap"].values()), name
    bad = sum(map(len, copies_of(grid, cap).values())) - 10
    assert bad == results["count-corrupt-shares"] == (corrupt_before if "CHK" in cap else 0), name


async def test_what_we_repair_the_real_client_finds_whole(real_grid: TahoeGrid) -> None:
    """With n distinct shares, none twice; and reads it. Mutable files are damaged and repaired again and again."""
    data = content(70_000, 7)

    def make(kind: str, seed: int) -> str:
        if kind != "DIR2":
            return real_grid.put(data if kind != "CHK" else content(70_000, seed), kind)
        cap = real_grid.mkdir()
        real_grid.put_at(cap, "y", data[:100])
        return cap

    caps: dict[tuple[str, str], str] = {}
    for kind in KINDS:
        cap = make(kind, 0)
        for seed, name in enumerate(DAMAGES):  # corrupt shares of an immutable file stay, so it takes another one
            caps[kind, name] = make(kind, seed) if kind == "CHK" and seed else cap

    async with join_grid(NodeDirectory.open(real_grid.client.path)) as client:
        assert await client.broker.wait_for_servers(10, 60) == 10
        checker = client.checker(CheckHistory(None))

        async def repair_and_look(kind: str) -> None:
            for name, damage in DAMAGES.items():
                cap = caps[kind, name]
                damage(real_grid, copies_of(real_grid, cap))
                allowed = str(parse_known_cap(cap).verifier) if kind == "CHK" else cap
                repaired = await checker.repair(allowed, verify=True)
                assert repaired.attempted and repaired.successful, (kind, name, repaired.reason)
                corrupt = len(repaired.before.corrupt)
                await trio.to_thread.run_sync(assert_whole, real_grid, cap, f"{kind}: {name}", corrupt)
            read = await trio.to_thread.run_sync(real_grid.get, cap, "y" if kind == "DIR2" else "")
            assert read == {"DIR2": data[:100], "CHK": content(70_000, len(DAMAGES) - 1)}.get(kind, data)

        async with trio.open_nursery() as nursery:
            for kind in KINDS:
                nursery.start_soon(repair_and_look, kind)


async def test_a_share_that_takes_several_calls(real_grid: TahoeGrid, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real client counts one that is not complete as none. Afterwards it is the one that was there before."""
    monkeypatch.setattr(recode, "STEP_BYTES", 1)
    data = content(600_000, 9)
    cap = await trio.to_thread.run_sync(real_grid.put, data, "MDMF")
    copies = copies_of(real_grid, cap)
    whole = {number: read_share(first(copies, number)) for number in copies}
    deleted(1, 8)(real_grid, copies)
    marker = marker_of(parse_header(whole[5]))
    write_share(first(copies, 5), marker + whole[5][len(marker) : 100_000])
    for verify in (False, True):
        results = real_grid.check(cap, verify=verify)["results"]
        assert (results["count-shares-good"], results["count-wrong-shares"], results["recoverable"]) == (7, 0, True)
    async with join_grid(NodeDirectory.open(real_grid.client.path)) as client:
        assert await client.broker.wait_for_servers(10, 60) == 10
        repaired = await client.checker(CheckHistory(None)).repair(cap)
        assert repaired.attempted and repaired.successful, repaired.reason
    await trio.to_thread.run_sync(assert_whole, real_grid, cap, "MDMF", 0)
    assert {number: read_share(file) for number, ((_, file),) in copies_of(real_grid, cap).items()} == whole
    assert await trio.to_thread.run_sync(real_grid.get, cap) == data
    await trio.to_thread.run_sync(real_grid.put_into, cap, 300_000, b"and it writes there")
    assert (await trio.to_thread.run_sync(real_grid.check, cap))["results"]["healthy"]


def of_all_servers(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """What the command says once no server keeps silent: one that does might have what is missing (3)."""

    def answered() -> subprocess.CompletedProcess[str] | None:
        done = tahoefs(*arguments, check=False, **options)
        return None if done.returncode == 3 else done

    found: subprocess.CompletedProcess[str] = wait_until(answered, "all servers to answer")
    return found


def test_codes_and_who_may_repair(real_grid: TahoeGrid, node_dir: Path) -> None:
    cap = real_grid.put(content(1000, 8), "SDMF")
    known = parse_known_cap(cap)
    deleted(0)(real_grid, copies_of(real_grid, cap))
    done = tahoefs("check", "-", "--repair", "-d", node_dir, stdin=str(known.verifier), check=False)
    assert done.returncode == 4 and "write cap" in done.stderr
    assert str(known.verifier) not in done.stderr + done.stdout
    done = tahoefs("check", "-", "--repair", "--add-lease", "--json", "-d", node_dir, stdin=cap)
    assert json.loads(done.stdout)["repair-successful"]
    deleted(*range(8))(real_grid, copies_of(real_grid, cap))
    done = of_all_servers("check", "-", "-d", node_dir, stdin=str(known.verifier))
    assert done.returncode == 5 and "no versions are recoverable" in done.stdout
    history = json.loads(tahoefs("check", "-", "--history", "--json", "-d", node_dir, stdin=cap).stdout)
    assert [each["results"]["healthy"] for each in history] == [False, False, True, False]


def test_an_interrupted_deep_check_is_resumed(real_grid: TahoeGrid, node_dir: Path) -> None:
    """Ctrl-C in the middle; what was checked is not asked for again, and the output is whole in the end."""
    root = real_grid.mkdir()
    cap = real_grid.put(content(60, 0))
    files = {f"f{n:03}": ["filenode", {"ro_uri": another(real_grid, cap, str(n))}] for n in range(15)}
    real_grid.set_children(root, files)
    command = [sys.executable, "-m", "tahoefs.cli", "check", "-", "--deep", "--verify", "--json", "-d", str(node_dir)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    )
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(root)
    process.stdin.close()
    process.stdin = None
    assert json.loads(process.stdout.readline())["path"] == []
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "--resume" in errors, errors
    *units, stats, totals = lines(tahoefs(*command[3:], "--resume", stdin=root).stdout)
    assert [unit["path"] for unit in units] == [[], *([name] for name in sorted(files))]
    assert totals["count-objects-healthy"] == 16 and stats["stats"]["count-immutable-files"] == 15
    seen = json.loads(tahoefs("check", "-", "--history", "--json", "-d", node_dir, stdin=root).stdout)
    assert len(seen) == 1, "the root was checked before the interruption, and not again"


def test_have(real_grid: TahoeGrid, node_dir: Path, tmp_path: Path) -> None:
    """By the cap the real client gave it; and where it is linked."""
    root = real_grid.mkdir()
    stored, other = tmp_path / "stored", tmp_path / "other"
    stored.write_bytes(content(3000, 20))
    other.write_bytes(content(3000, 21))
    real_grid.mkdir_at(root, "below")
    cap = real_grid.put_at(root, "below/name", stored.read_bytes())
    (tmp_path / "root.cap").write_text(root)
    done = tahoefs("have", stored, "--in", f"@{tmp_path / 'root.cap'}", "--json", "-d", node_dir)
    answer = json.loads(done.stdout)
    assert answer["results"]["healthy"] and answer["linked"] == [f"@{tmp_path / 'root.cap'}/below/name"]
    done = tahoefs("have", stored, other, "-d", node_dir, check=False)
    assert done.returncode == 1
    assert done.stdout.splitlines() == [f"{stored}: Healthy", f"{other}: not on this grid"]
    deleted(*range(8))(real_grid, copies_of(real_grid, cap))
    assert of_all_servers("have", stored, "-d", node_dir).returncode == 5
