"""One conversation with the grid about one directory: its first publish, or a set of changes to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from attrs import frozen

from cache.directories import Change, Directory
from grid.errors import WrongKindError
from grid.formats.caps import Cap, DirectoryCap
from grid.formats.directory import DirEntry, update_metadata


@frozen
class Published:
    """What stands on the grid now."""

    cap: Cap
    version: bytes | None  # None when it was not told: the next look will
    entries: Mapping[str, DirEntry]
    foreign: frozenset[Change]  # those not done, as somebody else had changed the name


async def publish(client: Any, directory: Directory, batch: Sequence[Change]) -> Published:
    """Publish `batch`, all ready, at once. The caller holds the directory's grid lock. Raises GridError."""
    if directory.cap is None:
        return await _create(client, batch)
    outcomes: dict[Change, bool] = {}

    def applied(change: Change) -> Callable[[DirEntry | None], DirEntry | None]:
        def apply(old: DirEntry | None) -> DirEntry | None:
            new, outcomes[change] = change.apply(old)  # applied anew to each newer version; the last time counts
            return new

        return apply

    node = client.create_node_from_uri(directory.cap)
    contents = await node.modify({change.name: applied(change) for change in batch})
    foreign = frozenset(change for change in batch if not outcomes.get(change, False))
    return Published(directory.cap, contents.version, contents.entries, foreign)


async def _create(client: Any, batch: Sequence[Change]) -> Published:
    """A new directory, with all it has by now in its first version."""
    entries: dict[str, DirEntry] = {}
    for change in batch:
        if (cap := change.cap) is not None:
            entries[change.name] = DirEntry(change.name, cap, update_metadata(None, change.metadata, change.when))
    node = await client.create_dirnode({name: (entry.cap, entry.metadata) for name, entry in entries.items()})
    if not isinstance(node.cap, DirectoryCap):
        raise WrongKindError("the grid made something else than a directory")
    return Published(node.cap, None, entries, frozenset())
