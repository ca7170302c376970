"""[storage] in tahoe.cfg: what a storage server offers, keeps free and lets go.

Sizes, durations and dates are written as Tahoe-LAFS 1.20 reads them; a value that is not one is an error that names its
key. Source: Tahoe-LAFS 1.20's configuration.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal

from attrs import field, frozen

from grid.atomic_file import replace_file
from grid.crypto import SigningKey, TubIdentity
from grid.errors import FormatError, NodeDirectoryError
from grid.formats import base32
from grid.node_files import Config, read_text

CERTIFICATES_MAX: Final = 32
_DAY_S: Final = 24 * 3600
_DURATION_UNITS: Final = {"day": _DAY_S, "mo": 31 * _DAY_S, "month": 31 * _DAY_S, "year": 365 * _DAY_S}
_SIZE_POWERS: Final = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4, "P": 5, "E": 6}


@frozen
class Expiry:
    """[storage] expire.*"""

    enabled: bool = False
    mode: Literal["age", "cutoff-date"] = "age"
    override_lease_duration_s: int | None = None
    cutoff: int | None = None  # POSIX seconds
    kinds: frozenset[str] = frozenset(("immutable", "mutable"))


@frozen
class StorageSettings:
    """[storage]"""

    directory: Path
    reserved_space: int  # bytes
    readonly: bool
    http: bool  # beside Foolscap
    expiry: Expiry
    permutation_seed: str = field(repr=False)  # as it is announced
    certificates: tuple[Mapping[str, str], ...] = field(repr=False)  # of grid managers, as they are announced
    swissnum: str = field(repr=False)


def read_storage_settings(
    config: Config, path: Path, identity: TubIdentity, key: SigningKey, swissnum: str
) -> StorageSettings:
    """Of the node directory `path`. Raises NodeDirectoryError."""
    if not config.boolean("storage", "anonymous", True):
        raise config.wrong("storage", "anonymous", "is false: only plugins would serve, and tahoefs has none")
    if _flag(config, "debug_discard", False):
        raise config.wrong("storage", "debug_discard", "is true: tahoefs throws nothing away")
    directory = path / (config.text("storage", "storage_dir", "storage").strip() or "storage")
    return StorageSettings(
        directory=directory,
        reserved_space=read_reserved_space(config),
        readonly=_flag(config, "readonly", False),
        http=not _flag(config, "force_foolscap", False),
        expiry=_expiry(config),
        permutation_seed=_permutation_seed(path / "permutation-seed", directory, identity, key),
        certificates=_certificates(config, path) if _flag(config, "grid_management", False) else (),
        swissnum=swissnum,
    )


def read_reserved_space(config: Config) -> int:
    """Bytes that must stay free on the disk."""
    try:
        return parse_size(config.text("storage", "reserved_space", "").strip() or "0")
    except NodeDirectoryError:
        raise config.wrong("storage", "reserved_space", "is not a size such as 10G") from None


def _flag(config: Config, key: str, default: bool) -> bool:
    """An empty value is no value."""
    return config.boolean("storage", key, default) if config.text("storage", key, "").strip() else default


def _permutation_seed(file: Path, storage: Path, identity: TubIdentity, key: SigningKey) -> str:
    """Once shares are there it must never change: readers look for them in the order that follows from it."""
    if text := (read_text(file) or "").strip():
        try:
            base32.a2b(text)
        except FormatError:
            raise NodeDirectoryError(f"{file} is damaged: its contents are not base32") from None
        return text
    # Shares from before there were seeds were placed by the tub id. Else: base32 of base32 text, as 1.20 has it.
    fresh = base32.b2a(base32.b2a(key.public_bytes).encode())
    text = identity.tub_id if _has_shares(storage) else fresh
    replace_file(file, f"{text}\n".encode(), mode=0o644)
    return text


def _has_shares(storage: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return any(prefix.name != "incoming" and any(prefix.iterdir()) for prefix in (storage / "shares").iterdir())
    return False


def _certificates(config: Config, path: Path) -> tuple[Mapping[str, str], ...]:
    """What [grid_manager_certificates] names, to be announced as it stands."""
    found: list[dict[str, str]] = []
    for name, file in list(config.items("grid_manager_certificates").items())[:CERTIFICATES_MAX]:
        text = read_text(path / file.strip())
        try:
            entry: Any = json.loads(text) if text is not None else None
        except (ValueError, RecursionError):
            entry = None
        if not isinstance(entry, dict) or not all(isinstance(entry.get(k), str) for k in ("certificate", "signature")):
            raise config.wrong("grid_manager_certificates", name, "does not name a certificate file")
        found.append({"certificate": entry["certificate"], "signature": entry["signature"]})
    return tuple(found)


def _expiry(config: Config) -> Expiry:
    if not _flag(config, "expire.enabled", False):
        return Expiry()
    mode = config.text("storage", "expire.mode", "").strip()
    if mode not in ("age", "cutoff-date"):
        raise config.wrong("storage", "expire.mode", "is neither 'age' nor 'cutoff-date'")
    kinds = [kind for kind in ("immutable", "mutable") if _flag(config, f"expire.{kind}", True)]
    override, cutoff = None, None
    if text := config.text("storage", "expire.override_lease_duration", "").strip():
        override = _duration_s(text)
        if override is None:
            raise config.wrong("storage", "expire.override_lease_duration", "is not a duration such as '60 days'")
    if mode == "cutoff-date":
        cutoff = _date(config.text("storage", "expire.cutoff_date", "").strip())
        if cutoff is None:
            raise config.wrong("storage", "expire.cutoff_date", "is not a date such as 2026-01-31")
    return Expiry(True, "age" if mode == "age" else "cutoff-date", override, cutoff, frozenset(kinds))


def _duration_s(text: str) -> int | None:
    match = re.fullmatch(r"([0-9]{1,9}) *(day|mo|month|year)s?", text)
    if match is None or text.endswith("mos"):
        return None
    return int(match[1]) * _DURATION_UNITS[match[2]]


def _date(text: str) -> int | None:
    """That midnight, UTC."""
    if not re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", text):
        return None
    try:
        return int(datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=UTC).timestamp())
    except ValueError:
        return None


def parse_size(text: str) -> int:
    """Bytes: an integer with K, M, G, T, P, E (of 1000) or Ki, Mi, … (of 1024), and a B. Raises NodeDirectoryError."""
    match = re.fullmatch(r"([0-9]{1,18})([KMGTPE]?)(I?)B?", text.strip().upper())
    if match is None or (match[3] and not match[2]):
        raise NodeDirectoryError(f"{text!r} is not a size such as 10G")
    unit: int = (1024 if match[3] else 1000) ** _SIZE_POWERS[match[2]]
    return int(match[1]) * unit
