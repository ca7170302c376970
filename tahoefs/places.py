"""What `ln` and `clone` are told to work on: a path in a mount, or something on a grid without one.

    alias:path  @FILE  -  URI:…  local:DIR      on the grid: WHAT, see `what.py`
    anything else                               a path in a mount; `./a:b` for a file whose name looks like an alias

Says what a mount's daemon is asked, without trio or the grid: see `mount_control.py` for the requests.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

from attrs import frozen

from tahoefs.registry import FoundMount, find_mount
from tahoefs.what import CAP_PREFIXES, What, resolve_what

_ALIAS: Final = re.compile(r"[^/:]+:")


class PlaceError(Exception):
    """It names nothing that could be worked on; the text says why."""

    exit_code = 1


@frozen
class InMount:
    label: str
    mount: FoundMount

    def to_json(self) -> dict[str, Any]:
        return {"label": self.label, "path": list(self.mount.inside)}


@frozen
class OnGrid:
    label: str
    what: What

    def to_json(self) -> dict[str, Any]:
        return {"label": self.label, "cap": self.what.cap, "path": list(self.what.path)}


def find_place(text: str, node_dir: Path) -> InMount | OnGrid:
    """Raises WhatError, PlaceError."""
    if text == "-" or text.startswith(("@", *CAP_PREFIXES)) or _ALIAS.match(text):
        what = resolve_what(text, node_dir)
        return OnGrid(what.label, what)
    mount = find_mount(text)
    if mount is None:
        raise PlaceError(f"{text}: neither in a tahoefs mount of yours nor alias:path")
    return InMount(text, mount)
