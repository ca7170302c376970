"""Errors as they cross the wire: a copyable with exactly four attributes. Does no I/O.

    value      bytes, at most 1000     str() of the exception
    type       bytes, at most 200      dotted class name
    traceback  bytes, at most 2000     we never tell ours
    parents    list of bytes, each at most 200: dotted names of the class and its bases

A real caller drops the connection when one is missing, and sees a violation instead of the error when one is
too long or there is a fifth: so lengths are those of the encoded text.
Source: foolscap 24.9's failures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from attrs import field, frozen

from grid.errors import GridError, RemoteFailure, RemoteProtocolError, Violation

FAILURE_TYPE: Final = b"twisted.python.failure.Failure"
UPLOAD_RESULTS_TYPE: Final = b"allmydata.upload.UploadResults.tahoe.allmydata.com"
KNOWN_COPYABLES: Final = frozenset((FAILURE_TYPE, UPLOAD_RESULTS_TYPE))

VALUE_BYTES_MAX: Final = 1000
TYPE_BYTES_MAX: Final = 200
TRACEBACK_BYTES_MAX: Final = 2000
PARENTS_MAX: Final = 50  # ours
REASON_CHARACTERS_MAX: Final = 200  # ours: of what else a peer says

VIOLATION_TYPE: Final = "foolscap.tokens.Violation"
_NO_TRACEBACK: Final = b"Traceback unavailable\n"
_LIMITS: Final = {b"value": VALUE_BYTES_MAX, b"type": TYPE_BYTES_MAX, b"traceback": TRACEBACK_BYTES_MAX}


@frozen
class Copyable:
    """A value passed by copy: its type name, and its attributes as they came."""

    type_name: bytes
    attributes: dict[bytes, Any] = field(repr=False)


def failure_to_send(error: Exception) -> Copyable:
    """What tells `error` to a peer.

    Text goes out only for errors that were raised on purpose: another exception's may hold anything.
    """
    if isinstance(error, Violation):
        names = [VIOLATION_TYPE]
    elif isinstance(error, RemoteFailure):
        return _four(error.message, error.type_name, [error.type_name, *_names(Exception)])
    else:
        names = []
    names += _names(type(error))
    return _four(str(error) if isinstance(error, GridError | KeyError) else "", names[0], names)


def _names(kind: type) -> list[str]:
    return [f"{base.__module__}.{base.__qualname__}" for base in kind.__mro__]


def _four(value: str, type_name: str, parents: Sequence[str]) -> Copyable:
    attributes = {
        b"value": trim(value, VALUE_BYTES_MAX),
        b"type": trim(type_name, TYPE_BYTES_MAX),
        b"traceback": _NO_TRACEBACK,
        b"parents": [trim(name, TYPE_BYTES_MAX) for name in parents[:PARENTS_MAX]],
    }
    return Copyable(FAILURE_TYPE, attributes)


def trim(text: str, limit: int) -> bytes:
    """UTF-8 of at most `limit` bytes; cut text ends in two dots, between characters."""
    encoded = text.encode("utf-8", "replace")
    if len(encoded) <= limit:
        return encoded
    return encoded[: limit - 3].decode("utf-8", "ignore").encode() + b".."


def failure_of(attributes: dict[bytes, Any]) -> RemoteFailure:
    """What a peer told. Raises RemoteProtocolError or Violation where a foolscap peer would."""
    for name, limit in _LIMITS.items():
        if name not in attributes:
            raise RemoteProtocolError("error without all of its attributes")
        value = attributes[name]
        if not isinstance(value, bytes) or len(value) > limit:
            raise Violation("error with an attribute that is no byte string, or too long")
    if b"parents" not in attributes:
        raise RemoteProtocolError("error without all of its attributes")
    if len(attributes) != len(_LIMITS) + 1:
        raise Violation("error with an unknown attribute")
    parents = attributes[b"parents"]
    if not isinstance(parents, list) or not all(isinstance(p, bytes) and len(p) <= TYPE_BYTES_MAX for p in parents):
        raise Violation("error with parents that are no byte strings, or too long")
    return RemoteFailure(shown(attributes[b"type"], TYPE_BYTES_MAX), shown(attributes[b"value"], VALUE_BYTES_MAX))


def shown(text: bytes, characters_max: int = REASON_CHARACTERS_MAX) -> str:
    """A peer's text, fit for a log: no line breaks, nothing a terminal would act on."""
    return "".join(c if c.isprintable() else "?" for c in text.decode("utf-8", "replace"))[:characters_max]
