"""The kinds of capabilities, as values: what each holds, and what weaker caps follow from it.

    write cap ─→ read cap ─→ verify cap          a directory cap wraps the cap of the file its table is kept in

`str(cap)` and `to_string()` give the secret text; repr never does. For texts and their rules see caps.py, which is
also where to import these from. Source: Tahoe-LAFS 1.20's caps.
"""

from __future__ import annotations

from typing import Any, ClassVar, Final, TypeAlias

from attrs import field, frozen

from grid.errors import short_si
from grid.formats import hashutil
from grid.formats.base32 import b2a

IMM: Final = "imm."  # before a cap: nothing under it may ever change


def _shown(secret: bytes) -> str:
    """Enough of a storage index or hash for a log; a whole verify cap is not for logs either."""
    return short_si(b2a(secret)) + "…"


class _CapBase:
    """What most kinds have in common: not writeable, not mutable, not a directory, its own read cap."""

    __slots__ = ()
    kind: ClassVar[str]
    is_readonly: ClassVar[bool] = True
    is_mutable: ClassVar[bool] = False
    is_directory: ClassVar[bool] = False
    is_verifier: ClassVar[bool] = False

    def to_string(self) -> str:
        raise NotImplementedError

    def __str__(self) -> str:
        return self.to_string()

    @property
    def readonly(self) -> Any:
        """The strongest cap of this that grants no writing."""
        return self


# --- immutable files ----------------------------------------------------------------------------------------


@frozen
class CHKVerifyCap(_CapBase):
    """The right to check one immutable file's shares."""

    kind = "chk"
    is_verifier = True

    storage_index: bytes = field(repr=_shown)
    ueb_hash: bytes = field(repr=_shown)
    k: int  # shares needed. These three are as the text has them: not checked
    n: int  # shares made
    size: int  # plaintext bytes

    @property
    def verifier(self) -> CHKVerifyCap:
        return self

    def to_string(self) -> str:
        return f"URI:CHK-Verifier:{b2a(self.storage_index)}:{b2a(self.ueb_hash)}:{self.k}:{self.n}:{self.size}"


@frozen
class CHKReadCap(_CapBase):
    """The right to read one immutable file."""

    kind = "chk"

    key: bytes = field(repr=False)  # AES key
    ueb_hash: bytes = field(repr=_shown)
    k: int  # shares needed. These three are as the text has them: not checked
    n: int  # shares made
    size: int  # plaintext bytes

    @property
    def storage_index(self) -> bytes:
        return hashutil.chk_storage_index(self.key)

    @property
    def verifier(self) -> CHKVerifyCap:
        return CHKVerifyCap(self.storage_index, self.ueb_hash, self.k, self.n, self.size)

    def to_string(self) -> str:
        return f"URI:CHK:{b2a(self.key)}:{b2a(self.ueb_hash)}:{self.k}:{self.n}:{self.size}"


@frozen
class LiteralCap(_CapBase):
    """A small immutable file itself."""

    kind = "lit"

    data: bytes = field(repr=False)

    @property
    def size(self) -> int:
        return len(self.data)

    @property
    def storage_index(self) -> None:
        return None

    @property
    def verifier(self) -> None:
        return None

    def to_string(self) -> str:
        return f"URI:LIT:{b2a(self.data)}"


# --- mutable files ------------------------------------------------------------------------------------------


class _MutableCap(_CapBase):
    """Texts of SDMF and MDMF caps differ in one word."""

    __slots__ = ()
    _word: ClassVar[str]

    @property
    def size(self) -> None:
        return None  # the grid knows

    def _text(self, suffix: str, key: bytes, fingerprint: bytes) -> str:
        return f"URI:{self._word}{suffix}:{b2a(key)}:{b2a(fingerprint)}"


@frozen
class _MutableVerifyCap(_MutableCap):
    is_verifier = True

    storage_index: bytes = field(repr=_shown)
    fingerprint: bytes = field(repr=_shown)  # hash of the public key

    def to_string(self) -> str:
        return self._text("-Verifier", self.storage_index, self.fingerprint)


@frozen
class _MutableReadCap(_MutableCap):
    is_mutable = True

    readkey: bytes = field(repr=False)
    fingerprint: bytes = field(repr=_shown)

    @property
    def storage_index(self) -> bytes:
        return hashutil.ssk_storage_index(self.readkey)

    def to_string(self) -> str:
        return self._text("-RO", self.readkey, self.fingerprint)


@frozen
class _MutableWriteCap(_MutableCap):
    is_mutable = True
    is_readonly = False

    writekey: bytes = field(repr=False)
    fingerprint: bytes = field(repr=_shown)

    @property
    def readkey(self) -> bytes:
        return hashutil.readkey_of_writekey(self.writekey)

    @property
    def storage_index(self) -> bytes:
        return hashutil.ssk_storage_index(self.readkey)

    def to_string(self) -> str:
        return self._text("", self.writekey, self.fingerprint)


@frozen
class SDMFVerifyCap(_MutableVerifyCap):
    """The right to check one SDMF file's shares."""

    kind, _word = "sdmf", "SSK"

    @property
    def verifier(self) -> SDMFVerifyCap:
        return self


@frozen
class SDMFReadCap(_MutableReadCap):
    """The right to read one SDMF file."""

    kind, _word = "sdmf", "SSK"

    @property
    def verifier(self) -> SDMFVerifyCap:
        return SDMFVerifyCap(self.storage_index, self.fingerprint)


@frozen
class SDMFWriteCap(_MutableWriteCap):
    """The right to read and write one SDMF file."""

    kind, _word = "sdmf", "SSK"

    @property
    def readonly(self) -> SDMFReadCap:
        return SDMFReadCap(self.readkey, self.fingerprint)

    @property
    def verifier(self) -> SDMFVerifyCap:
        return SDMFVerifyCap(self.storage_index, self.fingerprint)


@frozen
class MDMFVerifyCap(_MutableVerifyCap):
    """The right to check one MDMF file's shares."""

    kind, _word = "mdmf", "MDMF"

    @property
    def verifier(self) -> MDMFVerifyCap:
        return self


@frozen
class MDMFReadCap(_MutableReadCap):
    """The right to read one MDMF file."""

    kind, _word = "mdmf", "MDMF"

    @property
    def verifier(self) -> MDMFVerifyCap:
        return MDMFVerifyCap(self.storage_index, self.fingerprint)


@frozen
class MDMFWriteCap(_MutableWriteCap):
    """The right to read and write one MDMF file."""

    kind, _word = "mdmf", "MDMF"

    @property
    def readonly(self) -> MDMFReadCap:
        return MDMFReadCap(self.readkey, self.fingerprint)

    @property
    def verifier(self) -> MDMFVerifyCap:
        return MDMFVerifyCap(self.storage_index, self.fingerprint)


# --- directories, and what we do not know -------------------------------------------------------------------

WriteCap: TypeAlias = SDMFWriteCap | MDMFWriteCap
ReadCap: TypeAlias = CHKReadCap | LiteralCap | SDMFReadCap | MDMFReadCap
VerifyCap: TypeAlias = CHKVerifyCap | SDMFVerifyCap | MDMFVerifyCap
FileCap: TypeAlias = WriteCap | ReadCap | VerifyCap

_DIRECTORY_WORDS: Final = {"SSK": "DIR2", "SSK-RO": "DIR2-RO", "SSK-Verifier": "DIR2-Verifier"}


def directory_word(file_word: str) -> str:
    """The word after `URI:` of a directory cap, from that of its file's."""
    return _DIRECTORY_WORDS.get(file_word) or f"DIR2-{file_word}"


@frozen
class DirectoryCap:
    """The right to a directory, which is the right to the file its table is kept in."""

    file: FileCap

    is_directory: ClassVar[bool] = True

    @property
    def kind(self) -> str:
        return f"dir-{self.file.kind}"

    @property
    def is_readonly(self) -> bool:
        return self.file.is_readonly

    @property
    def is_mutable(self) -> bool:
        return self.file.is_mutable

    @property
    def is_verifier(self) -> bool:
        return self.file.is_verifier

    @property
    def readonly(self) -> DirectoryCap:
        return self if self.is_readonly else DirectoryCap(self.file.readonly)

    @property
    def verifier(self) -> DirectoryCap | None:
        verifier = self.file.verifier
        return None if verifier is None else DirectoryCap(verifier)

    @property
    def storage_index(self) -> bytes | None:
        return self.file.storage_index

    @property
    def size(self) -> int | None:
        """Bytes of the packed table, where the cap tells."""
        return self.file.size

    def to_string(self) -> str:
        scheme, word, rest = self.file.to_string().split(":", 2)
        return f"{scheme}:{directory_word(word)}:{rest}"

    def __str__(self) -> str:
        return self.to_string()


@frozen
class UnknownCap(_CapBase):
    """Texts we can keep and hand on, but not use. Bytes that are no UTF-8 stand in them as surrogates."""

    kind = "unknown"

    rw: str | None = field(default=None, repr=False)  # may grant writing
    ro: str | None = field(default=None, repr=False)
    error: str | None = None  # one of caps.py's constants: it must not be stored, and is skipped when found

    @property
    def is_readonly(self) -> bool:  # type: ignore[override]
        return self.rw is None

    @property
    def is_mutable(self) -> bool:  # type: ignore[override]
        """True unless it promises otherwise: nobody knows."""
        return self.rw is not None or not (self.ro or "").startswith(IMM)

    @property
    def readonly(self) -> UnknownCap:
        return UnknownCap(None, self.ro, self.error)

    @property
    def verifier(self) -> None:
        return None

    @property
    def storage_index(self) -> None:
        return None

    @property
    def size(self) -> None:
        return None

    def to_string(self) -> str:
        return self.rw or self.ro or ""


KnownCap: TypeAlias = FileCap | DirectoryCap
Cap: TypeAlias = KnownCap | UnknownCap
