"""What a mounted tree looks like from the inside: its directories and files with all that is not on the grid yet.

This is the facade: whoever uses this package imports from here alone.

    async with open_workspace(client, root, state_dir=…, options=WorkspaceOptions()) as workspace:
        await workspace.load(workspace.root)
        contents = await workspace.new_contents()
        await contents.write(0, b"…")
        position, target = await workspace.store(workspace.root, "name", contents, {})
        await workspace.wait(position)
"""

from cache.contents import FileTooLargeError, WritableContents
from cache.directories import Directory, Entry, Target
from cache.journal import JournalFullError
from cache.layers import Contents
from cache.options import WorkspaceOptions
from cache.pending import PendingFile
from cache.spool import SpoolFullError
from cache.workspace import Position, Workspace, open_workspace

__all__ = [
    "Contents",
    "Directory",
    "Entry",
    "FileTooLargeError",
    "JournalFullError",
    "PendingFile",
    "Position",
    "SpoolFullError",
    "Target",
    "Workspace",
    "WorkspaceOptions",
    "WritableContents",
    "open_workspace",
]
