"""WHAT to mount or look at: an alias, a file that holds a cap, standard input, or a cap itself.

    alias:            alias:sub/path          as in Tahoe's own command line
    @FILE             the cap is the first line of FILE
    -                 the cap is read from standard input
    URI:…             a literal cap; other users can see it in the process list
    local:DIR         the root of the embedded grid kept in DIR; made when it is first mounted

The cap is a secret: it lives in `What.cap`, which is kept out of repr and errors. `What.label` is what may be
shown: an alias name, a file name, never the cap.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final, TextIO

from attrs import field, frozen

CAP_CHARS_MAX: Final = 1 << 16  # a literal directory can be long; nothing real is longer
CAP_PREFIXES: Final = ("URI:", "ro.", "imm.")


class WhatError(Exception):
    """WHAT does not name anything; the text says what was understood and what to do."""


@frozen
class What:
    """A root cap, as text, and the path below it."""

    cap: str = field(repr=False)
    path: tuple[str, ...]
    label: str  # fit to be shown
    warnings: tuple[str, ...] = ()
    local: Path | None = None  # of an embedded grid; its cap is empty as long as it was never mounted


def resolve_what(text: str, node_dir: Path, *, stdin: TextIO | None = None, may_be_new: bool = False) -> What:
    """Resolve WHAT against a node directory's aliases. Raises WhatError, NodeDirectoryError.

    `may_be_new`: an embedded grid that was never mounted will do; it has no cap yet.
    """
    text = text.strip()
    if text.startswith("local:"):
        what = _from_local(text.removeprefix("local:"))
        if not what.cap and not may_be_new:
            raise WhatError(f"there is no grid in {what.local} yet: it is made when {what.label} is first mounted")
        return what
    if text == "-":
        return _from_cap(_first_line(stdin or sys.stdin, "standard input"), "(standard input)")
    if text.startswith("@"):
        try:
            with Path(text[1:]).open(encoding="utf-8") as file:
                return _from_cap(_first_line(file, text[1:]), text)
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not text"
            raise WhatError(f"cannot read a cap from {text[1:]}: {reason}") from None
    if text.startswith(CAP_PREFIXES):
        warning = "the cap was given on the command line, where other users can see it; prefer an alias, @FILE or -"
        what = _from_cap(text, "(cap)")
        return What(what.cap, what.path, what.label, (warning,))
    return _from_alias(text, node_dir)


def _from_alias(text: str, node_dir: Path) -> What:
    from grid.aliases import load_aliases

    name, colon, path = text.partition(":")
    if not colon or "/" in name:
        raise WhatError(f"{text!r} is not an alias (NAME: or NAME:path), @FILE, - or a cap")
    aliases = load_aliases(node_dir)
    if not node_dir.is_dir():
        raise WhatError(f"no node directory {node_dir}; name yours with --node-dir, or make one with create-client")
    if name not in aliases:
        known = ", ".join(f"{each}:" for each in sorted(aliases)) or "none yet"
        raise WhatError(f"no alias {name}: in {node_dir} (known: {known}); make one with create-alias or add-alias")
    root = _from_cap(aliases[name], f"{name}:")
    parts = _split(path)
    return What(root.cap, root.path + parts, f"{name}:{'/'.join(parts)}")


def _from_local(text: str) -> What:
    if not text:
        raise WhatError("local: needs a directory, as local:/home/me/grid")
    directory = Path(text).expanduser().absolute()
    try:
        cap = (directory / "root.cap").read_text(encoding="ascii").strip()
    except FileNotFoundError:
        cap = ""
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a cap"
        raise WhatError(f"cannot read {directory / 'root.cap'}: {reason}") from None
    return What(cap, (), f"local:{directory}", local=directory)


def _from_cap(text: str, label: str) -> What:
    cap, slash, path = text.strip().partition(":./" if ":./" in text else "/")
    if not cap:
        raise WhatError(f"there is no cap in {label}")
    return What(cap, _split(path) if slash else (), label)


def _split(path: str) -> tuple[str, ...]:
    return tuple(part for part in path.split("/") if part and part != ".")


def _first_line(file: TextIO, name: str) -> str:
    line = file.readline(CAP_CHARS_MAX)
    if not line.strip():
        raise WhatError(f"there is no cap in {name}")
    return line.strip()
