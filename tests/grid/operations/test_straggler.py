"""A server far slower than the others costs one answer of its at most. In virtual time: no segment needs a thread."""

from __future__ import annotations

import random

import trio

from grid.formats.caps import CHKReadCap, parse_cap
from grid.operations.download import ImmutableDownload
from grid.operations.leases import Secrets
from grid.operations.upload import DataUploadable, Uploader
from tests.memory_server import MemoryBroker

SEGMENT_BYTES = 3 << 10
SEGMENTS = 30
LATENCY_S = 0.02
SLOWER = 10
FIRST_S = 4 * LATENCY_S  # finding the shares, and the first reads of them


async def _seconds(slow: int | None) -> float:
    """To read a file one segment after the other, with nothing known of any server."""
    broker = MemoryBroker(10)
    data = random.Random(9).randbytes(SEGMENT_BYTES * SEGMENTS)
    uploadable = DataUploadable(data, b"c" * 32)
    uploadable.set_default_encoding_parameters({"k": 3, "happy": 7, "n": 10, "max_segment_size": SEGMENT_BYTES})
    cap = parse_cap((await Uploader(broker, Secrets(b"s" * 32)).upload(uploadable)).uri)
    assert isinstance(cap, CHKReadCap)
    for number, server in enumerate(broker.servers):
        server.latency_s = LATENCY_S * (SLOWER if number == slow else 1)
    download = ImmutableDownload(broker, cap)
    began = trio.current_time()
    for segment in range(SEGMENTS):
        assert len(await download.get_segment(segment)) == SEGMENT_BYTES
    return trio.current_time() - began


async def test_whichever_server_is_ten_times_slower(autojump_clock: trio.testing.MockClock) -> None:
    usual = await _seconds(None)
    assert usual <= FIRST_S + SEGMENTS * LATENCY_S * 1.5
    worst = max([await _seconds(number) for number in range(10)])
    assert worst <= usual * 1.15 + LATENCY_S * SLOWER
