"""The control socket: both ends, for real, and what happens to those who send rubbish."""

from __future__ import annotations

import functools
import socket
import stat
from pathlib import Path
from typing import Any

import pytest
import trio

from grid.errors import GridUnreachableError
from tahoefs.control import Progress, serve_control
from tahoefs.control_client import ControlError, ask


async def echo(request: dict[str, Any], progress: Progress) -> Any:
    await progress({"files": 1})
    return {"got": request["value"]}


async def fail(request: dict[str, Any], progress: Progress) -> Any:
    raise GridUnreachableError("nobody there")


async def test_both_ends(tmp_path: Path, nursery: trio.Nursery) -> None:
    deep = tmp_path / ("long" * 20) / ("er" * 40)  # longer than a socket address holds
    deep.mkdir(parents=True)
    path = deep / "control.sock"
    await nursery.start(serve_control, path, {"echo": echo, "fail": fail})
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    seen: list[Any] = []

    def call(request: dict[str, Any]) -> Any:
        return ask(path, request, timeout_s=10, progress=seen.append)

    assert await trio.to_thread.run_sync(call, {"command": "echo", "value": "ü"}) == {"got": "ü"}
    assert seen == [{"files": 1}]
    with pytest.raises(ControlError, match="nobody there") as failure:
        await trio.to_thread.run_sync(call, {"command": "fail"})
    assert failure.value.exit_code == 3
    with pytest.raises(ControlError, match="unknown command"):
        await trio.to_thread.run_sync(call, {"command": "no"})


@pytest.mark.parametrize("rubbish", [b"\n", b"[]\n", b"\xff\xfe\n", b"{" * 300_000, b"{}"])
async def test_rubbish_is_dropped_and_service_goes_on(tmp_path: Path, nursery: trio.Nursery, rubbish: bytes) -> None:
    path = tmp_path / "control.sock"
    await nursery.start(serve_control, path, {"echo": echo})

    def send() -> bytes:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(path))
            try:
                connection.sendall(rubbish)
                connection.shutdown(socket.SHUT_WR)
                return connection.recv(1000)
            except (ConnectionResetError, BrokenPipeError):
                return b""

    await trio.to_thread.run_sync(send)
    answer = await trio.to_thread.run_sync(functools.partial(ask, path, {"command": "echo", "value": 1}, timeout_s=10))
    assert answer == {"got": 1}


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(ControlError, match="cannot talk"):
        ask(tmp_path / "missing.sock", {"command": "status"}, timeout_s=1)
