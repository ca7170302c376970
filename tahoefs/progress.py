"""A line of progress on a terminal, and nothing at all elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, Self

from attrs import define, field


def human_bytes(count: float) -> str:
    """Bytes with a binary unit and three digits: 17 B, 1.43 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1024
    raise AssertionError


@define
class Progress:
    """Files, bytes, rate and time left of what a mount still has to send; drawn in place on standard error."""

    verb: str
    _started: float = field(factory=time.monotonic)
    _first: int | None = None
    _drawn: bool = False

    def pending(self, state: dict[str, Any]) -> None:
        """Show one `pending` object of a mount's status: files, bytes, directories."""
        left = int(state.get("bytes", 0))
        if self._first is None:
            self._first = left
        if not sys.stderr.isatty() or not any(state.values()):
            return
        self._first = max(self._first, left)
        elapsed = time.monotonic() - self._started
        rate = (self._first - left) / elapsed if elapsed > 0 else 0.0
        done = 1 - left / self._first if self._first else 0.0
        bar = "#" * round(done * 20)
        text = f"{self.verb} [{bar:<20}] {state['files']} files, {human_bytes(left)} left"
        if rate > 0:
            text += f", {human_bytes(rate)}/s, {left / rate:.0f} s"
        sys.stderr.write(f"\r\x1b[K{text}")
        sys.stderr.flush()
        self._drawn = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self._drawn:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
