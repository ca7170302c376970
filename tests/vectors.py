"""Golden vectors made by running Tahoe-LAFS 1.20 and Foolscap: `tests/vectors/*.json` and `*.bin`.

Byte values are hex unless a field says otherwise. Large inputs are recipes ({"gen", "seed", "length"}), point into a
.bin file ({"file", "offset", "length"}), or are {"hex"}; `expand` turns any of these into bytes. Whatever is asked for
and not there, or empty, is an error: a test that quietly runs over no vectors proves nothing.
"""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

DIRECTORY = Path(__file__).parent / "vectors"


class MissingVectorsError(AssertionError):
    """Vectors a test counts on are not there."""


@cache
def load(file_name: str) -> dict[str, Any]:
    """The whole of one JSON file. Shared between tests: do not change it."""
    path = DIRECTORY / file_name
    if not path.is_file():
        raise MissingVectorsError(f"no vector file {file_name}")
    content = json.loads(path.read_text(encoding="utf-8"))
    if not content:
        raise MissingVectorsError(f"{file_name} is empty")
    return content


def section(file_name: str, dotted_path: str, **wanted: Any) -> Any:
    """What stands at `dotted_path`; of a list, only the items whose fields equal `wanted`. Never empty.

    section("formats.json", "caps.caps", kind="CHKFileURI") is a list of one dict.
    """
    found: Any = load(file_name)
    for name in dotted_path.split("."):
        if not isinstance(found, dict) or name not in found:
            raise MissingVectorsError(f"{file_name} has no {dotted_path}")
        found = found[name]
    if wanted:
        found = [item for item in found if all(item.get(key) == value for key, value in wanted.items())]
    if found in ([], {}, "", None):
        raise MissingVectorsError(f"{dotted_path} of {file_name} is empty {wanted or ''}")
    return found


def expand(value: Any) -> bytes:
    """Bytes of a hex string, a recipe, or a pointer into a .bin file."""
    if isinstance(value, str):
        return bytes.fromhex(value)
    if "hex" in value:
        return bytes.fromhex(value["hex"])
    if "gen" in value:
        return _sha256_counter(value["gen"], value["seed"], value["length"])
    return blob(value)


def blob(pointer: dict[str, Any]) -> bytes:
    """The bytes a {"file", "offset", "length"} object points at."""
    data = _read(pointer["file"])[pointer["offset"] : pointer["offset"] + pointer["length"]]
    if len(data) != pointer["length"]:
        raise MissingVectorsError(f"{pointer['file']} is too short")
    return data


def name_of(vector: Any) -> str | None:
    """For parametrize(ids=...): the vector's own name, where it has one."""
    if isinstance(vector, dict):
        name = vector.get("name") or vector.get("what") or vector.get("case")
        return name if isinstance(name, str) else None
    return None


@cache
def _read(file_name: str) -> bytes:
    return (DIRECTORY / file_name).read_bytes()


@cache
def _sha256_counter(generator: str, seed: str, length: int) -> bytes:
    if generator != "sha256ctr":
        raise MissingVectorsError(f"unknown recipe {generator}")
    blocks = (hashlib.sha256(f"{seed}:{i}".encode("ascii")).digest() for i in range(-(-length // 32)))
    return b"".join(blocks)[:length]
