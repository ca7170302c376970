"""Statistics as others read them: the text for Prometheus, the page it scrapes, `tahoefs stats`."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import trio
from click.testing import CliRunner
from prometheus_client.parser import text_string_to_metric_families

from grid.server.gatherer import DATABASE, History, Poll
from grid.stats import Registry
from tahoefs.cli import UserError, cli
from tahoefs.control import serve_control
from tahoefs.exposition import as_json, prometheus_text, stats_command
from tahoefs.fuse import SECONDS
from tahoefs.metrics_endpoint import MetricsPortError, serve_metrics
from tahoefs.mount_stats import METRICS, MountStats
from tahoefs.registry import node_registered

STATUS: dict[str, Any] = {
    "pending": {"files": 2, "bytes": 300, "directories": 1},
    "uploads": [{"stage": "pushing", "name": "secret name"}, {"stage": "queued"}, {"stage": "queued"}],
    "throughput": {"pushed_bytes": 1000, "pushed_bytes_per_s": 3},
    "journal": {"bytes": 300, "limit": 10_000},
    "cache": {"bytes": 5, "limit": 50, "hits": 7, "misses": 3},
    "leases": {"oldest_s": 86400.5},
    "uploaded": 4,
    "publishes": 5,
    "conflicts": 0,
    "errors": [{"when": 1, "path": "/secret/path", "message": "URI:CHK:secret"}],
}


@pytest.fixture
def registry() -> Registry:
    made = Registry()
    made.register(MountStats(lambda: STATUS, lambda: (1, 2)), METRICS)
    SECONDS.of("read").observe(0.02)
    return made


def families(text: str) -> Mapping[str, Any]:
    """By the official parser."""
    return {family.name: family for family in text_string_to_metric_families(text)}


def test_the_official_parser_reads_it(registry: Registry) -> None:
    text = prometheus_text(registry)
    found = families(text)
    assert len(found) > 30
    for family in found.values():
        assert family.documentation and family.name.startswith("tahoefs_")
        assert family.type in ("counter", "gauge", "histogram")
    assert [sample.value for sample in found["tahoefs_cache_hits"].samples] == [7]
    assert [sample.value for sample in found["tahoefs_mount_oldest_lease_seconds"].samples] == [86400.5]
    stages = {sample.labels["stage"]: sample.value for sample in found["tahoefs_mount_uploads"].samples}
    assert stages == {"pushing": 1, "queued": 2}
    reads = [sample for sample in found["tahoefs_fuse_seconds"].samples if sample.labels["request"] == "read"]
    buckets = [sample.value for sample in reads if sample.name.endswith("_bucket")]
    assert buckets == sorted(buckets) and buckets[-1] >= 1
    assert "secret" not in text


def test_as_json(registry: Registry) -> None:
    told = json.loads(json.dumps(as_json(registry)))
    assert told["mount_pending_files"] == {
        "kind": "gauge",
        "help": "Files written and not on the grid yet.",
        "label": "",
        "values": {"": 2},
    }
    assert told["fuse_seconds"]["values"]["read"]["count"] >= 1


async def fetch(port: int, request: bytes) -> bytes:
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
        await stream.send_all(request)
        return b"".join([piece async for piece in stream])


async def test_the_page(registry: Registry, nursery: trio.Nursery) -> None:
    port: int = await nursery.start(serve_metrics, 0, registry)
    head, _, body = (await fetch(port, b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n")).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK") and b"version=0.0.4" in head
    assert f"content-length: {len(body)}".encode() in head
    assert "tahoefs_mount_publishes" in families(body.decode())
    assert (await fetch(port, b"HEAD / HTTP/1.1\r\n\r\n")).endswith(b"\r\n\r\n")
    assert b"404" in (await fetch(port, b"GET /secret HTTP/1.1\r\n\r\n"))[:20]
    assert b"405" in (await fetch(port, b"POST /metrics HTTP/1.1\r\n\r\n"))[:20]
    assert await fetch(port, b"x" * 20_000) == b""
    with pytest.raises(MetricsPortError, match=str(port)):
        await serve_metrics(port, registry)
    nursery.cancel_scope.cancel()


async def run_stats(*arguments: str) -> Any:
    result = await trio.to_thread.run_sync(lambda: CliRunner().invoke(cli, ["stats", *arguments]))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


async def test_the_command_asks_a_node(registry: Registry, nursery: trio.Nursery, tmp_path: Path) -> None:
    (tmp_path / "tahoe.cfg").write_text("")
    with pytest.raises(UserError, match="does not run"):
        await run_stats(str(tmp_path))
    with node_registered(tmp_path) as socket:
        await nursery.start(serve_control, socket, {"stats": stats_command(registry, "my node")})
        text = await run_stats(str(tmp_path))
        assert text.startswith("my node\n") and "mount_uploads queued" in text and "fuse_seconds read" in text
        told = json.loads(await run_stats(str(tmp_path), "--json"))
        assert told["source"] == "my node" and told["metrics"]["cache_hits"]["values"] == {"": 7}
        assert "tahoefs_cache_hits" in families(await run_stats(str(tmp_path), "--prometheus"))
    nursery.cancel_scope.cancel()


async def test_the_command_shows_what_was_gathered(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        await run_stats("--gathered", str(tmp_path))
    history, now = History(tmp_path / DATABASE), time.time()
    assert "nobody" in await run_stats("--gathered", str(tmp_path))
    history.add(Poll(now - 1200, "tubone", "one", {"upload_bytes": 0}, {}))
    history.add(Poll(now, "tubone", "one", {"upload_bytes": 1 << 20}, {"cache_bytes": 3}))
    history.add(Poll(now - 9000, "tubtwo", "two", {}, {"grid_server_latency_seconds.abc": 0.25}))
    history.close()
    text = await run_stats("--gathered", str(tmp_path))
    assert "one tubone\n" in text and "upload_bytes" in text and "/s)" in text
    assert "two tubtwo, silent for 150 min" in text and "250 ms" in text
    told = json.loads(await run_stats("--gathered", str(tmp_path), "--json"))
    assert told["tubone"]["stats"]["counters"] == {"upload_bytes": 1 << 20} and told["tubone"]["nickname"] == "one"


@pytest.mark.parametrize(
    "arguments", [["--json", "--prometheus"], ["--gathered", "x", "--prometheus"], ["--gathered", "x", "y"]]
)
async def test_wrong_usage(arguments: list[str]) -> None:
    assert "go" in await run_stats(*arguments)
