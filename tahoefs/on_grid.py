"""For commands that look at the grid themselves: join it, wait for its servers, find WHAT on it.

    async with on_grid(what, node_dir) as found:
        found.client, found.cap, found.label

A check is as true as the number of servers that are asked, so once there are enough for work, those that are known and
still missing are given ALL_SERVERS_TIMEOUT_S more.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Final

import trio
from attrs import field, frozen

import grid
from tahoefs import local_grid
from tahoefs.cli import UserError, warn
from tahoefs.what import What, WhatError, resolve_what

SERVERS_TIMEOUT_S: Final = 30.0  # for as many as an upload needs; it goes on with fewer, if they are enough to read
ALL_SERVERS_TIMEOUT_S: Final = 5.0
FIND_TIMEOUT_S: Final = 60.0  # for each step of a path


@frozen
class Found:
    """What WHAT names, on a grid that is joined."""

    client: grid.GridClient
    cap: grid.Cap = field(repr=False)
    label: str  # fit to be shown


def missing_servers(client: grid.GridClient) -> int:
    """Servers known, and not connected now."""
    return sum(not server.connected for server in client.broker.get_known_servers())


def look_up(what: str, node_dir: Path) -> What:
    """WHAT as texts; no network. Warnings are shown. Raises UserError."""
    try:
        target = resolve_what(what, node_dir)
    except WhatError as error:
        raise UserError(str(error), 2) from None
    for warning in target.warnings:
        warn(warning)
    return target


def node_directory_of(target: What, node_dir: Path) -> Path:
    """An embedded grid has its own."""
    return node_dir if target.local is None else local_grid.client_directory(target.local)


@asynccontextmanager
async def joined(
    node_dir: Path, local: Path | None = None, *, need_servers: bool = True
) -> AsyncIterator[grid.GridClient]:
    """The grid of a node directory, or the embedded one of `local`. Raises GridUnreachableError."""
    from tahoefs import local_grid

    async with AsyncExitStack() as stack:
        if local is not None:
            await stack.enter_async_context(local_grid.attached(local))
        node = grid.NodeDirectory.open(node_dir)
        client = await stack.enter_async_context(grid.join_grid(node))
        if need_servers:
            await client.broker.wait_for_servers(node.encoding.happy, SERVERS_TIMEOUT_S)
            await client.need_servers(node.encoding.k, 0)
            await client.broker.wait_for_servers(len(client.broker.get_known_servers()), ALL_SERVERS_TIMEOUT_S)
        yield client


@asynccontextmanager
async def on_grid(what: str, node_dir: Path) -> AsyncIterator[Found]:
    """Raises UserError, BadCapError, GridUnreachableError, NoSuchChildError, WrongKindError."""
    target = look_up(what, node_dir)
    needs_servers = grid.parse_known_cap(target.cap).storage_index is not None
    async with joined(node_directory_of(target, node_dir), target.local, need_servers=needs_servers) as client:
        yield Found(client, await find(client, target), target.label)


async def find(client: grid.GridClient, target: What) -> grid.Cap:
    """The cap at the end of the path. Raises BadCapError, NoSuchChildError, WrongKindError."""
    cap: grid.Cap = grid.parse_known_cap(target.cap)
    for part in target.path:
        node = client.create_node_from_uri(cap)
        if not cap.is_directory or not hasattr(node, "get"):
            raise grid.WrongKindError(f"{target.label}: a part of the path is not a directory that can be read")
        with trio.fail_after(FIND_TIMEOUT_S):
            cap = (await node.get(part)).cap
    return cap
