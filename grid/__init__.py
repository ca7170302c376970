"""The grid as a library: join one, and read and write its files and directories.

    import grid

    node = grid.NodeDirectory.open("~/.tahoe")
    async with grid.join_grid(node) as client:
        await client.broker.wait_for_servers(node.encoding.happy, timeout_s=30)
        results = await client.upload(grid.FileUploadable("notes.txt", convergence=node.convergence))

Others import from here. Each name is loaded when it is first used, so that `import grid` costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from grid.client import GridClient, join_grid
    from grid.errors import (
        BadCapError,
        ChildExistsError,
        ConnectionLostError,
        CorruptShareError,
        FormatError,
        GridError,
        GridUnreachableError,
        InconsistentEncodingError,
        NodeDirectoryError,
        NoSpaceError,
        NoSuchChildError,
        NotEnoughServersError,
        NotEnoughSharesError,
        NotWriteableError,
        PeerError,
        PeerTimeoutError,
        RemoteFailure,
        ShareError,
        UncoordinatedWriteError,
        WrongKindError,
    )
    from grid.formats.caps import Cap, DirectoryCap, LiteralCap, UnknownCap, parse_cap, parse_known_cap
    from grid.formats.directory import DirEntry, normalize_name
    from grid.measure import ping, speed_test
    from grid.node_directory import NodeDirectory, create_client_directory
    from grid.operations.changes import Changes
    from grid.operations.upload import DataUploadable, FileUploadable, Uploader, UploadResults, chk_cap_of

_HOMES: Final = {
    "grid.client": "GridClient join_grid",
    "grid.errors": (
        "BadCapError ChildExistsError ConnectionLostError CorruptShareError FormatError GridError "
        "GridUnreachableError InconsistentEncodingError NoSpaceError NoSuchChildError NodeDirectoryError "
        "NotEnoughServersError NotEnoughSharesError NotWriteableError PeerError PeerTimeoutError "
        "RemoteFailure ShareError UncoordinatedWriteError WrongKindError"
    ),
    "grid.formats.caps": "Cap DirectoryCap LiteralCap UnknownCap parse_cap parse_known_cap",
    "grid.formats.directory": "DirEntry normalize_name",
    "grid.measure": "ping speed_test",
    "grid.node_directory": "NodeDirectory create_client_directory",
    "grid.operations.changes": "Changes",
    "grid.operations.upload": "DataUploadable FileUploadable UploadResults Uploader chk_cap_of",
}
_HOME_OF: Final = {name: module for module, names in _HOMES.items() for name in names.split()}

__all__ = [
    "BadCapError",
    "Cap",
    "Changes",
    "ChildExistsError",
    "ConnectionLostError",
    "CorruptShareError",
    "DataUploadable",
    "DirEntry",
    "DirectoryCap",
    "FileUploadable",
    "FormatError",
    "GridClient",
    "GridError",
    "GridUnreachableError",
    "InconsistentEncodingError",
    "LiteralCap",
    "NoSpaceError",
    "NoSuchChildError",
    "NodeDirectory",
    "NodeDirectoryError",
    "NotEnoughServersError",
    "NotEnoughSharesError",
    "NotWriteableError",
    "PeerError",
    "PeerTimeoutError",
    "RemoteFailure",
    "ShareError",
    "UncoordinatedWriteError",
    "UnknownCap",
    "UploadResults",
    "Uploader",
    "WrongKindError",
    "chk_cap_of",
    "create_client_directory",
    "join_grid",
    "normalize_name",
    "parse_cap",
    "parse_known_cap",
    "ping",
    "speed_test",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'grid' has no attribute {name!r}")
    value = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value  # found at once from now on
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
