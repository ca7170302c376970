"""Schemas: what a remote method accepts and answers. Does no I/O.

A schema is checked on a value that arrived whole; its size was bounded before, token by token, by the limits
of the reader. `check` raises Violation with the path to the offending part, never with its contents.
Source: the constraints of foolscap 24.9, as Tahoe-LAFS 1.20's remote interfaces use them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from attrs import field, frozen

from grid.errors import Violation
from grid.wire.banana import Pieces
from grid.wire.references import RemoteHandle


class Schema(Protocol):
    def check(self, value: Any, where: str) -> None:
        """Raise Violation unless `value` is acceptable."""


@frozen
class AnySchema:
    def check(self, value: Any, where: str) -> None:
        """Everything the wire can carry is accepted."""


@frozen
class Bytes:
    """Byte strings of at most `most` bytes, or of exactly `exactly`.

    An argument with `in_pieces` is taken as it came: a long one perhaps as `Pieces`.
    """

    most: int | None = None
    exactly: int | None = None
    in_pieces: bool = False

    def check(self, value: Any, where: str) -> None:
        if not isinstance(value, bytes) and not (self.in_pieces and type(value) is Pieces):
            raise Violation(f"{where}: byte string expected, not {type(value).__name__}")
        if self.most is not None and len(value) > self.most:
            raise Violation(f"{where}: string too long ({len(value)} > {self.most})")
        if self.exactly is not None and len(value) != self.exactly:
            raise Violation(f"{where}: string of {len(value)} bytes, {self.exactly} expected")


@frozen
class Integer:
    """Integers of at most `most_bytes` bytes of magnitude; a bool is none."""

    most_bytes: int = 1024

    def check(self, value: Any, where: str) -> None:
        if type(value) is not int:
            raise Violation(f"{where}: integer expected, not {type(value).__name__}")
        if value.bit_length() > 8 * self.most_bytes:
            raise Violation(f"{where}: integer over {self.most_bytes} bytes")


@frozen
class Between:
    """Integers from `least` to `most`."""

    least: int
    most: int

    def check(self, value: Any, where: str) -> None:
        if type(value) is not int or not self.least <= value <= self.most:
            raise Violation(f"{where}: integer from {self.least} to {self.most} expected")


@frozen
class Exactly:
    """Values of one Python type: text, bool, float, None."""

    kind: type

    def check(self, value: Any, where: str) -> None:
        if type(value) is not self.kind:
            raise Violation(f"{where}: {self.kind.__name__} expected, not {type(value).__name__}")


@frozen
class OneOf:
    choices: tuple[Schema, ...]

    def check(self, value: Any, where: str) -> None:
        for choice in self.choices:
            try:
                return choice.check(value, where)
            except Violation:
                continue
        raise Violation(f"{where}: {type(value).__name__} is none of what is accepted")


@frozen
class ListOf:
    item: Schema

    def check(self, value: Any, where: str) -> None:
        if not isinstance(value, list):
            raise Violation(f"{where}: list expected, not {type(value).__name__}")
        for item in value:
            self.item.check(item, f"{where}[]")


@frozen
class TupleOf:
    items: tuple[Schema, ...]

    def check(self, value: Any, where: str) -> None:
        if not isinstance(value, tuple) or len(value) != len(self.items):
            raise Violation(f"{where}: tuple of {len(self.items)} expected")
        for number, (schema, item) in enumerate(zip(self.items, value, strict=True)):
            schema.check(item, f"{where}[{number}]")


@frozen
class SetOf:
    """Sets; an immutable-set is taken too, as we have no reason to refuse it."""

    item: Schema
    most: int | None = None

    def check(self, value: Any, where: str) -> None:
        if not isinstance(value, set | frozenset):
            raise Violation(f"{where}: set expected, not {type(value).__name__}")
        if self.most is not None and len(value) > self.most:
            raise Violation(f"{where}: more than {self.most} items")
        for item in value:
            self.item.check(item, f"{where}{{}}")


@frozen
class DictOf:
    key: Schema
    value: Schema
    most: int | None = None

    def check(self, value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise Violation(f"{where}: dict expected, not {type(value).__name__}")
        if self.most is not None and len(value) > self.most:
            raise Violation(f"{where}: more than {self.most} items")
        for key, item in value.items():
            self.key.check(key, f"{where}{{}}")
            self.value.check(item, f"{where}{{}}")


@frozen
class Reference:
    """A reference to the sender's object, of the interface named exactly so (any, when None)."""

    interface_name: str | None = None

    def check(self, value: Any, where: str) -> None:
        if not isinstance(value, RemoteHandle):
            raise Violation(f"{where}: reference expected, not {type(value).__name__}")
        if self.interface_name is not None and value.interface_name != self.interface_name:
            raise Violation(f"{where}: reference to {self.interface_name} expected")


ANY = AnySchema()
INT = Integer()
OFFSET = Integer(most_bytes=8)
BOOL = Exactly(bool)
FLOAT = Exactly(float)
TEXT = Exactly(str)
NONE = Exactly(type(None))


@frozen
class Method:
    """Arguments in their order, all of them required, and the result."""

    arguments: tuple[tuple[str, Schema], ...]
    result: Schema = NONE

    def bind(self, positional: Sequence[Any], keywords: Mapping[str, Any]) -> tuple[Any, ...]:
        """The arguments in order, checked. Raises Violation."""
        if len(positional) > len(self.arguments):
            raise Violation("too many positional arguments")
        bound = list(positional)
        for name, _ in self.arguments[len(positional) :]:
            if name not in keywords:
                raise Violation(f"missing required argument '{name}'")
            bound.append(keywords[name])
        if len(bound) != len(positional) + len(keywords):
            raise Violation("unknown or repeated argument")
        for place, (name, schema) in enumerate(self.arguments):
            if type(bound[place]) is Pieces and not (isinstance(schema, Bytes) and schema.in_pieces):
                bound[place] = bytes(bound[place])
            schema.check(bound[place], name)
        return tuple(bound)


@frozen
class RemoteInterface:
    """One RI…: the name it has on the wire, and its methods."""

    name: str
    methods: Mapping[str, Method] = field(factory=dict, repr=False)


def method(result: Schema = NONE, /, **arguments: Schema) -> Method:
    """Keyword arguments keep their order: `method(NONE, offset=OFFSET, data=Bytes())`."""
    return Method(tuple(arguments.items()), result)
