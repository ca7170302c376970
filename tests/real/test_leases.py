"""A caretaker who holds verify caps and nothing else keeps a tree alive on servers that drop what nobody renews."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import trio

from grid.formats.base32 import b2a
from grid.formats.caps import parse_cap, parse_known_cap
from grid.node_directory import create_client_directory
from grid.server.expirer import Expirer, ExpiryPolicy
from grid.server.shares import ShareStore
from grid.server.storage import StorageService
from tests.real.damage import age_leases, deleted
from tests.real.mounting import tahoefs
from tests.real.sample_tree import content
from tests.real.tahoe_grid import TahoeGrid, TahoeNotAvailable, wait_until

pytestmark = pytest.mark.interop

DAY_S: Final = 86400
OLD_S: Final = 20 * DAY_S
LEASE_S: Final = 10 * DAY_S  # what a server allows here
SHARES: Final = (2, 3, 4)
SERVERS: Final = 4
EXPIRER_TIMEOUT_S: Final = 900  # the real one begins six minutes after its start


@pytest.fixture
def small_grid(tmp_path: Path) -> Iterator[TahoeGrid]:
    try:
        grid = TahoeGrid(tmp_path / "grid", servers=SERVERS, shares=SHARES)
    except TahoeNotAvailable as reason:
        pytest.skip(str(reason))
    try:
        yield grid.start()
    finally:
        grid.stop()


def index_of(cap: str) -> str:
    storage_index = parse_known_cap(cap).storage_index
    assert storage_index is not None
    return b2a(storage_index)


def make(grid: TahoeGrid) -> tuple[list[str], list[str]]:
    """(caps of a tree, caps that are in no tree), all with old leases."""
    root = grid.mkdir()
    grid.mkdir_at(root, "below")
    kept = [root, grid.put_at(root, "file", content(5000, 1)), grid.put_at(root, "below/mutable", b"m", "SDMF")]
    kept.append(grid.json(root, "below")[1]["rw_uri"])
    dropped = [grid.put(content(5000, 2)), grid.put(b"dropped", "SDMF")]
    for cap in (*kept, *dropped):
        for copies in grid.share_files(index_of(cap)).values():
            for _, file in copies:
                age_leases(file, OLD_S)
    return kept, dropped


def tended(grid: TahoeGrid, kept: list[str], tmp_path: Path) -> None:
    """By somebody with a node directory of their own; a share of the immutable file is missing."""
    lines = tahoefs("manifest", "-", "--verify-caps", "-d", grid.client.path, stdin=kept[0]).stdout.split()
    assert {index_of(line) for line in lines} == {index_of(cap) for cap in kept}
    assert all(getattr(parse_cap(line), "is_verifier", False) for line in lines), "nothing that could be read"
    caps_file, caretaker = tmp_path / "tree.vcaps", tmp_path / "caretaker"
    caps_file.write_text("# somebody's tree\n" + "\n".join(lines) + "\n")
    create_client_directory(caretaker, introducers=[grid.introducer_furl], nickname="caretaker", shares=SHARES)
    deleted(0)(grid, grid.share_files(index_of(kept[1])))
    done = tahoefs("tend", caps_file, "-d", caretaker)
    assert done.stdout.splitlines()[-1].startswith("done: 4 objects checked, 4 healthy, 0 unhealthy, 1 of 1 repairs")
    assert "line 3" in done.stdout or "line 2" in done.stdout, "the repaired file is told of"
    assert grid.check(kept[1])["results"]["count-shares-good"] == SHARES[2]


def test_tended_by_verify_caps_and_expired_by_our_server(small_grid: TahoeGrid, tmp_path: Path) -> None:
    kept, dropped = make(small_grid)
    tended(small_grid, kept, tmp_path)
    policy = ExpiryPolicy(enabled=True, override_lease_duration_s=LEASE_S)

    async def expire(storage: Path) -> None:
        store = ShareStore(storage, tub_id=bytes(20), clock=time.time)
        try:
            service = StorageService(store)
            async with trio.open_nursery() as nursery:
                await nursery.start(service.run)
                await Expirer(service, policy).run_cycle()
                nursery.cancel_scope.cancel()
        finally:
            store.close()

    for server in small_grid.servers:
        server.kill()
        trio.run(expire, server.path / "storage")
    counts = {cap: sum(map(len, small_grid.share_files(index_of(cap)).values())) for cap in (*kept, *dropped)}
    assert counts == dict.fromkeys(kept, SHARES[2]) | dict.fromkeys(dropped, 0)


@pytest.mark.skipif(not os.environ.get("TAHOEFS_SOAK"), reason="takes seven minutes; TAHOEFS_SOAK=1")
def test_tended_by_verify_caps_and_expired_by_a_real_server(small_grid: TahoeGrid, tmp_path: Path) -> None:
    kept, dropped = make(small_grid)
    tended(small_grid, kept, tmp_path)
    for server in small_grid.servers:
        server.kill()
        settings = (
            f"expire.enabled = true\nexpire.mode = age\nexpire.override_lease_duration = {LEASE_S // DAY_S} days\n"
        )
        config = server.path / "tahoe.cfg"
        config.write_text(config.read_text() + settings)
        shutil.rmtree(server.path / "storage" / "incoming", ignore_errors=True)
        server.start()

    def left(caps: list[str]) -> dict[str, Any]:
        return {cap: sum(map(len, small_grid.share_files(index_of(cap)).values())) for cap in caps}

    wait_until(lambda: not any(left(dropped).values()), "the real expirer", EXPIRER_TIMEOUT_S)
    assert left(kept) == dict.fromkeys(kept, SHARES[2])
