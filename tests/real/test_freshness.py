"""Another writer's changes: seen soon, and never half."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import pytest

from tests.real.mounting import Mounter
from tests.real.sample_tree import content
from tests.real.tahoe_grid import TahoeGrid

pytestmark = [pytest.mark.interop, pytest.mark.mount]

POLL_S = 1.0
SEEN_S_MAX = 20  # promised: POLL_S and a second; a loaded machine may be slower than that
ROUNDS = 3
SIZE = 300_000


@pytest.mark.parametrize("file_format", ["CHK", "SDMF"])
def test_a_change_elsewhere_is_seen_whole(
    real_grid: TahoeGrid, root_cap: str, mounted: Mounter, file_format: str
) -> None:
    versions = [content(SIZE + number, 80 + number) for number in range(ROUNDS)]
    real_grid.put_at(root_cap, "file", versions[0], file_format)
    with mounted(root_cap, f"poll={POLL_S}") as mount:
        path = mount.path / "file"
        assert path.read_bytes() == versions[0]
        for old, new in itertools.pairwise(versions):
            held = path.open("rb") if file_format == "CHK" else None
            assert held is None or held.read(1000) == old[:1000]
            real_grid.put_at(root_cap, "file", new, file_format)
            done = time.monotonic()
            while (seen := path.read_bytes()) != new:
                assert seen == old
                assert time.monotonic() - done < SEEN_S_MAX
            if held is not None:  # what is open stays what it was
                with held:
                    assert held.read() == old[1000:]
            real_grid.put_at(root_cap, f"name of {len(new)}", b"another file", file_format)
            done = time.monotonic()
            while f"name of {len(new)}" not in _names(mount.path):
                assert time.monotonic() - done < SEEN_S_MAX


def _names(path: Path) -> set[str]:
    return {each.name for each in path.iterdir()}
