"""Names for directory caps, kept in a node directory, and the arguments in which users use them.

    private/aliases       lines "NAME: CAP"; empty lines and lines starting with "#" do not count
    private/root_dir.cap  older form of the alias "tahoe": one cap

Source: Tahoe-LAFS 1.20's files and command line. Unlike it, a line that is no alias is skipped rather than
fatal, and "NAME:/path" means "NAME:path".
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from grid.atomic_file import replace_file
from grid.errors import BadCapError, NodeDirectoryError
from grid.formats.caps import parse_known_cap

DEFAULT_ALIAS: Final = "tahoe"
_ALIASES_BYTES_MAX: Final = 4 << 20
_CAP_PREFIXES: Final = ("URI:", "ro.URI:", "imm.URI:")


def load_aliases(node_path: Path) -> dict[str, str]:
    """Return {name: cap text}; empty when there are none. Raises NodeDirectoryError if a file cannot be read."""
    aliases: dict[str, str] = {}
    if root_cap := _read(node_path / "private" / "root_dir.cap").strip():
        aliases[DEFAULT_ALIAS] = root_cap
    for line in _read(node_path / "private" / "aliases").splitlines():
        stripped = line.strip()
        name, colon, cap_text = stripped.partition(":")
        if colon and not stripped.startswith("#"):
            aliases[name] = cap_text.strip()  # the last line of a name counts
    return aliases


def add_alias(node_path: Path, name: str, cap_text: str) -> None:
    """Append an alias; what is in the file already stays as it is, byte for byte.

    Raises NodeDirectoryError for a name that exists or cannot be one, BadCapError unless `cap_text` is a directory cap.
    """
    name = name.strip().removesuffix(":")
    if not name or name.startswith("#") or not name.isprintable() or any(c in ": /" or c.isspace() for c in name):
        raise NodeDirectoryError("an alias name has no colon, space or slash in it and does not start with '#'")
    if not parse_known_cap(cap_text.strip()).is_directory:
        raise BadCapError("an alias must name a directory, and this cap is not a directory cap")
    if name in load_aliases(node_path):
        raise NodeDirectoryError(f"the alias '{name}:' exists already; choose another name")
    path = node_path / "private" / "aliases"
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        present = path.read_bytes() if path.exists() else b""
        if present and not present.endswith(b"\n"):
            present += b"\n"
        replace_file(path, present + f"{name}: {cap_text.strip()}\n".encode())
    except OSError as error:
        raise NodeDirectoryError(f"cannot write {path}: {error.strerror}") from error


def resolve(argument: str, aliases: Mapping[str, str]) -> tuple[str, list[str]]:
    """Return (root cap text, NFC names to follow from there) for `ALIAS:`, `ALIAS:a/b`, a cap, or `CAP/a/b`.

    Without an alias the path hangs under `tahoe:`. Raises NodeDirectoryError for an unknown alias. The cap is
    not checked here.
    """
    argument = argument.strip()
    if argument.startswith(_CAP_PREFIXES):
        cap_text, old_separator, path = argument.partition(":./")  # the separator of old, when caps could hold a slash
        if not old_separator:
            cap_text, _, path = argument.partition("/")
        return cap_text, _names(path)
    name, colon, path = argument.partition(":")
    if not colon or "/" in name:  # "a/b:c" is a path with a colon in it
        name, path = DEFAULT_ALIAS, argument
    if name not in aliases:
        raise NodeDirectoryError(
            f"there is no alias '{name}:'; see 'tahoefs list-aliases', "
            f"make one with 'tahoefs create-alias {name}' or 'tahoefs add-alias {name} CAP'"
        )
    return aliases[name], _names(path)


def _names(path: str) -> list[str]:
    return [unicodedata.normalize("NFC", name) for name in path.split("/") if name]


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            contents = file.read(_ALIASES_BYTES_MAX + 1)
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise NodeDirectoryError(f"cannot read {path}: {error.strerror}") from error
    if len(contents) > _ALIASES_BYTES_MAX:
        raise NodeDirectoryError(f"{path} is larger than {_ALIASES_BYTES_MAX} bytes; is it an alias file?")
    try:
        return contents.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise NodeDirectoryError(f"{path} is not UTF-8 text") from error
