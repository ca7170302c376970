"""What a mount's daemon answers on its control socket: how it is, waiting for the grid, being told to leave.

    status    one object, see README.md
    sync      returns when all that was written before is on the grid; tells how much is left meanwhile
    detach    stop sending: what is left stays in the journal, for the next mount
    link      {"from": place, "to": place}, see `link_requests.py`
    clone     the same, and "mutable": what its files are to be, if they are to be converted
    pin       {"path": [name, …], …}: keep it in the disk cache, see `pin_requests.py`
    unpin     the same: no longer
    entry     {"from": place}: what stands there, once it is on the grid: {"cap", "metadata", "name"}

Each is a coroutine of (request, progress), see `control.py` for the socket. Who can connect may see caps: it is who
mounted it.
"""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import trio

import grid
from cache import Workspace
from grid.errors import GridError
from tahoefs.control import Command, Progress
from tahoefs.errnos import exit_code_of
from tahoefs.lease_keeper import LeaseKeeper
from tahoefs.link_requests import LinkRequests
from tahoefs.mount_config import MountConfig
from tahoefs.pin_requests import PinRequests
from tahoefs.progress import in_words
from tahoefs.targets import cap_of
from tahoefs.vfs import VFS

SYNC_STALL_S: Final = 120.0  # a sync in which nothing at all gets any further for so long has failed
PROGRESS_INTERVAL_S: Final = 0.5
PROGRESS_SHARE: Final = 0.1  # of the time may go into counting what is left, when that is very much


class UnsentError(Exception):
    """Something is not on the grid, and nobody waits for it any longer. The text says what."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class MountControl:
    """One mount's answers. `state` is what `status` shows; `detached` is set when somebody asked for that."""

    def __init__(
        self,
        config: MountConfig,
        client: grid.GridClient,
        workspace: Workspace,
        vfs: VFS,
        keeper: LeaseKeeper | None = None,
    ) -> None:
        self.state = "online"
        self.detached = trio.Event()
        self._config = config
        self._client = client
        self._workspace = workspace
        self._links = LinkRequests(vfs)
        self._pins = PinRequests(workspace, vfs)
        vfs.on_moved = self._pins.moved
        self._keeper = keeper
        self._started = time.time()

    def commands(self) -> dict[str, Command]:
        return {
            "status": self._answer_status,
            "sync": self._answer_sync,
            "detach": self._answer_detach,
            "link": self._answer_link,
            "clone": self._answer_clone,
            "entry": self._answer_entry,
            "pin": self._pins.pin,
            "unpin": self._pins.unpin,
        }

    @property
    def durable(self) -> bool:
        """Does what is not sent outlive this process?"""
        return self._workspace.durable

    def status(self) -> dict[str, Any]:
        servers, helper = self._client.broker.get_known_servers(), self._client.helper
        return {
            "mountpoint": str(Path(self._config.mountpoint)),
            "source": self._config.label,
            "readonly": self._workspace.readonly,
            "pid": os.getpid(),
            "since": self._started,
            "durable": self.durable,
            "servers": {"connected": sum(each.connected for each in servers), "known": len(servers)},
            "leases": self._keeper.status() if self._keeper is not None else None,
            "helper": {"connected": helper.connected} if helper is not None else None,
            **self._workspace.status(),
            "state": self._shown_state(),
        }

    def _shown_state(self) -> str:
        if self.state != "online":
            return self.state
        if self._workspace.offline:
            return "offline"
        return "replaying" if self._workspace.replaying else "online"

    async def _answer_status(self, request: dict[str, Any], progress: Progress) -> dict[str, Any]:
        return self.status()

    async def _answer_sync(self, request: dict[str, Any], progress: Progress) -> None:
        timeout_s = request.get("timeout_s")
        try:
            async with telling(self._workspace, progress):
                limit_s = float(timeout_s) if timeout_s is not None else None
                await self._workspace.wait(timeout_s=limit_s, stall_s=SYNC_STALL_S)
        except (GridError, OSError, trio.TooSlowError) as error:
            raise self.unsent("not on the grid: {}" + f": {error}; it is tried again", exit_code_of(error)) from error

    async def _answer_detach(self, request: dict[str, Any], progress: Progress) -> dict[str, Any]:
        pending: dict[str, Any] = self._workspace.status()["pending"]
        if any(pending.values()) and not self.durable:
            raise self.unsent("not sent yet, and would be lost: {}; leave out --no-wait")
        self.detached.set()
        return pending

    async def _answer_link(self, request: dict[str, Any], progress: Progress) -> None:
        await self._links.link(request["from"], request["to"])

    async def _answer_clone(self, request: dict[str, Any], progress: Progress) -> None:
        await self._links.clone(request["from"], request["to"], progress, mutable=request.get("mutable"))

    async def _answer_entry(self, request: dict[str, Any], progress: Progress) -> dict[str, Any]:
        await self._links.find(request["from"])  # stores what is open there
        await self._answer_sync(request, progress)
        found = await self._links.find(request["from"])
        cap = cap_of(found.target)
        if cap is None:
            raise self.unsent("not on the grid: {}; it changed again meanwhile")
        return {"cap": str(cap), "metadata": dict(found.metadata), "name": found.name}

    def unsent(self, text: str, exit_code: int = 1) -> UnsentError:
        """With what is pending in the place of `{}` in `text`."""
        status = self._workspace.status()
        example = next((f", such as {upload['name']}" for upload in status["uploads"]), "")
        return UnsentError(text.replace("{}", in_words(status["pending"]) + example, 1), exit_code)


@asynccontextmanager
async def telling(workspace: Workspace, tell: Callable[[dict[str, Any]], Awaitable[None]]) -> AsyncIterator[None]:
    """While this lasts, `tell` is called with what is pending, now and then."""

    async def keep_telling() -> None:
        while True:
            began = time.monotonic()
            pending = workspace.status()["pending"]
            took_s = time.monotonic() - began
            await tell(pending)
            await trio.sleep(max(PROGRESS_INTERVAL_S, took_s / PROGRESS_SHARE))

    failure: Exception | None = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(keep_telling)
        try:
            yield
        except Exception as error:  # noqa: BLE001  raised again below, not in a group
            failure = error
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
