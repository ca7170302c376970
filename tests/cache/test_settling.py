"""When files are sent: those that keep changing once they rest, many new ones at once, awaited ones without delay."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
import trio.testing
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st

from cache import Workspace
from cache.throughput import SLOT_S, WINDOW_S, Meter
from cache.uploads import RESTING_NEW_MAX
from grid.errors import PeerTimeoutError
from tests.cache.memory_client import QUICK, mounted, put
from tests.grid.peers.loopback import until

DATA = bytes(range(256)) * 16
STEP_S = 0.5
CUSHION_S = 0.002  # of real time, for threads
SETTLE = evolve(QUICK, settle_s=1.0, settle_latest_s=10.0)
NEVER = evolve(QUICK, settle_s=3600.0, settle_latest_s=3600.0)


# The clock stands still but where it is told to go on: the journal's thread takes none of its time.


async def pass_by(clock: trio.testing.MockClock, seconds: float, workspace: Workspace) -> None:
    """Whatever is begun meanwhile is done at once."""
    steps = max(1, round(seconds / STEP_S))
    for _ in range(steps):
        await jump(clock, seconds / steps)
        while any(upload["stage"] in ("encoding", "pushing") for upload in workspace.status()["uploads"]):
            await trio.lowlevel.checkpoint()


async def jump(clock: trio.testing.MockClock, seconds: float) -> None:
    clock.jump(seconds)
    await trio.testing.wait_all_tasks_blocked(CUSHION_S)


async def test_a_file_is_sent_once_it_has_rested(tmp_path: Path, mock_clock: trio.testing.MockClock) -> None:
    async with mounted(tmp_path, SETTLE) as (client, workspace):
        _, target = await put(workspace, workspace.root, "file", DATA)
        await pass_by(mock_clock, 0.99, workspace)
        assert client.uploads == 0 and target.stage == "queued"
        await pass_by(mock_clock, 0.02, workspace)
        assert client.uploads == 1


@pytest.mark.parametrize("pause_s", [0.2, 1.0, 2.0, 4.0])
async def test_a_file_that_keeps_changing_is_not_sent_each_time(
    tmp_path: Path, mock_clock: trio.testing.MockClock, pause_s: float
) -> None:
    """Whether it is stored sooner or later than `settle` after the last time; but it is sent now and then."""
    async with mounted(tmp_path, SETTLE) as (client, workspace):
        times = round(24 / pause_s)
        for number in range(times):
            await put(workspace, workspace.root, "log", DATA + b"%d" % number)
            await pass_by(mock_clock, pause_s, workspace)
        assert 2 <= client.uploads <= 3 + (pause_s > 1)
        for _ in range(40):
            await pass_by(mock_clock, SETTLE.settle_latest_s / 20, workspace)
        found = workspace.root.get("log")
        assert found is not None and found.target.size == len(DATA) + len(b"%d" % (times - 1))
        assert workspace.status()["pending"]["files"] == 0  # the last one is there, without anybody waiting


async def test_saving_by_renaming_is_storing_again(tmp_path: Path, mock_clock: trio.testing.MockClock) -> None:
    async with mounted(tmp_path, SETTLE) as (client, workspace):
        for number in range(40):
            await put(workspace, workspace.root, f".save{number}", DATA + b"%d" % number)
            await workspace.rename(workspace.root, f".save{number}", workspace.root, "document", {})
            await pass_by(mock_clock, 0.5, workspace)
        assert client.uploads <= 3
        await workspace.wait()
        assert set(await client.listing(workspace.root.cap)) == {"document"}


async def test_a_change_of_metadata_is_not_storing_again(tmp_path: Path) -> None:
    """`cp -p` sets times after the close: such files are new ones all the same."""
    async with mounted(tmp_path, NEVER) as (client, workspace):
        for number in range(RESTING_NEW_MAX + 3):
            await put(workspace, workspace.root, f"{number}", DATA + b"%d" % number)
            await workspace.set_metadata(workspace.root, f"{number}", {"mtime": number})
        await until(lambda: workspace.status()["uploaded"] == 3)
        assert client.uploads == 3


async def test_many_new_files_do_not_wait(tmp_path: Path) -> None:
    async with mounted(tmp_path, NEVER) as (client, workspace):
        for number in range(5):
            await put(workspace, workspace.root, "log", DATA + b"version %d" % number)
        for number in range(100):
            await put(workspace, workspace.root, f"{number:03}", DATA + b"%d" % number)
        await until(lambda: workspace.status()["uploaded"] == 100 - RESTING_NEW_MAX)
        assert client.uploads == 100 - RESTING_NEW_MAX  # and the one that changes rests on
        await workspace.wait()
        assert client.uploads == 101
        assert len(await client.listing(workspace.root.cap)) == 101


async def test_who_waits_waits_for_no_rest(tmp_path: Path) -> None:
    async with mounted(tmp_path, NEVER) as (client, workspace):
        position, first = await put(workspace, workspace.root, "file", DATA)
        await put(workspace, workspace.root, "later", DATA * 2)
        await workspace.wait(position)
        assert first.cap is not None and client.uploads == 1  # what came later rests on
        client.pause()
        position, _ = await put(workspace, workspace.root, "changing", DATA * 3)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(workspace.wait, position)
            await trio.testing.wait_all_tasks_blocked()
            _, newer = await put(workspace, workspace.root, "changing", DATA * 4)  # what he waits for now
            client.resume()
        assert newer.cap is not None and client.uploads == 4
        with pytest.raises(PeerTimeoutError), client.broken():
            await put(workspace, workspace.root, "last", DATA * 5)
            await workspace.wait(timeout_s=0.0)


async def test_a_resting_file_that_is_removed_is_never_sent(tmp_path: Path, mock_clock: trio.testing.MockClock) -> None:
    async with mounted(tmp_path, SETTLE) as (client, workspace):
        await put(workspace, workspace.root, "file", DATA)
        await workspace.unlink(workspace.root, "file")
        await pass_by(mock_clock, 20, workspace)
        assert client.uploads == 0 and workspace.status()["journal"]["bytes"] == 0


async def test_a_mutable_file_that_keeps_changing_is_published_when_it_rests(
    tmp_path: Path, mock_clock: trio.testing.MockClock
) -> None:
    async with mounted(tmp_path, SETTLE) as (client, workspace):
        node = await client.nodemaker.create_mutable_file(b"first")
        published = await node.get_best_version()
        for number in range(16):
            contents = await workspace.new_contents()
            await contents.write(0, b"version %d" % number)
            position = await workspace.replace(node.cap, contents)
            await pass_by(mock_clock, 0.5, workspace)
            assert number > 15 or workspace.status()["pending"]["files"] == 1
        assert (await node.get_best_version()).version == published.version  # eight seconds, and not sent yet
        await workspace.wait(position)  # takes no time at all
        assert await node.download_to_data() == b"version 15"


async def test_status_tells_how_far_each_file_is(tmp_path: Path, mock_clock: trio.testing.MockClock) -> None:
    """queued, encoding, pushing s of n, linking; and bytes that become less as they go."""
    options = evolve(SETTLE, publish_quiet_s=30.0, publish_latest_s=30.0)
    seen: list[tuple[str, int]] = []
    async with mounted(tmp_path, options) as (client, workspace):
        await put(workspace, workspace.root, "file", bytes(300_000))

        def look() -> None:
            status = workspace.status()
            for upload in status["uploads"]:
                if not seen or seen[-1] != (upload["stage"], upload["shares_placed"]):
                    seen.append((upload["stage"], upload["shares_placed"]))
                assert status["pending"]["bytes"] == upload["unsent_bytes"] <= upload["bytes"] == 300_000

        for server in client.servers:
            server.latency_s = 0.1
        client.servers[0].latency_s = 0.3
        while seen[-1:] != [("linking", 3)]:
            look()
            await jump(mock_clock, 0.01)
        assert [stage for stage, _ in dict.fromkeys((stage, 0) for stage, _ in seen)] == [
            "queued",
            "encoding",
            "pushing",
            "linking",
        ]
        assert [placed for stage, placed in seen if stage == "pushing"] in ([0, 2, 3], [0, 1, 2, 3], [0, 2])
        status = workspace.status()
        assert status["pending"]["files"] == 1 and status["pending"]["bytes"] == 0
        assert status["throughput"]["pushed_bytes"] == 450_000  # three shares of two that are needed
        assert 100_000 < status["throughput"]["pushed_bytes_per_s"] < 2_000_000
        await pass_by(mock_clock, 60, workspace)
        status = workspace.status()
        assert status["pending"]["files"] == 0 and status["throughput"]["pushed_bytes_per_s"] == 0


@given(st.lists(st.tuples(st.floats(0, 3), st.integers(0, 1000)), max_size=60))
def test_the_rate_is_of_the_last_seconds(steps: list[tuple[float, int]]) -> None:
    meter, now, added = Meter(), 100.0, list[tuple[float, int]]()
    for pause_s, count in steps:
        now += pause_s
        meter.add(count, now)
        added.append((now, count))
    assert meter.total == sum(count for _, count in added)
    recent = sum(count for when, count in added if now - when <= WINDOW_S)
    older = sum(count for when, count in added if now - when <= WINDOW_S + SLOT_S)
    assert meter.rate(now) <= older / SLOT_S
    if recent:
        assert meter.rate(now) >= (recent - max(c for _, c in added) * 10) / (WINDOW_S + SLOT_S)
    assert meter.rate(now + 2 * WINDOW_S) == 0
