"""Linking and cloning as it is asked for in JSON, by commands: of a mount's daemon, or where there is no mount.

A place is {"label": as the user has written it, "path": [name, …]} below the root of the tree; with "cap" too, below
that cap instead; "metadata" and "name" go with a cap that was an entry elsewhere.

    find(place)           what stands there
    link(from, to)        a new name for it
    clone(from, to)       a copy of it under a new name, its files converted if `mutable` says so

What goes wrong is a LinkingError that names the place.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import trio
from attrs import evolve

from grid.errors import GridError
from grid.formats.caps import parse_known_cap
from tahoefs.errnos import EXIT_FAILED, EXIT_NOT_ALLOWED, EXIT_USAGE, FSError, exit_code_of
from tahoefs.linking import Found, Linking, Tell, tell_nobody
from tahoefs.options import MUTABLE
from tahoefs.vfs import VFS

Place = dict[str, Any]


class LinkingError(Exception):
    """It cannot be done; the text says with which place, and why."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@contextmanager
def refusals(label: str) -> Iterator[None]:
    """What goes wrong in here goes wrong with the place of this label."""
    try:
        yield
    except FSError as error:
        not_allowed = error.errno in (errno.EACCES, errno.EROFS, errno.EPERM)
        code = EXIT_NOT_ALLOWED if not_allowed else EXIT_FAILED
        raise LinkingError(f"{label}: {os.strerror(error.errno)}", code) from error
    except (GridError, trio.TooSlowError) as error:
        reason = str(error) or "the grid did not answer in time"
        raise LinkingError(f"{label}: {reason}", exit_code_of(error)) from error


class LinkRequests:
    def __init__(self, vfs: VFS) -> None:
        self._linking = Linking(vfs)

    async def find(self, place: Place) -> Found:
        with refusals(place["label"]):
            if "cap" not in place:
                return await self._linking.find(place["path"])
            found = await self._linking.find_below(parse_known_cap(place["cap"]), place["path"])
            return evolve(found, metadata=place["metadata"], name=place["name"]) if "metadata" in place else found

    async def link(self, source: Place, to: Place) -> None:
        found = await self.find(source)
        with refusals(to["label"]):
            await self._linking.link(found, to["path"])

    async def clone(self, source: Place, to: Place, tell: Tell = tell_nobody, *, mutable: str | None = None) -> None:
        if mutable is not None and mutable not in MUTABLE:
            raise LinkingError(f"{to['label']}: no such kind of file", EXIT_USAGE)
        found = await self.find(source)
        with refusals(to["label"]):
            await self._linking.clone(found, to["path"], tell, mutable=mutable)
