"""ping, speed-test, doctor and statistics, against ten real servers and on a real mount."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from grid.server.gatherer import last_polls
from tests.real.mounting import Mounter, tahoefs
from tests.real.sample_tree import content
from tests.real.tahoe_grid import OUR_PROGRAM, TahoeGrid, free_ports, wait_until

pytestmark = pytest.mark.interop

PING_DEADLINE_S = 60.0  # for the whole command, one server hanging; it must not be the call's own deadline of minutes


def test_ping(real_grid: TahoeGrid, node_dir: Path) -> None:
    told = json.loads(tahoefs("ping", "-d", node_dir, "--json").stdout)["servers"]
    assert len(told) == 10
    for server in told:
        assert server["failure"] is None and server["answers"] == 5
        assert 0 < server["min_s"] <= server["median_s"] <= server["max_s"] < 5
        assert (server["protocol"], server["version"]) == ("http", "tahoe-lafs/1.20.0")
    table = tahoefs("ping", "-d", node_dir, "--rounds", "2").stdout.splitlines()
    assert len(table) == 11 and "median ms" in table[0]
    assert all(f"server{number}" in "\n".join(table) for number in range(10))


def test_ping_shows_who_is_silent(real_grid: TahoeGrid, node_dir: Path) -> None:
    """SIGSTOP: its connections are taken by the kernel, and nothing answers."""
    with real_grid.hung([4]):
        began = time.monotonic()
        told = json.loads(tahoefs("ping", "-d", node_dir, "--rounds", "2", "--json").stdout)["servers"]
        assert time.monotonic() - began < PING_DEADLINE_S
    silent = [server for server in told if not server["answers"]]
    assert [server["nickname"] for server in silent] == ["server4"]
    assert silent[0]["failure"] and len(told) == 10
    real_grid.reconnect()


@pytest.mark.parametrize("mutable", [(), ("--mutable", "create"), ("--mutable", "upload")])
def test_speed_test(real_grid: TahoeGrid, node_dir: Path, mutable: tuple[str, ...]) -> None:
    def slots() -> set[Path]:
        return {bucket for server in real_grid.servers for bucket in server.path.glob("storage/shares/??/*")}

    before = slots()
    done = tahoefs("speed-test", "-d", node_dir, "--count", "2", "--size", "64K", *mutable, "--json")
    told = json.loads(done.stdout)
    assert (told["count"], told["size"]) == (2, 65536)
    assert 0 < told["upload_s"] < 120 and 0 < told["download_s"] < 120
    assert told["upload_bytes_per_s"] == pytest.approx(2 * 65536 / told["upload_s"])
    assert told["deleted"] == (2 if mutable else 0)
    left = [bucket for bucket in slots() - before if any(bucket.iterdir())]
    assert bool(left) == (not mutable)
    assert "upload" in tahoefs("speed-test", "-d", node_dir, "--count", "1", "--size", "1K", *mutable).stdout


def test_doctor(real_grid: TahoeGrid, node_dir: Path, tmp_path: Path) -> None:
    """All well; then too few servers; then no node directory."""
    done = tahoefs("doctor", "-d", node_dir, "--json", check=False)
    found = {finding["subject"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert {found[name]["state"] for name in ("introducer default", "servers", "happiness", "clock")} == {"ok"}
    assert "10 of 10" in found["servers"]["text"] and re.match(r"\d s (behind|ahead)", found["clock"]["text"])
    local = [each for each in found.values() if each["state"] == "problem"]
    assert done.returncode == (1 if local else 0)
    with real_grid.without(range(5)):
        done = tahoefs("doctor", "-d", node_dir, check=False)
        assert "FAIL  happiness: 5 servers" in done.stdout and done.stdout.count("warn  server ") == 5
        assert done.returncode == (1 if local else 3)
    done = tahoefs("doctor", "-d", tmp_path / "absent", check=False)
    assert done.returncode == 1 and "FAIL  node directory" in done.stdout


def families(text: str) -> dict[str, Any]:
    return {family.name: family for family in text_string_to_metric_families(text)}


@pytest.mark.mount
def test_a_mounts_statistics(real_grid: TahoeGrid, root_cap: str, mounted: Mounter) -> None:
    """Scraped while it works: every metric explained, and nothing of what is stored in any of them."""
    (port,) = free_ports(1)
    with mounted(root_cap, f"metrics_port={port}") as mount:
        (mount.path / "telling-name.txt").write_bytes(content(300_000, 61))
        (mount.path / "telling-folder").mkdir()
        mount.sync()
        os.listdir(mount.path)
        (mount.path / "telling-name.txt").read_bytes()
        (mount.path / "telling-folder" / "telling-more").mkdir()
        with pytest.raises(OSError, match="not empty"):
            (mount.path / "telling-folder").rmdir()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
            text = answer.read().decode()
        cap = os.getxattr(mount.path / "telling-name.txt", "user.tahoe.cap").decode()
        plain = tahoefs("stats", mount.path).stdout
        told = json.loads(tahoefs("stats", mount.path, "--json").stdout)
        assert set(families(tahoefs("stats", mount.path, "--prometheus").stdout)) >= set(families(text))
    found = families(text)
    assert len(found) > 40
    for family in found.values():
        assert family.documentation.endswith(".")
        for sample in family.samples:
            for label, value in sample.labels.items():
                assert label == "le" or re.fullmatch(r"[A-Za-z0-9_-]{1,64}", value)
    secrets = [root_cap, cap, *cap.split(":")[2:4], *root_cap.split(":")[2:4], str(mount.path)]
    for shown in (text, plain, json.dumps(told["metrics"])):
        assert "telling" not in shown and not [secret for secret in secrets if secret in shown]
    value = {name: sum(s.value for s in family.samples) for name, family in found.items()}
    assert value["tahoefs_upload_files"] == 1 and value["tahoefs_upload_bytes"] == 300_000
    assert value["tahoefs_upload_shares"] == 10 and value["tahoefs_grid_servers_connected"] == 10
    assert value["tahoefs_fuse_written_bytes"] == 300_000 and value["tahoefs_fuse_read_bytes"] >= 300_000
    errors = {sample.labels["errno"]: sample.value for sample in found["tahoefs_fuse_errors"].samples}
    assert errors["ENOTEMPTY"] == 1 and value["tahoefs_mount_publishes"] >= 1


@contextlib.contextmanager
def running(directory: Path) -> Iterator[str]:
    """`tahoefs run` on it; gives the line that says that it is ready."""
    process = subprocess.Popen([*OUR_PROGRAM, directory], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        ready = process.stdout.readline()
        assert "ready" in ready
        yield ready
    finally:
        process.kill()
        process.communicate()


def test_a_gatherer_hears_of_a_node(tmp_path: Path) -> None:
    """Run by `tahoefs run`: the node's numbers come into the gatherer's history, and out of it again.

    They have an introducer of their own: the grid's would announce this server for as long as it runs.
    """
    introducer, gatherer, server = tmp_path / "introducer", tmp_path / "gatherer", tmp_path / "server"
    ports = [f"tcp:{port}:interface=127.0.0.1" for port in free_ports(3)]
    tahoefs("create-introducer", introducer, "--port", ports[0])
    tahoefs("create-stats-gatherer", gatherer, "--port", ports[1])
    with contextlib.ExitStack() as stack:
        stack.enter_context(running(introducer))
        assert "stats-gatherer" in stack.enter_context(running(gatherer))
        introducer_furl = (introducer / "private" / "introducer.furl").read_text().strip()
        tahoefs("create-storage", server, "--port", ports[2], "--introducer", introducer_furl, "--nickname", "told")
        (server / "stats_gatherer.furl").write_text((gatherer / "private" / "stats_gatherer.furl").read_text())
        stack.enter_context(running(server))
        wait_until(lambda: last_polls(gatherer), "the first poll after the node came", 120)
        assert "told" in tahoefs("stats", "--gathered", gatherer).stdout
        (node,) = json.loads(tahoefs("stats", "--gathered", gatherer, "--json").stdout).values()
        assert node["nickname"] == "told" and node["stats"]["stats"]["storage_available_bytes"] > 0
        assert node["stats"]["counters"]["process_cpu_seconds"] > 0
        assert "storage_available_bytes" in tahoefs("stats", server).stdout
