"""Upload helpers: the real client by ours, ours by the real one; killed half way, on either side, and gone on with.

What a client sends is counted at its socket, by a proxy before the helper.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import urllib.error
from collections.abc import Iterator
from pathlib import Path

import pytest

from grid.formats.base32 import b2a
from grid.formats.caps import parse_known_cap
from grid.node_directory import create_client_directory
from tests.real.conftest import mounter
from tests.real.counting_proxy import CountingProxy
from tests.real.sample_tree import content
from tests.real.tahoe_grid import OUR_PROGRAM, Node, TahoeGrid, TahoeNotAvailable, free_ports, wait_until

pytestmark = pytest.mark.interop

SHARES = (2, 3, 4)
SERVERS = 4
SIZE = 6_000_000
OVERHEAD = 1.05
LOST_BYTES = 400_000  # what was on its way when somebody was killed

# What our client is in the tests that kill it: joins, says so, uploads.
OUR_CLIENT = """
import sys, trio, grid
async def main():
    node = grid.NodeDirectory.open(sys.argv[1])
    async with grid.join_grid(node) as client:
        await client.need_servers(4)
        print("joined", flush=True)
        results = await client.upload(grid.FileUploadable(sys.argv[2], convergence=node.convergence))
        print(results.uri, flush=True)
trio.run(main)
"""


class HelperNode(Node):
    """A node with a helper and nothing else, which others reach by a proxy."""

    def __init__(self, grid: TahoeGrid, path: Path) -> None:
        (port,) = free_ports(1)
        self.proxy = CountingProxy(port)
        config = (
            f"[node]\nnickname = helper\nweb.port =\ntub.port = tcp:{port}:interface=127.0.0.1\n"
            f"tub.location = tcp:127.0.0.1:{self.proxy.port}\n"
            "[client]\nshares.needed = 2\nshares.happy = 3\nshares.total = 4\n"
            "[storage]\nenabled = false\n[helper]\nenabled = true\n"
        )
        super().__init__(grid.tahoe, path, "client", config)
        (path / "private" / "introducers.yaml").write_text(
            (grid.client.path / "private" / "introducers.yaml").read_text()
        )

    @property
    def furl(self) -> str:
        file = self.path / "private" / "helper.furl"
        return str(wait_until(lambda: file.exists() and file.read_text().strip(), "the helper's FURL"))

    def held(self) -> int:
        """Bytes of ciphertext on its disk."""
        return sum(file.stat().st_size for file in self.path.glob("helper/CHK_*/*"))


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TahoeGrid]:
    """Half of the servers are ours."""
    try:
        made = TahoeGrid(tmp_path_factory.mktemp("helped"), servers=SERVERS, shares=SHARES, our_servers=SERVERS // 2)
    except TahoeNotAvailable as reason:
        pytest.skip(str(reason))
    try:
        yield made.start()
    finally:
        made.stop()


@pytest.fixture
def helper(grid: TahoeGrid, tmp_path: Path) -> Iterator[HelperNode]:
    node = HelperNode(grid, tmp_path / "helper")
    try:
        yield node
    finally:
        node.kill()
        node.proxy.close()


def use_helper(grid: TahoeGrid, helper: HelperNode) -> None:
    """Have the real client connected to it."""
    config = grid.client.path / "tahoe.cfg"
    lines = [line for line in config.read_text().splitlines() if not line.startswith("helper.furl")]
    lines.insert(lines.index("[client]") + 1, f"helper.furl = {helper.furl}")
    config.write_text("\n".join(lines) + "\n")
    restart_client(grid)


def restart_client(grid: TahoeGrid) -> None:
    grid.client.kill()
    grid.client.start()
    grid.wait_connected()
    wait_connected(grid)


def wait_connected(grid: TahoeGrid) -> None:
    """As the real client's own front page tells."""
    wait_until(lambda: b"<div>Helper</div>" in grid.request("GET", "/"), "the real client to reach the helper")


def is_whole(grid: TahoeGrid, cap: str) -> bool:
    results = grid.check(cap)["results"]
    shares = grid.share_files(b2a(parse_known_cap(cap).storage_index or b""))
    return bool(results["healthy"] and sorted(shares) == [0, 1, 2, 3])


# --- the real client by our helper


def test_the_real_client_by_our_helper(grid: TahoeGrid, helper: HelperNode) -> None:
    helper.program = OUR_PROGRAM
    helper.start()
    use_helper(grid, helper)
    for size in (56, 200_000, SIZE):
        data, before = content(size, size + 1), helper.proxy.sent
        cap = grid.put(data)
        assert helper.proxy.sent - before > size
        assert is_whole(grid, cap)
        assert grid.get(cap) == data
    before = helper.proxy.sent
    assert grid.put(data) == cap
    assert helper.proxy.sent - before < 0.01 * SIZE
    assert helper.held() == 0


@pytest.mark.parametrize("killed", ["helper", "client"])
def test_the_real_client_by_our_helper_killed_half_way(grid: TahoeGrid, helper: HelperNode, killed: str) -> None:
    helper.program = OUR_PROGRAM
    helper.start()
    use_helper(grid, helper)
    data = content(SIZE, 31 if killed == "helper" else 32)
    start = helper.proxy.sent
    helper.proxy.hold(start + SIZE // 2)

    def put() -> None:
        with pytest.raises((urllib.error.URLError, ConnectionError)):
            grid.put(data)

    first = threading.Thread(target=put)
    first.start()
    assert helper.proxy.holding.wait(120)
    wait_until(lambda: helper.held() > 0.4 * SIZE, "the helper to have what passed")
    (helper if killed == "helper" else grid.client).kill()
    helper.proxy.release()
    if killed == "helper":
        first.join(120)
        wait_until(lambda: b"Helper not connected" in grid.request("GET", "/"), "the loss to be seen")
        helper.start()
        wait_connected(grid)
    else:
        restart_client(grid)
        first.join(120)
    cap = grid.put(data)
    assert SIZE < helper.proxy.sent - start < OVERHEAD * SIZE + LOST_BYTES
    assert grid.get(cap) == data
    assert is_whole(grid, cap)
    assert helper.held() == 0


# --- our client by the real helper


@pytest.fixture
def our_node(grid: TahoeGrid, helper: HelperNode, tmp_path: Path) -> Path:
    """A node directory of ours that names the real helper."""
    helper.start()
    path = tmp_path / "ours"
    create_client_directory(path, introducers=[grid.introducer_furl], shares=SHARES)
    config = path / "tahoe.cfg"
    config.write_text(config.read_text().replace("[client]\n", f"[client]\nhelper.furl = {helper.furl}\n"))
    return path


@pytest.mark.mount
def test_the_mount_killed_half_way(grid: TahoeGrid, helper: HelperNode, our_node: Path, tmp_path: Path) -> None:
    """The next mount of the same directory goes on with it, and sends the second half only."""
    root = grid.mkdir()
    data = content(SIZE, 44)
    mounted = mounter(our_node, tmp_path)
    with mounted(root, drain=False) as mount:
        start = helper.proxy.sent
        helper.proxy.hold(start + SIZE // 2)
        (mount.path / "file").write_bytes(data)
        assert helper.proxy.holding.wait(120)
        wait_until(lambda: helper.held() > 0.4 * SIZE, "the helper to have what passed")
        os.kill(mount.pid, signal.SIGKILL)
    helper.proxy.release()
    with mounted(root) as mount:
        mount.sync(240)
        assert SIZE < helper.proxy.sent - start < OVERHEAD * SIZE + LOST_BYTES
        assert (mount.path / "file").read_bytes() == data
    assert grid.get(root, "file") == data
    assert is_whole(grid, grid.json(root, "file")[1]["ro_uri"])


@pytest.mark.mount
def test_the_mount_by_the_real_helper_killed_half_way(
    grid: TahoeGrid, helper: HelperNode, our_node: Path, tmp_path: Path
) -> None:
    """The mount waits for it, and sends the second half only. A second mount of the same bytes sends nothing."""
    root = grid.mkdir()
    data = content(SIZE, 41)
    with mounter(our_node, tmp_path)(root) as mount:
        start = helper.proxy.sent
        helper.proxy.hold(start + SIZE // 2)
        (mount.path / "file").write_bytes(data)
        assert helper.proxy.holding.wait(120)
        wait_until(lambda: helper.held() > 0.4 * SIZE, "the helper to have what passed")
        helper.kill()
        helper.proxy.release()
        helper.start()
        mount.sync(240)
        assert SIZE < helper.proxy.sent - start < OVERHEAD * SIZE + LOST_BYTES
        before = helper.proxy.sent
        (mount.path / "again").write_bytes(data)
        mount.sync()
        assert helper.proxy.sent - before < 0.05 * SIZE
    assert grid.get(root, "file") == data
    assert is_whole(grid, grid.json(root, "file")[1]["ro_uri"])
    wait_until(lambda: helper.held() == 0, "the helper to have nothing left", 60)


def test_client_and_helper_killed_half_way_and_the_helper_changed_for_ours(
    grid: TahoeGrid, helper: HelperNode, our_node: Path, tmp_path: Path
) -> None:
    """Ours takes over the real one's directory, with what it had fetched; its FURL stays the same."""
    data = content(SIZE, 42)
    (tmp_path / "file").write_bytes(data)
    command = [sys.executable, "-c", OUR_CLIENT, our_node, tmp_path / "file"]
    start = helper.proxy.sent
    helper.proxy.hold(start + SIZE // 2)
    with subprocess.Popen(command, stdout=subprocess.PIPE) as first:
        assert helper.proxy.holding.wait(120)
        wait_until(lambda: helper.held() > 0.4 * SIZE, "the helper to have what passed")
        first.send_signal(signal.SIGKILL)
    helper.proxy.release()
    furl, held = helper.furl, helper.held()
    helper.kill()
    helper.program = OUR_PROGRAM
    helper.start()
    wait_until(lambda: "ready services=helper" in (helper.path / "output.log").read_text(), "our helper to be ready")
    assert (helper.furl, helper.held()) == (furl, held)
    again = subprocess.run(command, capture_output=True, text=True, check=True, timeout=240)
    cap = again.stdout.split()[1]
    assert SIZE < helper.proxy.sent - start < OVERHEAD * SIZE + LOST_BYTES
    assert grid.get(cap) == data
    assert is_whole(grid, cap)


def test_our_client_without_its_helper(grid: TahoeGrid, helper: HelperNode, our_node: Path, tmp_path: Path) -> None:
    helper.kill()
    data = content(200_000, 43)
    (tmp_path / "file").write_bytes(data)
    command = [sys.executable, "-c", OUR_CLIENT, our_node, tmp_path / "file"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=240)
    assert is_whole(grid, done.stdout.split()[1])
