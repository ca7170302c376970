"""A real Tahoe-LAFS 1.20 grid on loopback: one introducer, ten storage servers, one client with its web API.

Introducer and servers may be ours instead, run on the same node directories.

The real program is a test peer, never an import of ours: it is installed into a virtual environment of its
own, outside the checkout, once, and run as child processes. A server is lost with `kill()`, hung with
`pause()` (its TCP connections stay up), and comes back with `start()` or `resume()`.

Nodes are given fixed loopback addresses; without those they listen everywhere and look for an address.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

TAHOE_VERSION = "1.20.0"
START_TIMEOUT_S = 240
REQUEST_TIMEOUT_S = 300
SERVERS = 10
PR_SET_PDEATHSIG = 1
SHARES = (3, 7, 10)


class TahoeNotAvailable(Exception):
    """The real Tahoe-LAFS could not be installed here; the text says why."""


def cache_directory() -> Path:
    """Where things that tests make once are kept: outside the checkout."""
    base = os.environ.get("TAHOEFS_TEST_CACHE") or Path.home() / ".cache" / "tahoefs-tests"
    return Path(base)


def tahoe_environment() -> Path:
    """The virtual environment that holds the real Tahoe-LAFS, made at first use (about a minute)."""
    home = Path(os.environ.get("TAHOEFS_TEST_TAHOE") or cache_directory() / f"tahoe-{TAHOE_VERSION}")
    home.parent.mkdir(parents=True, exist_ok=True)
    with (home.parent / f"{home.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two test runs at once must not install over each other
        tahoe = home / "bin" / "tahoe"
        if tahoe.exists() and subprocess.run([tahoe, "--version"], capture_output=True, check=False).returncode == 0:
            return home
        for command in (
            [sys.executable, "-m", "venv", "--clear", str(home)],
            [str(home / "bin" / "python"), "-m", "pip", "install", "--quiet", f"tahoe-lafs=={TAHOE_VERSION}"],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise TahoeNotAvailable(
                    f"cannot install tahoe-lafs {TAHOE_VERSION}: {done.stderr.strip().splitlines()[-1:]}"
                )
        return home


def wait_until(condition: Callable[[], Any], what: str, timeout_s: float = START_TIMEOUT_S) -> Any:
    """Poll until `condition()` is true and return it; a TimeoutError names `what`."""
    deadline = time.monotonic() + timeout_s
    while True:
        with contextlib.suppress(OSError, ValueError):
            if value := condition():
                return value
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout_s:g} s for {what}")
        time.sleep(0.1)


def free_ports(count: int) -> list[int]:
    """TCP ports nobody listens on now; asked for together, so that all differ."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


OUR_PROGRAM = (sys.executable, "-m", "tahoefs.cli", "run")


def _end_with_parent() -> None:
    """In a new child: the kernel kills it when the test run dies, however that dies.

    To the kernel that is the thread that started it: so no node is started by a
    worker thread, which ends when it is idle.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Node:
    """One node: its directory and, while it runs, its process. `program` is the real one's, or OUR_PROGRAM."""

    def __init__(self, tahoe: Path, path: Path, kind: str, config: str) -> None:
        self.path = path
        self.program: Sequence[str | Path] = (tahoe, "run", "--allow-stdin-close")
        self.process: subprocess.Popen[bytes] | None = None
        (path / "private").mkdir(parents=True, mode=0o700)
        (path / "tahoe.cfg").write_text(config)
        (path / f"tahoe-{kind}.tac").write_text(f"# marks this directory as a node: {kind}\n")

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def start(self) -> None:
        if self.running:
            return
        with (self.path / "output.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*self.program, self.path],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )

    def kill(self) -> None:
        """Lose the node: SIGKILL, connections are reset."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()
            self.process.wait()
            self.process = None

    def pause(self) -> None:
        """Hang the node: its connections stay up, nothing answers."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def private(self, name: str) -> str:
        return (self.path / "private" / name).read_text().strip()


class TahoeGrid:
    """The grid: `introducer`, `servers`, `client`; the client's web API as methods."""

    def __init__(
        self,
        base: Path,
        *,
        servers: int = SERVERS,
        shares: tuple[int, int, int] = SHARES,
        our_introducer: bool = False,
        our_servers: int = 0,
        force_foolscap: bool = False,
    ) -> None:
        """The first `our_servers` of the servers are ours."""
        self.home = tahoe_environment()
        self.tahoe = self.home / "bin" / "tahoe"
        self.base = base
        self.shares = shares
        self._server_count = servers
        self._our_introducer, self._our_servers, self._force_foolscap = our_introducer, our_servers, force_foolscap
        self.introducer_furl = ""
        self.servers: list[Node] = []

    def start(self) -> TahoeGrid:
        introducer_port, web_port, *ports = free_ports(2 + self._server_count)
        self.introducer = Node(self.tahoe, self.base / "introducer", "introducer", _listening(introducer_port))
        if self._our_introducer:
            self.introducer.program = OUR_PROGRAM
        self.introducer.start()
        furl_file = self.introducer.path / "private" / "introducer.furl"
        wait_until(lambda: furl_file.exists() and furl_file.read_text().endswith("\n"), "the introducer's FURL")
        self.introducer_furl = furl_file.read_text().strip()
        for number, port in enumerate(ports):
            config = _listening(port, f"server{number}") + "[storage]\nenabled = true\nreserved_space = 0\n"
            if self._force_foolscap:
                config += "force_foolscap = true\n"
            self.servers.append(self._join(Node(self.tahoe, self.base / f"server{number}", "client", config)))
            if number < self._our_servers:
                self.servers[-1].program = OUR_PROGRAM
        self.client = self._join(Node(self.tahoe, self.base / "client", "client", client_config(web_port, self.shares)))
        for node in (*self.servers, self.client):
            node.start()
        self.web = f"http://127.0.0.1:{web_port}"
        self.wait_connected(self._server_count)
        return self

    def _join(self, node: Node) -> Node:
        text = json.dumps({"introducers": {"default": {"furl": self.introducer_furl}}})
        (node.path / "private" / "introducers.yaml").write_text(text)  # JSON is YAML
        return node

    def new_client(self, path: Path, nickname: str) -> Path:
        """A node directory of another client of this grid, for a mount."""
        node = Node(self.tahoe, path, "client", client_config(0, self.shares, nickname))
        return self._join(node).path

    def stop(self) -> None:
        for node in (*self.servers, *(getattr(self, name) for name in ("client", "introducer") if hasattr(self, name))):
            node.kill()

    def wait_connected(self, count: int | None = None) -> None:
        """Wait until the real client is connected to `count` servers (all that run, by default)."""
        wanted = sum(node.running for node in self.servers) if count is None else count
        wait_until(lambda: self.connected_servers() == wanted, f"the real client to reach {wanted} servers")

    def reconnect(self) -> None:
        """Have the real client connected to all servers that run.

        Over HTTP it looks only once a minute whether a server is back, but at once when it is started.
        """
        if not self._force_foolscap and self.connected_servers() != sum(node.running for node in self.servers):
            self.client.kill()
            self.client.start()
        self.wait_connected()

    def connected_servers(self) -> int:
        """How many the real client would use now.

        Its page says so. Its JSON says "connected" before the server has told its version, and is not asked till then.
        """
        page = self.request("GET", "/").decode()
        found = re.search(r"Connected to\s*<span>(\d+)</span>\s*of\s*<span>\d+</span>\s*known storage servers", page)
        assert found is not None, "the real client's first page has changed"
        return int(found[1])

    @contextlib.contextmanager
    def without(self, numbers: Sequence[int]) -> Iterator[None]:
        """Lose these servers for the length of the block, then have them back, reconnected."""
        for number in numbers:
            self.servers[number].kill()
        try:
            yield
        finally:
            for number in numbers:
                self.servers[number].start()
            self.reconnect()

    @contextlib.contextmanager
    def hung(self, numbers: Sequence[int]) -> Iterator[None]:
        """Hang these servers (SIGSTOP) for the length of the block."""
        for number in numbers:
            self.servers[number].pause()
        try:
            yield
        finally:
            for number in numbers:
                self.servers[number].resume()

    # --- the real client ---------------------------------------------------------------------------------

    def request(self, method: str, path: str, body: bytes | None = None) -> bytes:
        """One call of the web API. Raises urllib.error.HTTPError with the server's text."""
        request = urllib.request.Request(self.web + path, data=body, method=method)
        with urllib.request.urlopen(request, timeout=REQUEST_TIMEOUT_S) as answer:
            data: bytes = answer.read()
            return data

    def put(self, data: bytes, file_format: str = "CHK") -> str:
        """Upload, unlinked; returns the cap. Formats: CHK (LIT when small), SDMF, MDMF."""
        query = "" if file_format == "CHK" else f"?format={file_format}"
        return self.request("PUT", f"/uri{query}", data).decode()

    def put_at(self, directory: str, path: str, data: bytes, file_format: str = "CHK") -> str:
        query = "" if file_format == "CHK" else f"?format={file_format}"
        return self.request("PUT", _uri(directory, path) + query, data).decode()

    def put_into(self, cap: str, offset: int, data: bytes) -> None:
        """Write to a mutable file in place."""
        self.request("PUT", f"{_uri(cap)}?offset={offset}", data)

    def run_command(self, *arguments: str | Path) -> bytes:
        """The real command line, on the client's node directory. Returns its standard output."""
        command = [self.tahoe, "-d", self.client.path, *arguments]
        return subprocess.run(command, capture_output=True, check=True, timeout=REQUEST_TIMEOUT_S).stdout

    def mkdir(self, file_format: str = "SDMF") -> str:
        return self.request("POST", f"/uri?t=mkdir&format={file_format}").decode()

    def mkdir_at(self, directory: str, path: str) -> str:
        return self.request("PUT", _uri(directory, path) + "?t=mkdir").decode()

    def link(self, directory: str, name: str, cap: str) -> None:
        self.request("PUT", _uri(directory, name) + "?t=uri", cap.encode())

    def set_children(self, directory: str, children: dict[str, Any]) -> None:
        """`children`: {name: [kind, {"ro_uri"/"rw_uri": …, "metadata": …}]}, as `t=set-children` takes them."""
        self.request("POST", _uri(directory) + "?t=set-children", json.dumps(children).encode())

    def mkdir_with_children(self, children: dict[str, Any]) -> str:
        """Their metadata is stored as it is given, the `tahoe` part too."""
        return self.request("POST", "/uri?t=mkdir-with-children", json.dumps(children).encode()).decode()

    def mkdir_immutable(self, children: dict[str, Any]) -> str:
        return self.request("POST", "/uri?t=mkdir-immutable", json.dumps(children).encode()).decode()

    def rename(self, directory: str, old: str, new: str) -> None:
        names = urllib.parse.urlencode({"from_name": old, "to_name": new})
        self.request("POST", f"{_uri(directory)}?t=rename&{names}", b"")

    def walk(self, cap: str, above: str = "") -> Iterator[tuple[str, str, dict[str, Any]]]:
        """(path, "filenode", "dirnode" or "unknown", what `t=json` tells) of all below a directory."""
        for name, (kind, child) in self.json(cap)[1]["children"].items():
            yield above + name, kind, child
            if kind == "dirnode":
                yield from self.walk(child["ro_uri"], f"{above}{name}/")

    def get(self, cap: str, path: str = "") -> bytes:
        return self.request("GET", _uri(cap, path))

    def json(self, cap: str, path: str = "") -> Any:
        return json.loads(self.request("GET", _uri(cap, path) + "?t=json"))

    def check(self, cap: str, *, verify: bool = True) -> Any:
        return json.loads(
            self.request("POST", _uri(cap) + f"?t=check&output=JSON&verify={'true' if verify else 'false'}", b"")
        )

    def deep_check(self, directory: str, *, verify: bool = True) -> list[Any]:
        """One JSON object for each file and directory reachable; the last holds the totals."""
        query = f"?t=stream-deep-check&verify={'true' if verify else 'false'}"
        lines = self.request("POST", _uri(directory) + query, b"")
        return [json.loads(line) for line in lines.splitlines()]

    def share_files(self, storage_index: str) -> dict[int, list[tuple[int, Path]]]:
        """{share number: [(server number, container file)]}, from the servers' disks."""
        found: dict[int, list[tuple[int, Path]]] = {}
        for number, server in enumerate(self.servers):
            bucket = server.path / "storage" / "shares" / storage_index[:2] / storage_index
            if bucket.is_dir():
                for file in bucket.iterdir():
                    found.setdefault(int(file.name), []).append((number, file))
        return found


def client_config(web_port: int, shares: tuple[int, int, int], nickname: str = "client") -> str:
    k, happy, n = shares
    return (
        f"[node]\nnickname = {nickname}\nweb.port = tcp:{web_port}:interface=127.0.0.1\n"
        "tub.port = disabled\ntub.location = disabled\n"
        f"[client]\nshares.needed = {k}\nshares.happy = {happy}\nshares.total = {n}\n[storage]\nenabled = false\n"
    )


def _listening(port: int, nickname: str = "introducer") -> str:
    return (
        f"[node]\nnickname = {nickname}\nweb.port =\n"
        f"tub.port = tcp:{port}:interface=127.0.0.1\ntub.location = tcp:127.0.0.1:{port}\n"
    )


def _uri(cap: str, path: str = "") -> str:
    quoted = "".join("/" + urllib.parse.quote(part, safe="") for part in path.split("/") if part)
    return f"/uri/{urllib.parse.quote(cap, safe='')}{quoted}"
