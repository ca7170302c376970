"""Reading the decoded trees of the Foolscap vectors.

['#N', opentype, children...]   a sequence, its OPEN numbered N      'b:text' 'bytes:hex' 'float:…' 'int:…'
['INT', n] and the like         a bare token
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any

from attrs import frozen

from grid.wire.banana import ABORT, CLOSE, FLOAT, OPEN, STRING, TokenReader
from grid.wire.failures import Copyable
from grid.wire.references import Referenceable, RemoteHandle

ABORTED = "<ABORT>"


@frozen
class Theirs:
    """A my-reference as the tree tells it; compare with `shape` of what was decoded."""

    clid: int


@frozen
class Mine:
    """A your-reference."""

    clid: int


def is_sequence(tree: Any) -> bool:
    return isinstance(tree, list) and bool(tree) and isinstance(tree[0], str) and tree[0].startswith("#")


def number(tree: list[Any]) -> int:
    return int(tree[0][1:])


def opens_in(tree: Any) -> int:
    return 1 + sum(opens_in(child) for child in tree[1:]) if is_sequence(tree) else 0


def mentions(tree: Any, text: str) -> bool:
    return tree == text or (isinstance(tree, list) and any(mentions(child, text) for child in tree))


def is_cut(tree: Any) -> bool:
    """Whether the tree shows only the beginning of some long string."""
    if isinstance(tree, list):
        return any(is_cut(child) for child in tree)
    return isinstance(tree, str) and re.search(r"\.\.\.\(\d+ bytes\)$", tree) is not None


def value_of(tree: Any, seen: dict[int, Any] | None = None) -> Any:
    """The Python value a tree shows. References become Theirs and Mine."""
    seen = {} if seen is None else seen
    if isinstance(tree, int):
        return tree
    if isinstance(tree, str):
        kind, _, text = tree.partition(":")
        convert = {"b": str.encode, "bytes": bytes.fromhex, "float": float, "int": int}[kind]
        return convert(text)
    if not is_sequence(tree):
        return value_of(tree[1])
    opentype, children = tree[1].removeprefix("b:"), tree[2:]
    if opentype == "reference":
        return seen[children[0]]
    if opentype == "list":
        result: list[Any] = []
        seen[number(tree)] = result
        result += [value_of(child, seen) for child in children]
        return result
    items = [value_of(child, seen) for child in children]
    value = _BUILDERS[opentype](items)
    seen[number(tree)] = value
    return value


_BUILDERS: dict[str, Any] = {
    "none": lambda items: None,
    "boolean": lambda items: bool(items[0]),
    "unicode": lambda items: items[0].decode(),
    "decimal": lambda items: Decimal(items[0].decode()),
    "tuple": tuple,
    "set": set,
    "immutable-set": frozenset,
    "dict": lambda items: dict(zip(items[::2], items[1::2], strict=True)),
    "copyable": lambda items: Copyable(items[0], dict(zip(items[1::2], items[2::2], strict=True))),
    "my-reference": lambda items: Theirs(items[0]),
    "your-reference": lambda items: Mine(items[0]),
}


def shape(value: Any, clid_of_mine: Any = None) -> Any:
    """A decoded value with its live references replaced, for comparison with value_of()."""
    if isinstance(value, RemoteHandle):
        return Theirs(value.clid)
    if isinstance(value, Referenceable):
        return Mine(clid_of_mine(value))
    if isinstance(value, list | tuple):
        return type(value)(shape(item, clid_of_mine) for item in value)
    if isinstance(value, dict):
        return {key: shape(item, clid_of_mine) for key, item in value.items()}
    if isinstance(value, Copyable):
        return Copyable(value.type_name, shape(value.attributes, clid_of_mine))
    return value


def decode_trees(data: bytes, vocabulary: tuple[bytes, ...]) -> list[Any]:
    """Nested lists [open number, children...] of whatever tokens stand in `data`: a second, naive reader."""
    reader = TokenReader(vocabulary)
    reader.receive_data(data)
    stack: list[list[Any]] = [[]]
    while (token := reader.next_token()) is not None:
        kind, value = token
        if kind == OPEN:
            stack.append([f"#{value}"])
        elif kind == CLOSE:
            done = stack.pop()
            assert done[0] == f"#{value}"
            stack[-1].append(done)
        elif kind == ABORT:
            stack[-1].append(ABORTED)
        elif kind in (STRING, FLOAT):
            stack[-1].append(value)
        else:
            stack[-1].append(value)
    assert len(stack) == 1
    return stack[0]
