"""Ping, speed test and the control interface, above servers in memory and over a real tub."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio

from grid.client import GridClient
from grid.control import ControlClient
from grid.crypto import make_tub_identity
from grid.errors import RemoteFailure
from grid.formats.furl import Furl
from grid.measure import ping, speed_test
from grid.node_directory import NodeDirectory, create_client_directory
from grid.operations.keys import KeyPool
from grid.transports.tub import Tub
from tests.grid.peers.loopback import Listener
from tests.memory_server import MemoryBroker

INTRODUCER = "pb://aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa@tcp:127.0.0.1:9/swissnum"


@pytest.fixture
async def client(nursery: trio.Nursery, tmp_path: Path) -> AsyncIterator[GridClient]:
    create_client_directory(tmp_path / "node", introducers=[INTRODUCER], shares=(1, 2, 3))
    keys = KeyPool()
    await nursery.start(keys.run)
    broker: Any = MemoryBroker(4)
    yield GridClient(NodeDirectory.open(tmp_path / "node"), broker, keys)
    nursery.cancel_scope.cancel()


async def test_ping(client: GridClient) -> None:
    """One answers, one hangs, one fails half way, one is away."""
    good, silent, failing, away = client.broker.get_known_servers()
    silent.hang_on.add("get_version")
    failing.fail_after["get_version"] = 2
    away.connected = False
    found = {times.server_id: times for times in await ping([good, silent, failing, away], rounds=4, timeout_s=0.1)}
    assert len(found[good.server_id].seconds) == 4 and found[good.server_id].failure is None
    median_s = found[good.server_id].median_s
    assert median_s is not None and min(found[good.server_id].seconds) <= median_s <= max(found[good.server_id].seconds)
    assert found[silent.server_id].seconds == [] and "silent for 0.1 s" in str(found[silent.server_id].failure)
    assert len(found[failing.server_id].seconds) == 2 and found[failing.server_id].failure
    assert "silent" in str(found[away.server_id].failure)


@pytest.mark.parametrize("kind", ["immutable", "create", "upload"])
async def test_speed(client: GridClient, kind: Any) -> None:
    told: list[int] = []
    speed = await speed_test(client, count=3, size=5000, kind=kind, done=told.append)
    assert (speed.count, speed.size, told) == (3, 5000, [1, 2, 3])
    assert speed.upload_s > 0 and speed.download_s > 0 and speed.upload_bytes_per_s > 0
    servers = client.broker.get_known_servers()
    left = sum(len(slot.shares) for server in servers for slot in server.slots.values())
    stored = sum(len(shares) for server in servers for shares in server.immutable.values())
    assert (left, stored, speed.deleted) == ((0, 9, 0) if kind == "immutable" else (0, 0, 3))


async def test_speed_of_tiny_files_and_too_much(client: GridClient) -> None:
    assert (await speed_test(client, count=2, size=3)).count == 2
    for count, size in ((0, 1), (1, 0), (10_000, 1), (1, 1 << 40)):
        with pytest.raises(ValueError, match="1 to"):
            await speed_test(client, count=count, size=size)


async def test_what_a_test_cannot_delete_is_not_called_deleted(client: GridClient) -> None:
    client.broker.get_known_servers()[0].fail_after["slot_readv"] = 0
    speed = await speed_test(client, count=1, size=100, kind="create")
    assert speed.deleted == 0


@pytest.fixture
async def control(client: GridClient, nursery: trio.Nursery) -> Any:
    """The interface as its caller has it."""
    listener = Listener(nursery)
    await listener.start()

    async def get() -> GridClient:
        return client

    furl = listener.tub.register(ControlClient(get))
    tub = Tub(make_tub_identity())
    await nursery.start(tub.run)
    return await tub.get_reference(Furl.parse(furl))


async def test_control(control: Any, client: GridClient, tmp_path: Path) -> None:
    """Every method, as a program of old calls it."""
    await control.call("wait_for_client_connections", 4, timeout_s=5)
    (tmp_path / "file").write_bytes(b"contents " * 100)
    cap = await control.call("upload_from_file_to_uri", str(tmp_path / "file").encode(), None, timeout_s=5)
    copy = str(tmp_path / "copy").encode()
    assert await control.call("download_from_uri_to_file", cap, copy, timeout_s=5) == copy
    assert (tmp_path / "copy").read_bytes() == b"contents " * 100
    cap = await control.call("upload_random_data_from_file", 1000, b"secret", timeout_s=5)
    await control.call("download_to_tempfile_and_delete", cap, timeout_s=5)
    memory = await control.call("get_memory_usage", timeout_s=5)
    assert set(memory) == {b"VmPeak", b"VmSize", b"VmData"} and memory[b"VmPeak"] >= memory[b"VmSize"] > 1 << 20
    for mutable in (False, b"create", "upload"):
        up_s, down_s = await control.call("speed_test", 2, 1000, mutable, timeout_s=20)
        assert up_s > 0 and down_s > 0
    times = await control.call("measure_peer_response_time", timeout_s=20)
    assert set(times) == {server.server_id.encode() for server in client.broker.get_known_servers()}
    assert all(seconds >= 0 for seconds in times.values())


async def test_what_control_refuses(control: Any, tmp_path: Path) -> None:
    for method, arguments in (
        ("upload_from_file_to_uri", (b"relative", None)),
        ("upload_from_file_to_uri", (str(tmp_path / "absent").encode(), None)),
        ("upload_random_data_from_file", (1 << 40, b"")),
        ("speed_test", (0, 100, False)),
        ("speed_test", (1, 100, b"sideways")),
        ("speed_test", (1, 100, 7)),
        ("download_from_uri_to_file", (b"URI:nonsense", str(tmp_path / "f").encode())),
    ):
        with pytest.raises(RemoteFailure):
            await control.call(method, *arguments, timeout_s=5)
