"""Pinning as commands ask for it in JSON, of a mount's daemon.

    pin      {"path": [name, …], "label": as the user has written it, "wait": bool}
                 pins it; returns its status at once, or when all of it is here, telling how far it is meanwhile
    unpin    {"path", "label"}

What cannot be pinned at all (no such path, too large for the cache) is not pinned afterwards either; what cannot be had
now (offline, damaged) stays pinned. Either way it is a PinError that says so.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any, Final

from cache import Pin, Pins, PinsFullError, Workspace
from grid.errors import GridError, GridUnreachableError, NoSuchChildError
from grid.formats.caps import UnknownCap
from tahoefs.control import Progress
from tahoefs.errnos import EXIT_DAMAGED, EXIT_FAILED, EXIT_NOT_ALLOWED, EXIT_UNREACHABLE
from tahoefs.link_requests import LinkRequests, refusals
from tahoefs.progress import counted
from tahoefs.targets import cap_of
from tahoefs.vfs import VFS

log = logging.getLogger(__name__)

TELL_S: Final = 0.5  # between two words about how far it is
PUBLISH_STALL_S: Final = 120.0  # as `tahoefs sync`: for what is not on the grid yet


class PinError(Exception):
    """It is not pinned, or not here in full; the text says which, why, and what to do."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class PinRequests:
    def __init__(self, workspace: Workspace, vfs: VFS) -> None:
        self._workspace = workspace
        self._vfs = vfs
        self._links = LinkRequests(vfs)

    async def pin(self, request: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """Raises PinError, LinkingError, OSError."""
        label, pins = request["label"], self._pins(request["label"])
        path = self._path(request)
        await self._require_grid(request, wait=request["wait"])
        try:
            is_new = await pins.add(path)
        except PinsFullError as error:
            raise PinError(f"{label}: {error}", EXIT_FAILED) from None
        if not request["wait"]:
            pin = pins.find(path)
            return {} if pin is None else pin.status()
        told_at = 0.0

        async def tell(pin: Pin) -> None:
            nonlocal told_at
            if (now := time.monotonic()) >= told_at + TELL_S:
                told_at = now
                await progress(pin.status())

        try:
            pin = await pins.settled(path, tell)
        except NoSuchChildError as error:
            raise PinError(f"{label}: {error}", EXIT_FAILED) from None
        if pin.state in ("full", "missing") and is_new:
            await pins.remove(path)
        if (problem := _problem(pin, is_new=is_new)) is not None:
            text, code = problem
            raise PinError(f"{label}: {text}", code)
        return pin.status()

    async def unpin(self, request: dict[str, Any], progress: Progress) -> None:
        """Raises PinError, OSError."""
        label, pins, path = request["label"], self._pins(request["label"]), self._path(request)
        if not await pins.remove(path):
            above = pins.around(path)
            hint = "" if above is None else f"; it is kept with {above.status()['path']}, which is"
            raise PinError(f"{label}: not pinned{hint}", EXIT_FAILED)

    async def moved(self, moves: Sequence[tuple[str, str]]) -> None:
        """Directories were renamed in this mount: old and new paths, as VFS.path_of has them."""
        if self._workspace.pins is not None:
            try:
                await self._workspace.pins.moved([(_parts(old), _parts(new)) for old, new in moves])
            except OSError as error:  # what was renamed is renamed
                log.error("a pin did not go with its directory: %s", error)

    def _pins(self, label: str) -> Pins:
        if self._workspace.pins is None:
            raise PinError(f"{label}: nothing can be pinned without a cache on disk: see cache_size=", EXIT_FAILED)
        return self._workspace.pins

    def _path(self, request: dict[str, Any]) -> tuple[str, ...]:
        with refusals(request["label"]):
            return tuple(self._vfs.name_of(part.encode(errors="surrogateescape")) for part in request["path"])

    async def _require_grid(self, request: dict[str, Any], *, wait: bool) -> None:
        """Something must stand there, fit to be kept; what is not on the grid yet is waited for."""
        label = request["label"]
        target = (await self._links.find(request)).target
        cap = cap_of(target)
        if isinstance(cap, UnknownCap) or (cap is not None and cap.is_verifier):
            raise PinError(f"{label}: its cap cannot be read, so there is nothing to keep", EXIT_NOT_ALLOWED)
        if cap is None and wait:
            try:
                await self._workspace.wait(stall_s=PUBLISH_STALL_S)
            except GridError as error:
                code = EXIT_UNREACHABLE if isinstance(error, GridUnreachableError) else EXIT_FAILED
                raise PinError(f"{label}: not on the grid yet, so it cannot be pinned: {error}", code) from error


def _problem(pin: Pin, *, is_new: bool) -> tuple[str, int] | None:
    """Why it is not here in full, and the exit code for that; None if it is."""
    lacking = f"{pin.files - pin.files_held} of {counted(pin.files, 'file')}"
    if pin.state == "complete":
        return None
    if pin.state == "full":
        kept = "" if is_new else f"; {lacking} not here"
        return f"does not fit: {pin.message}{kept}", EXIT_FAILED
    if pin.state == "missing":
        return f"there is nothing to pin: {pin.message}", EXIT_FAILED
    if pin.state == "waiting":
        return (
            f"{lacking} are not here yet: {pin.message}; it stays pinned, and goes on with the grid",
            EXIT_UNREACHABLE,
        )
    return f"{lacking} not here: {pin.message}; it stays pinned, and is tried again", EXIT_DAMAGED


def _parts(path: str) -> tuple[str, ...]:
    return tuple(part for part in path.split("/") if part)
