"""Changes commands make on a grid where nothing is mounted: the same tree as behind a mount, for a moment.

What is to be sent is kept in a temporary directory; the command ends when all of it is on the grid, or fails.
"""

from __future__ import annotations

import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import trio

import grid
from cache import WorkspaceOptions, open_workspace
from tahoefs.link_requests import LinkRequests, refusals
from tahoefs.mount_control import SYNC_STALL_S, telling
from tahoefs.options import MountOptions
from tahoefs.places import OnGrid, PlaceError
from tahoefs.progress import Progress
from tahoefs.vfs import VFS

Work = Callable[[LinkRequests], Awaitable[None]]


def change(node_dir: Path, place: OnGrid, work: Work) -> None:
    """Do `work` on the tree that `place` is in; return when it is on the grid. Raises GridError, LinkingError."""
    if place.what.local is not None:
        raise PlaceError(f"{place.label}: mount it, and name a path in the mount")
    trio.run(_change, node_dir, place, work)


async def _change(node_dir: Path, place: OnGrid, work: Work) -> None:
    node = grid.NodeDirectory.open(node_dir)
    options = WorkspaceOptions(nickname=node.nickname, cache_bytes=0)
    with tempfile.TemporaryDirectory(prefix="tahoefs-") as state, Progress("sending") as progress:

        async def tell(pending: dict[str, Any]) -> None:
            progress.pending(pending)

        async with grid.join_grid(node) as client:
            await client.need_servers(node.encoding[1])
            with refusals(place.label):
                root = grid.parse_known_cap(place.what.cap)
                async with open_workspace(client, root, state_dir=Path(state), options=options) as workspace:
                    await work(LinkRequests(VFS(workspace, options=MountOptions())))
                    async with telling(workspace, tell):
                        await workspace.wait(stall_s=SYNC_STALL_S)
