"""How much is left to send: in words, and as a line on a terminal (nothing at all elsewhere).

Imported by commands that must start fast: the standard library alone is used.
"""

from __future__ import annotations

import shutil
import sys
import time
from types import TracebackType
from typing import Any, Final, Self

BAR_CHARS: Final = 20
REDRAW_S: Final = 0.1  # objects are counted faster than anyone can read


def human_bytes(count: float) -> str:
    """Bytes with a binary unit and three digits: 17 B, 1.43 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1024
    raise AssertionError


def human_time(seconds: float) -> str:
    """17 s, 4:05 min, 3:20 h."""
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s"
    return f"{whole // 60}:{whole % 60:02} min" if whole < 6000 else f"{whole // 3600}:{whole // 60 % 60:02} h"


def human_age(seconds: float) -> str:
    """6 d, 5 h or 12 min."""
    for unit, size in (("d", 86400), ("h", 3600)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0) / 60:.0f} min"


def in_words(pending: dict[str, Any]) -> str:
    """A `pending` object of a mount's status: 3 files (1.5 MiB), 1 directory."""
    files, directories = int(pending["files"]), int(pending["directories"])
    parts = [f"{counted(files, 'file')} ({human_bytes(pending['bytes'])})"] if files else []
    parts += [f"{directories} director{'y' if directories == 1 else 'ies'}"] if directories else []
    return ", ".join(parts) or "nothing"


def counted(number: int, noun: str) -> str:
    """1 file, 2 files."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def pinned_in_words(pin: dict[str, Any]) -> str:
    """One of `pinned` of a mount's status: fetching, 3 of 12 files (1.5 MiB of 2 GiB)."""
    files, size = counted(pin["files"], "file"), human_bytes(pin["bytes"])
    text = f"complete, {files} ({size})"
    if pin["state"] != "complete":
        text = f"{pin['state']}, {pin['files_held']} of {files} ({human_bytes(pin['bytes_held'])} of {size})"
    return text if pin["message"] is None else f"{text}: {printable(pin['message'])}"


def printable(text: str) -> str:
    """A name may hold anything; a terminal must not be told what to do by it."""
    return "".join(character if character.isprintable() else "?" for character in text)


class Progress:
    """What a mount still has to send, or how many objects a command has done; drawn in place on standard error."""

    def __init__(self, verb: str) -> None:
        self.verb = verb
        self.last: dict[str, Any] | None = None  # what was last shown
        self._started = time.monotonic()
        self._most = 0
        self._drawn = False
        self._drawn_at = 0.0

    def pending(self, state: dict[str, Any]) -> None:
        """Show one `pending` object of a mount's status: files, bytes (that are left), directories."""
        self.last = state
        left = int(state["bytes"])
        self._most = max(self._most, left)
        if not sys.stderr.isatty() or not any(state.values()):
            return
        elapsed = time.monotonic() - self._started
        rate = (self._most - left) / elapsed if elapsed > 0 else 0.0
        done = 1 - left / self._most if self._most else 1.0
        text = f"{self.verb} [{'#' * round(done * BAR_CHARS):<{BAR_CHARS}}] {in_words(state)} left"
        if rate > 0 and left:
            text += f", {human_bytes(rate)}/s, {human_time(left / rate)}"
        self._draw(text)

    def pinned(self, pin: dict[str, Any]) -> None:
        """Show one of `pinned` of a mount's status."""
        if not sys.stderr.isatty():
            return
        done = pin["bytes_held"] / pin["bytes"] if pin["bytes"] else 0.0
        bar = f"[{'#' * round(done * BAR_CHARS):<{BAR_CHARS}}] " if pin["state"] == "fetching" else ""
        self._draw(f"{self.verb} {bar}{pinned_in_words(pin)}")

    def steps(self, state: dict[str, Any]) -> None:
        """Show that `done` of so many `names` are done."""
        if sys.stderr.isatty():
            self._draw(f"{self.verb} {state['done']} of {state['names']}")

    def objects(self, done: int, text: str) -> None:
        """Show how many objects are done; how many there are in all nobody knows."""
        now = time.monotonic()
        if sys.stderr.isatty() and now - self._drawn_at >= REDRAW_S:
            self._draw(f"{self.verb}: {counted(done, 'object')}, {done / (now - self._started):.0f}/s, {text}")

    def line(self, text: str) -> None:
        """A line of the command's own output."""
        self.clear()
        sys.stdout.write(f"{text}\n")

    def _draw(self, text: str) -> None:
        sys.stdout.flush()
        sys.stderr.write(f"\r\x1b[K{text[: shutil.get_terminal_size().columns - 1]}")
        sys.stderr.flush()
        self._drawn, self._drawn_at = True, time.monotonic()

    def clear(self) -> None:
        """Leave the line free for something else."""
        if self._drawn:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
            self._drawn = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.clear()
