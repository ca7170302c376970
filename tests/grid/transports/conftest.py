"""Tubs on loopback: our own, and a real foolscap one in a process of its own."""

from __future__ import annotations

import os
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from attrs import define

from grid.crypto import TubIdentity, make_tub_identity
from grid.transports.tub import Tub

FAR_S = 60.0  # a deadline that only a broken test reaches
_CACHE = Path("~/.cache/tahoefs-tests/tahoe-1.20.0").expanduser()

StartTub = Callable[..., Awaitable[Tub]]


def identity_beside(tub_id: str, *, greater: bool) -> TubIdentity:
    """An identity that makes its tub the master towards `tub_id`, or not."""
    while True:
        identity = make_tub_identity()
        if (identity.tub_id > tub_id) == greater:
            return identity


async def listen(tub: Tub, nursery: trio.Nursery) -> int:
    """Accept on a loopback port, which is returned, until the nursery is cancelled."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    nursery.start_soon(trio.serve_listeners, tub.accept, [listener])
    port: int = listener.socket.getsockname()[1]
    return port


@pytest.fixture
async def start_tub(nursery: trio.Nursery) -> StartTub:
    """await start_tub(identity=…, listening=True): a running tub that the test's end stops."""

    async def start(identity: TubIdentity | None = None, *, listening: bool = False, **options: Any) -> Tub:
        identity = identity or make_tub_identity()
        if not listening:
            tub = Tub(identity, **options)
            await nursery.start(tub.run)
            return tub
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        tub = Tub(identity, location=f"tcp:127.0.0.1:{listener.socket.getsockname()[1]}", **options)
        await nursery.start(tub.run)
        nursery.start_soon(trio.serve_listeners, tub.accept, [listener])
        return tub

    return start


@define
class FoolscapPeer:
    furl: str

    @property
    def tub_id(self) -> str:
        return self.furl.removeprefix("pb://")[:32]


@pytest.fixture
async def foolscap_peer() -> AsyncIterator[FoolscapPeer]:
    """See foolscap_peer.py. Ends with the test."""
    python = Path(os.environ.get("TAHOEFS_TEST_TAHOE", _CACHE)) / "bin/python"
    if not python.exists():
        pytest.skip(f"no Tahoe-LAFS 1.20 to test against: {python} is missing (see TAHOEFS_TEST_TAHOE)")
    script = Path(__file__).with_name("foolscap_peer.py")
    process = await trio.lowlevel.open_process([python, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        furl = b""
        with trio.fail_after(FAR_S):
            while not furl.endswith(b"\n"):
                data = await process.stdout.receive_some()
                assert data, "the foolscap peer did not start"
                furl += data
        yield FoolscapPeer(furl.decode().strip())
    finally:
        with trio.CancelScope(shield=True):
            await process.stdin.aclose()
            with trio.move_on_after(10):
                await process.wait()
            if process.returncode is None:
                process.kill()
                await process.wait()
            await process.stdout.aclose()
