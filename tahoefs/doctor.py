"""What can be wrong before a mount works, looked at one after the other; each finding with what to do about it.

Everything is only looked at: nothing is mounted, stored or changed. The grid has GRID_TIMEOUT_S to show itself.
"""

from __future__ import annotations

import os
import shutil
import stat
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Literal

from attrs import asdict, frozen

import grid
from grid.errors import NodeDirectoryError
from tahoefs.progress import human_bytes

GRID_TIMEOUT_S: Final = 15.0
SERVERS_MAX: Final = 2000
SERVERS_SHOWN_MAX: Final = 10
CLOCK_WARNING_S: Final = 30.0
CLOCK_PROBLEM_S: Final = 300.0  # leases, certificates and "who wrote later" are judged by the clock
DISK_PROBLEM_BYTES: Final = 100 << 20
DISK_WARNING_BYTES: Final = 2 << 30  # what is written goes to the local disk first
FUSE_DEVICE: Final = Path("/dev/fuse")
FUSE_CONF: Final = Path("/etc/fuse.conf")
EXIT_LOCAL: Final = 1
EXIT_GRID: Final = 3

State = Literal["ok", "warning", "problem"]
Where = Literal["machine", "node", "grid"]


@frozen
class Finding:
    """One thing looked at."""

    where: Where
    subject: str
    state: State
    text: str
    remedy: str = ""

    @property
    def mark(self) -> str:
        return {"ok": "ok", "warning": "warn", "problem": "FAIL"}[self.state]

    def plain(self) -> dict[str, Any]:
        return asdict(self)


def exit_code(findings: Iterable[Finding]) -> int:
    wrong = {finding.where for finding in findings if finding.state == "problem"}
    return EXIT_LOCAL if wrong & {"machine", "node"} else EXIT_GRID if wrong else 0


async def look_at_everything(node_dir: Path) -> list[Finding]:
    findings = [*look_at_fuse(), *look_at_disk(node_dir)]
    try:
        node = grid.NodeDirectory.open(node_dir)
    except NodeDirectoryError as error:
        return [
            *findings,
            Finding("node", "node directory", "problem", str(error), "see above; or name another with -d"),
        ]
    findings.append(Finding("node", "node directory", "ok", str(node.path)))
    if not node.introducers and not node.static_servers:
        remedy = f"put an introducer's FURL into {node.path / 'private' / 'introducers.yaml'}"
        return [*findings, Finding("node", "introducers", "problem", "the node names none, and no server", remedy)]
    async with grid.join_grid(node) as client:
        await client.broker.wait_for_servers(SERVERS_MAX, GRID_TIMEOUT_S)
        if client.helper is not None:
            await client.helper.wait_connected(GRID_TIMEOUT_S, first_try_only=True)
        return [*findings, *look_at_grid(client)]


# --- this machine ----------------------------------------------------------------------------------------------------


def look_at_fuse(
    device: Path = FUSE_DEVICE, conf: Path = FUSE_CONF, *, uid: int | None = None, fusermount: str | None = None
) -> Iterator[Finding]:
    """`uid` and `fusermount` (a path, or "" for none) are this process's, unless given."""
    uid = os.getuid() if uid is None else uid
    if not device.exists():
        yield Finding(
            "machine", str(device), "problem", "is not there", "load it: modprobe fuse; or give it the container"
        )
    elif not os.access(device, os.R_OK | os.W_OK):
        yield Finding(
            "machine", str(device), "problem", "may not be opened by you", f"chmod 666 {device}, or ask root to"
        )
    else:
        yield Finding("machine", str(device), "ok", "can be opened")
    program = (shutil.which("fusermount3") or "") if fusermount is None else fusermount
    install = "install fuse3 (on Debian: apt-get install fuse3)"
    if not program:
        state: State = "warning" if uid == 0 else "problem"
        yield Finding("machine", "fusermount3", state, "is not installed; only root can mount without it", install)
    elif not Path(program).stat().st_mode & stat.S_ISUID and uid != 0:
        yield Finding("machine", "fusermount3", "problem", "is not set-uid root, so you cannot mount", install)
    else:
        yield Finding("machine", "fusermount3", "ok", program)
    if uid == 0 or _says(conf, "user_allow_other"):
        yield Finding("machine", str(conf), "ok", "-o allow_other can be used")
    else:
        text = "has no user_allow_other, so a mount with -o allow_other fails"
        yield Finding(
            "machine", str(conf), "warning", text, f"if you need it: echo user_allow_other >> {conf}, as root"
        )


def _says(conf: Path, word: str) -> bool:
    try:
        return word in (line.strip() for line in conf.read_text(errors="replace").splitlines())
    except OSError:
        return False


def look_at_disk(node_dir: Path) -> Iterator[Finding]:
    """Where the journal and the cache are, or would be."""
    place = next((path for path in (node_dir.absolute(), *node_dir.absolute().parents) if path.is_dir()), Path("/"))
    usage = os.statvfs(place)
    free = usage.f_frsize * usage.f_bavail
    text = f"{human_bytes(free)} free at {place}"
    remedy = "make room, or put the cache elsewhere with -o cache_dir="
    if free < DISK_PROBLEM_BYTES or not os.access(place, os.W_OK):
        text += "" if os.access(place, os.W_OK) else ", which you may not write to"
        yield Finding("machine", "disk", "problem", text, remedy)
    elif free < DISK_WARNING_BYTES:
        yield Finding("machine", "disk", "warning", f"{text}: little for files on their way", remedy)
    else:
        yield Finding("machine", "disk", "ok", text)


# --- the grid --------------------------------------------------------------------------------------------------------


def look_at_grid(client: grid.GridClient) -> Iterator[Finding]:
    for introducer in client.broker.introducers:
        subject = f"introducer {introducer.petname}"
        if introducer.connected_to_introducer():
            yield Finding("grid", subject, "ok", "connected")
        else:
            why = introducer.last_failure or "does not answer"
            known = bool(client.broker.get_known_servers())
            state: State = "warning" if known else "problem"
            yield Finding(
                "grid", subject, state, why, "check the network, and that the introducer's FURL is still its own"
            )
    yield from _look_at_servers(client)
    yield from look_at_clock([getattr(server, "clock_ahead_s", None) for server in client.broker.get_known_servers()])
    if client.helper is not None:
        if client.helper.connected:
            yield Finding("grid", "upload helper", "ok", "connected")
        else:
            why = client.helper.last_failure or "does not answer"
            yield Finding("grid", "upload helper", "warning", why, "uploads go without it; check [client] helper.furl")


def _look_at_servers(client: grid.GridClient) -> Iterator[Finding]:
    servers = client.broker.get_known_servers()
    connected = [server for server in servers if server.connected]
    away = [server for server in servers if not server.connected]
    for server in away[:SERVERS_SHOWN_MAX]:
        why = getattr(server, "last_failure", None) or "does not answer"
        yield Finding("grid", f"server {server.name}", "warning", f"{server.nickname}: {why}", "ask who runs it")
    if len(away) > SERVERS_SHOWN_MAX:
        yield Finding("grid", "servers", "warning", f"{len(away) - SERVERS_SHOWN_MAX} more do not answer")
    k, happy, _ = client.node.encoding
    count = f"{len(connected)} of {len(servers)} connected"
    if len(connected) < k:
        remedy = "check the network; with fewer than that nothing can be read"
        yield Finding("grid", "servers", "problem", f"{count}, reading takes {k}", remedy)
    else:
        yield Finding("grid", "servers", "ok", count)
    usable = [server for server in connected if client.broker.permits_upload(server) and server.available_space != 0]
    if len(usable) < happy:
        text = f"{len(usable)} servers take shares, [client] shares.happy = {happy}: writing fails"
        remedy = "more servers, more space on them, or lower shares.happy in tahoe.cfg"
        yield Finding("grid", "happiness", "problem", text, remedy)
    else:
        yield Finding("grid", "happiness", "ok", f"{len(usable)} servers take shares, {happy} are required")


def look_at_clock(ahead_s: Sequence[float | None]) -> Iterator[Finding]:
    """`ahead_s`: by how many seconds each server's clock is ahead of ours, as far as they tell."""
    told = [each for each in ahead_s if each is not None]
    if not told:
        yield Finding("machine", "clock", "ok", "no server tells the time, so it was not compared")
        return
    skew_s = statistics.median(told)
    text = f"{abs(skew_s):.0f} s {'behind' if skew_s > 0 else 'ahead of'} the servers"
    remedy = "set it, and keep it right (on Debian: apt-get install systemd-timesyncd)"
    if abs(skew_s) > CLOCK_PROBLEM_S:
        yield Finding("machine", "clock", "problem", text, remedy)
    elif abs(skew_s) > CLOCK_WARNING_S:
        yield Finding("machine", "clock", "warning", text, remedy)
    else:
        yield Finding("machine", "clock", "ok", text)
