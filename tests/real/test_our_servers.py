"""The mount on our own introducer and servers, over both protocols: what is told of a real grid's servers holds here.

The real client is there to write what the mount reads, and to look at what the mount wrote. What it does on our
servers by itself is in test_own_nodes.py. Tests that say nothing of servers are not repeated here.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.real.tahoe_grid import SERVERS, TahoeGrid, TahoeNotAvailable
from tests.real.test_ours_to_theirs import (
    test_a_tree_copied_in,
    test_changes_arrive,
    test_mutable_files_are_rewritten_in_place,
    test_unlinked_while_open,
)
from tests.real.test_theirs_to_ours import (
    test_every_kind_is_listed_and_read,
    test_immutable_directories,
    their_tree,
)

__all__ = [
    "test_a_tree_copied_in",
    "test_changes_arrive",
    "test_every_kind_is_listed_and_read",
    "test_immutable_directories",
    "test_mutable_files_are_rewritten_in_place",
    "test_unlinked_while_open",
    "their_tree",
]

pytestmark = [pytest.mark.interop, pytest.mark.mount]


@pytest.fixture(scope="module", params=["HTTP", "Foolscap"])
def real_grid(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TahoeGrid]:
    """Only its client is real. With `force_foolscap` the servers announce nothing else."""
    try:
        grid = TahoeGrid(
            tmp_path_factory.mktemp("our-grid"),
            our_introducer=True,
            our_servers=SERVERS,
            force_foolscap=request.param == "Foolscap",
        )
    except TahoeNotAvailable as reason:
        pytest.skip(str(reason))
    try:
        yield grid.start()
    finally:
        grid.stop()


@pytest.fixture(scope="module")
def node_dir(real_grid: TahoeGrid) -> Path:
    return real_grid.client.path


def test_what_the_servers_speak(real_grid: TahoeGrid, request: pytest.FixtureRequest) -> None:
    """So that each run is of the protocol it is named after: who sees NURLs uses them."""
    cache = (real_grid.client.path / "private" / "introducer_default_cache.yaml").read_text()
    protocol = request.node.callspec.params["real_grid"]
    assert ("anonymous-storage-NURLs" in cache) == (protocol == "HTTP")
    assert cache.count("anonymous-storage-FURL") == 10
