"""Capabilities: texts that name a file or directory and grant the right to it.

    URI:CHK:key:UEB-hash:k:n:size         read one immutable file      URI:CHK-Verifier: with the storage index
    URI:LIT:data                          the file is in its cap
    URI:SSK:writekey:fingerprint          write one SDMF file          URI:SSK-RO:, URI:SSK-Verifier:
    URI:MDMF:writekey:fingerprint         write one MDMF file          URI:MDMF-RO:, URI:MDMF-Verifier:
    URI:DIR2…:                            the same rest: a directory kept in such a file

Keys and storage indexes are 16 bytes, hashes 32, in base32; numbers are decimal. `ro.` or `imm.` before a cap says
that it must not grant writing, or that nothing under it may ever change; a cap that breaks this, and whatever a later
version may invent, is an UnknownCap, which keeps its text. One newline at the end is tolerated, as are further fields
of MDMF caps and anything after a CHK-Verifier.

Source: Tahoe-LAFS 1.20's caps. Ours: numbers over 2^63-1 are malformed.
The values that texts are parsed to are in cap_kinds.py, and offered here too.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

from grid.errors import BadCapError, FormatError
from grid.formats.base32 import a2b
from grid.formats.cap_kinds import (
    IMM,
    Cap,
    CHKReadCap,
    CHKVerifyCap,
    DirectoryCap,
    FileCap,
    KnownCap,
    LiteralCap,
    MDMFReadCap,
    MDMFVerifyCap,
    MDMFWriteCap,
    ReadCap,
    SDMFReadCap,
    SDMFVerifyCap,
    SDMFWriteCap,
    UnknownCap,
    VerifyCap,
    WriteCap,
    directory_word,
)

__all__ = [
    "BAD_URI",
    "IMM",
    "MUST_BE_DEEP_IMMUTABLE",
    "MUST_BE_READONLY",
    "MUST_NOT_BE_UNKNOWN_RW",
    "RO",
    "CHKReadCap",
    "CHKVerifyCap",
    "Cap",
    "DirectoryCap",
    "FileCap",
    "KnownCap",
    "LiteralCap",
    "MDMFReadCap",
    "MDMFVerifyCap",
    "MDMFWriteCap",
    "ReadCap",
    "SDMFReadCap",
    "SDMFVerifyCap",
    "SDMFWriteCap",
    "UnknownCap",
    "VerifyCap",
    "WriteCap",
    "child_cap",
    "child_slots",
    "parse_cap",
    "parse_known_cap",
]

RO: Final = "ro."  # before a cap: it must not grant writing

# What is wrong with an UnknownCap, by 1.20's names for it. None: nothing that we know of.
BAD_URI: Final = "BadURI"
MUST_BE_READONLY: Final = "MustBeReadonly"
MUST_BE_DEEP_IMMUTABLE: Final = "MustBeDeepImmutable"
MUST_NOT_BE_UNKNOWN_RW: Final = "MustNotBeUnknownRW"

_NUMBER_MAX: Final = (1 << 63) - 1  # what an off_t holds
_NUMBER_DIGITS_MAX: Final = 19
_SHARES_MAX: Final = 256


# --- parsing ------------------------------------------------------------------------------------------------

_KEY = "([a-z2-7]{25}[aeimquy4])"  # 16 bytes: the last character's spare bits are zero
_HASH = "([a-z2-7]{51}[aq])"  # 32 bytes
_CHK = f"{_KEY}:{_HASH}:([0-9]+):([0-9]+):([0-9]+)"

# word after "URI:" -> (the rest, what it makes)
_FILE_KINDS: Final[dict[str, tuple[re.Pattern[str], Callable[..., FileCap]]]] = {
    "CHK": (re.compile(rf"{_CHK}\n?"), CHKReadCap),
    "CHK-Verifier": (re.compile(rf"{_CHK}.*", re.DOTALL), CHKVerifyCap),
    "LIT": (re.compile(r"([a-z2-7]*)\n?"), LiteralCap),
    "SSK": (re.compile(rf"{_KEY}:{_HASH}\n?"), SDMFWriteCap),
    "SSK-RO": (re.compile(rf"{_KEY}:{_HASH}\n?"), SDMFReadCap),
    "SSK-Verifier": (re.compile(rf"{_KEY}:{_HASH}\n?"), SDMFVerifyCap),
    "MDMF": (re.compile(rf"{_KEY}:{_HASH}(?::.*|\n)?", re.DOTALL), MDMFWriteCap),
    "MDMF-RO": (re.compile(rf"{_KEY}:{_HASH}(?::.*|\n)?", re.DOTALL), MDMFReadCap),
    "MDMF-Verifier": (re.compile(rf"{_KEY}:{_HASH}(?::.*|\n)?", re.DOTALL), MDMFVerifyCap),
}
_DIRECTORY_KINDS: Final = {directory_word(word): kind for word, kind in _FILE_KINDS.items()}

# 1.20's own test schemes, which it holds to the rules for write caps and for mutable ones.
_FUTURE_WRITEABLE: Final = "x-tahoe-future-test-writeable:"
_FUTURE_MUTABLE: Final = "x-tahoe-future-test-mutable:"


def _number(digits: str) -> int:
    significant = digits.lstrip("0")
    if len(significant) > _NUMBER_DIGITS_MAX or (number := int(significant or "0")) > _NUMBER_MAX:
        raise BadCapError("a number in the cap is too large")
    return number


def _parse_bare(text: str) -> KnownCap | None:
    """A cap without prefix; None when it is of no kind we know. Raises BadCapError when garbled."""
    scheme, _, tail = text.partition(":")
    word, colon, rest = tail.partition(":")
    kind = _FILE_KINDS.get(word) or _DIRECTORY_KINDS.get(word)
    if scheme != "URI" or not colon or kind is None:
        return None
    pattern, make = kind
    if (match := pattern.fullmatch(rest)) is None:
        raise BadCapError("garbled cap")
    binary, numbers = match.groups()[:2], match.groups()[2:]
    try:
        file = make(*map(a2b, binary), *map(_number, numbers))
    except FormatError as error:
        raise BadCapError(f"garbled cap: {error}") from None
    return file if word in _FILE_KINDS else DirectoryCap(file)


def _split_prefix(text: str) -> tuple[str, str]:
    for prefix in (RO, IMM):
        if text.startswith(prefix):
            return prefix, text[len(prefix) :]
    return "", text


def parse_cap(text: str | bytes, *, deep_immutable: bool = False) -> Cap:
    """Never fails: what is garbled, unknown, or breaks its prefix or context, is an UnknownCap.

    `deep_immutable`: it stands where nothing may ever change.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8", "surrogateescape")
    prefix, bare = _split_prefix(text)
    error = None
    try:
        cap = _parse_bare(bare)
    except BadCapError:
        cap, error = None, BAD_URI
    writes = bare.startswith(_FUTURE_WRITEABLE) if cap is None else not cap.is_readonly
    changes = writes or (bare.startswith(_FUTURE_MUTABLE) if cap is None else cap.is_mutable)
    if changes and (deep_immutable or prefix == IMM):
        error = MUST_BE_DEEP_IMMUTABLE
    elif writes and prefix == RO:
        error = MUST_BE_READONLY
    if cap is not None and error is None:
        return cap
    return UnknownCap(None, text, error) if prefix else UnknownCap(text or None, None, error)


def parse_known_cap(text: str | bytes) -> KnownCap:
    """For a cap that a user gives and that must be usable. Raises BadCapError."""
    cap = parse_cap(text)
    if isinstance(cap, UnknownCap):
        raise BadCapError(_COMPLAINTS.get(cap.error or "", "not a cap of a kind this program knows"))
    file = cap.file if isinstance(cap, DirectoryCap) else cap
    if isinstance(file, CHKReadCap | CHKVerifyCap) and not 1 <= file.k <= file.n <= _SHARES_MAX:
        raise BadCapError(f"the cap is for {file.k} of {file.n} shares, which cannot be")
    return cap


_COMPLAINTS: Final = {
    BAD_URI: "the cap is garbled: a part of it is missing or mistyped",
    MUST_BE_READONLY: "the cap grants writing, though it stands where only reading is allowed",
    MUST_BE_DEEP_IMMUTABLE: "the cap is of something that can change, where nothing may",
    MUST_NOT_BE_UNKNOWN_RW: "a cap of unknown kind cannot be stored without its read-only form",
}


# --- as children of directories -----------------------------------------------------------------------------


def child_cap(rw: str | None, ro: str | None, *, deep_immutable: bool) -> Cap:
    """What a pair of slots stands for. For known kinds rw counts if given, else ro; the other is ignored.

    An UnknownCap's texts come out with the prefixes their place asks for; one with `error` set must be skipped
    when found in a directory, and refused when to be stored. Verify caps are of no use as children: they are kept
    like unknown ones.
    """
    rw, ro = rw or None, ro or None
    deciding = rw or ro
    if deciding is None:
        return UnknownCap()
    cap = parse_cap(deciding, deep_immutable=deep_immutable)
    if not isinstance(cap, UnknownCap) and not cap.is_verifier:
        return cap
    error = None
    if rw is not None and ro is None:
        prefix, _ = _split_prefix(rw)
        if not prefix or (prefix == RO and deep_immutable):
            error = MUST_NOT_BE_UNKNOWN_RW
        else:  # it says itself that it grants no writing
            rw, ro = None, rw
    elif rw is not None and ro is not None and (deep_immutable or ro.startswith(IMM)):
        error = MUST_BE_DEEP_IMMUTABLE
    if error is None and ro is not None:
        parsed = parse_cap(ro, deep_immutable=deep_immutable)
        error = parsed.error if isinstance(parsed, UnknownCap) else None
    if error is not None or ro is None:
        return UnknownCap(rw, ro, error)
    prefix, bare = _split_prefix(ro)
    if deep_immutable:
        ro = IMM + bare
    elif not prefix:
        ro = RO + ro
    return UnknownCap(rw, ro)


def child_slots(cap: Cap, *, deep_immutable: bool) -> tuple[bytes, bytes]:
    """(write cap, read cap) as a directory stores them, either perhaps empty; the first is still to be encrypted.

    Raises BadCapError for what must not be stored there.
    """
    if isinstance(cap, UnknownCap):
        return _unknown_slots(cap, deep_immutable)
    if deep_immutable and cap.is_mutable:
        raise BadCapError(_COMPLAINTS[MUST_BE_DEEP_IMMUTABLE])
    rw = b"" if cap.is_readonly else cap.to_string().encode("ascii")
    return rw, cap.readonly.to_string().encode("ascii")


def _unknown_slots(cap: UnknownCap, deep_immutable: bool) -> tuple[bytes, bytes]:
    error = cap.error
    if error is None and cap.rw and not cap.ro:
        error = MUST_NOT_BE_UNKNOWN_RW
    elif error is None and deep_immutable and cap.is_mutable and cap.to_string():
        error = MUST_BE_DEEP_IMMUTABLE
    if error is not None:
        raise BadCapError(_COMPLAINTS.get(error, error))
    prefix, bare = _split_prefix(cap.ro or "")
    # `imm.` is kept in a mutable directory, where the place itself does not say it
    ro = bare if deep_immutable or prefix == RO else cap.ro or ""
    return (cap.rw or "").encode("utf-8", "surrogateescape"), ro.encode("utf-8", "surrogateescape")
