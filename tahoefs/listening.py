"""The options of commands that make a node which listens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

_Function = TypeVar("_Function", bound=Callable[..., Any])


def port_options(function: _Function) -> _Function:
    """`--port ENDPOINT --location HINTS`, as `tahoe` takes them."""
    function = click.option(
        "--port",
        metavar="ENDPOINT",
        help="Where to listen, as tcp:3457 or tcp:3457:interface=127.0.0.1 (default: a port that is free now).",
    )(function)
    return click.option(
        "--location",
        metavar="HINTS",
        help="Where others reach it, as tcp:example.org:3457 (default: the interface, or this machine's address).",
    )(function)
