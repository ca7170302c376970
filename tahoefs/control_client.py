"""Talks to a mount's daemon: one JSON object a line over a Unix socket, blocking, without trio or the grid.

Request:   {"command": "status" | "sync" | "detach", …}, see `mount_control.py`
Answers:   any number of {"progress": {…}}, then one {"result": …} or {"error": text, "exit_code": n}.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

LINE_BYTES_MAX: Final = 16 << 20


class ControlError(Exception):
    """The daemon answered with an error, or did not answer. `exit_code` is what the command should end with."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@contextlib.contextmanager
def _short_path(path: Path) -> Any:
    """The socket's path by way of its directory's descriptor: paths over 107 bytes do not fit an address."""
    descriptor = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{descriptor}/{path.name}"
    finally:
        os.close(descriptor)


def ask(
    path: Path,
    request: dict[str, Any],
    *,
    timeout_s: float | None,
    progress: Callable[[dict[str, Any]], None] = lambda _: None,
) -> Any:
    """Send one request and return its result. `timeout_s` bounds the silence between two answers."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(timeout_s)
        try:
            with _short_path(path) as short:
                connection.connect(short)
            connection.sendall(json.dumps(request).encode() + b"\n")
            with connection.makefile("rb") as lines:
                while line := lines.readline(LINE_BYTES_MAX):
                    answer = json.loads(line)
                    if "progress" in answer:
                        progress(answer["progress"])
                    elif "error" in answer:
                        raise ControlError(answer["error"], answer.get("exit_code", 1))
                    else:
                        return answer["result"]
        except TimeoutError:
            raise ControlError(f"the mount's daemon did not answer within {timeout_s:g} s") from None
        except ConnectionRefusedError:
            raise ControlError("the mount's daemon is gone: mount again") from None
        except (OSError, ValueError) as error:
            raise ControlError(f"cannot talk to the mount's daemon: {error}") from None
    raise ControlError("the mount's daemon ended before it answered")
