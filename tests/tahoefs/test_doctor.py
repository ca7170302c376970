"""`tahoefs doctor`: what it says of a machine, a node and a grid, each made wrong in turn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from attrs import define, field

from tahoefs import doctor
from tahoefs.doctor import (
    Finding,
    exit_code,
    look_at_clock,
    look_at_disk,
    look_at_everything,
    look_at_fuse,
    look_at_grid,
)


def states(findings: Any) -> dict[str, str]:
    found = list(findings)
    assert all(finding.remedy or finding.state == "ok" or "more" in finding.text for finding in found)
    return {finding.subject: finding.state for finding in found}


def test_fuse(tmp_path: Path) -> None:
    device, conf, program = tmp_path / "fuse", tmp_path / "fuse.conf", tmp_path / "fusermount3"
    assert states(look_at_fuse(device, conf, uid=1000, fusermount="")) == {
        str(device): "problem",
        "fusermount3": "problem",
        str(conf): "warning",
    }
    device.touch()
    program.touch()
    conf.write_text("#user_allow_other\n")
    found = states(look_at_fuse(device, conf, uid=1000, fusermount=str(program)))
    assert found == {str(device): "ok", "fusermount3": "problem", str(conf): "warning"}
    program.chmod(0o4755)
    conf.write_text("mount_max = 7\nuser_allow_other\n")
    found = states(look_at_fuse(device, conf, uid=1000, fusermount=str(program)))
    assert set(found.values()) == {"ok"}
    assert states(look_at_fuse(device, tmp_path / "none", uid=0, fusermount=""))["fusermount3"] == "warning"


@pytest.mark.parametrize("limit, state", [("DISK_PROBLEM_BYTES", "problem"), ("DISK_WARNING_BYTES", "warning")])
def test_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, state: str) -> None:
    monkeypatch.setattr(doctor, "DISK_PROBLEM_BYTES", 0)
    monkeypatch.setattr(doctor, "DISK_WARNING_BYTES", 0)
    assert states(look_at_disk(tmp_path / "not" / "there" / "yet")) == {"disk": "ok"}
    monkeypatch.setattr(doctor, limit, 1 << 80)
    assert states(look_at_disk(tmp_path)) == {"disk": state}


@pytest.mark.parametrize(
    "ahead_s, state",
    [([], "ok"), ([None], "ok"), ([3.0, -2.0, None], "ok"), ([60, 61, 0], "warning"), ([-4000, -4001, 5], "problem")],
)
def test_clock(ahead_s: list[float | None], state: str) -> None:
    assert states(look_at_clock(ahead_s)) == {"clock": state}


@define
class Server:
    name: str = "abc"
    nickname: str = "one"
    connected: bool = True
    available_space: int | None = 1000
    clock_ahead_s: float | None = 0.0
    last_failure: str | None = None


@define
class Introducer:
    connected: bool = True
    petname: str = "default"
    last_failure: str | None = "it hurts"

    def connected_to_introducer(self) -> bool:
        return self.connected


@define
class Broker:
    servers: list[Server] = field(factory=lambda: [Server(str(number)) for number in range(10)])
    introducers: list[Introducer] = field(factory=lambda: [Introducer()])

    def get_known_servers(self) -> list[Server]:
        return self.servers

    def permits_upload(self, server: Server) -> bool:
        return True


@define
class Client:
    broker: Broker = field(factory=Broker)
    helper: Any = None

    class node:
        encoding = (3, 7, 10)


def grid_states(client: Any) -> dict[str, str]:
    return states(look_at_grid(client))


def test_a_grid_that_is_well() -> None:
    assert set(grid_states(Client()).values()) == {"ok"}


def test_a_grid_that_is_not() -> None:
    client = Client()
    client.broker.introducers[0].connected = False
    assert grid_states(client)["introducer default"] == "warning"  # servers are known from the cache
    for server in client.broker.servers[:4]:
        server.available_space = 0
    assert grid_states(client)["happiness"] == "problem"
    for server in client.broker.servers[:8]:
        server.connected = False
    found = grid_states(client)
    assert found["servers"] == "problem" and found["server 0"] == "warning"
    client.broker.servers.clear()
    assert grid_states(client)["introducer default"] == "problem"


def test_exit_codes() -> None:
    findings = [Finding("machine", "a", "ok", ""), Finding("grid", "b", "warning", "")]
    assert exit_code(findings) == 0
    findings.append(Finding("grid", "c", "problem", ""))
    assert exit_code(findings) == 3
    findings.append(Finding("node", "d", "problem", ""))
    assert exit_code(findings) == 1


async def test_a_node_that_is_none(tmp_path: Path) -> None:
    last = (await look_at_everything(tmp_path / "absent"))[-1]
    assert (last.subject, last.state) == ("node directory", "problem") and "create-client" in last.text
    (tmp_path / "tahoe.cfg").write_text("")
    last = (await look_at_everything(tmp_path))[-1]
    assert (last.subject, last.state) == ("introducers", "problem") and "introducers.yaml" in last.remedy
