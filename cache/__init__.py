"""What a mounted tree looks like from the inside: its directories and files with all that is not on the grid yet.

This is the facade: whoever uses this package imports from here alone.

    async with open_disk(state_dir / "cache", limit_bytes) as disk:
        contents = await read_directory(client, cap, disk)
    async with open_workspace(client, root, state_dir=…, options=WorkspaceOptions(), disk=disk) as workspace:
        await workspace.load(workspace.root)
        contents = await workspace.new_contents()
        await contents.write(0, b"…")
        position, target = await workspace.store(workspace.root, "name", contents, {})
        await workspace.wait(position)
"""

from cache.contents import FileTooLargeError, WritableContents
from cache.directories import Directory, Entry, Target
from cache.disk_tier import DiskTier, open_disk
from cache.journal import JournalFullError
from cache.kept import kept_directory, read_directory
from cache.layers import Contents
from cache.opening import open_workspace
from cache.options import WorkspaceOptions
from cache.pending import PendingFile
from cache.pin_list import Pin
from cache.pin_store import PinsFullError
from cache.pins import Pins
from cache.spool import SpoolFullError
from cache.tree import Position
from cache.workspace import Workspace

__all__ = [
    "Contents",
    "Directory",
    "DiskTier",
    "Entry",
    "FileTooLargeError",
    "JournalFullError",
    "PendingFile",
    "Pin",
    "Pins",
    "PinsFullError",
    "Position",
    "SpoolFullError",
    "Target",
    "Workspace",
    "WorkspaceOptions",
    "WritableContents",
    "kept_directory",
    "open_disk",
    "open_workspace",
    "read_directory",
]
