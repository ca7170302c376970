"""Caps as JSON values, for the journal: their text, or both texts of one this program does not know."""

from __future__ import annotations

from typing import Any

from grid.errors import FormatError
from grid.formats.caps import Cap, UnknownCap, parse_known_cap


def cap_to_json(cap: Cap) -> Any:
    return {"rw": cap.rw, "ro": cap.ro} if isinstance(cap, UnknownCap) else cap.to_string()


def cap_from_json(value: Any) -> Cap:
    """Raises FormatError (BadCapError)."""
    if isinstance(value, str):
        return parse_known_cap(value)
    if isinstance(value, dict):
        rw, ro = value.get("rw"), value.get("ro")
        if all(text is None or isinstance(text, str) for text in (rw, ro)):
            return UnknownCap(rw, ro, None)
    raise FormatError("this is no cap")
