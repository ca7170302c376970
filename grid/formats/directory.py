"""A directory's plaintext: the contents of its backing file, to and from named children.

    for each child, ascending by name:
      netstring( netstring(name) netstring(read cap) netstring(write slot) netstring(metadata JSON) )

An empty directory is an empty file. Names are UTF-8 in NFC, compared as Unicode, so é is one name however it
was typed. A mutable directory's write slot is always there, even for a child without a write cap:

    salt 16 | write cap, AES-CTR under a key of (salt, directory's writekey) | MAC 32

so holders of the directory's read cap see all but the write caps. Readers do not check the MAC. An immutable
directory's slots are empty. A child whose cap breaks the rules for caps is left out when reading, and so is
lost by the next write of the directory, as with every other client; everything else that does not parse makes
the whole directory unreadable. What a writer does not touch it copies byte for byte.

Source: Tahoe-LAFS 1.20's directory format. The limits are ours.
"""

from __future__ import annotations

import json
import logging
import re
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any, Final, Self

from attrs import evolve, field, frozen

from grid.crypto import aes_ctr
from grid.errors import FormatError
from grid.formats.caps import Cap, UnknownCap, child_cap, child_slots
from grid.formats.hashutil import KEY_BYTES, dirnode_child_key, dirnode_child_salt, dirnode_mac
from grid.formats.netstring import netstring, read_netstring

log = logging.getLogger(__name__)

DIRECTORY_BYTES_MAX: Final = 128 << 20  # some 300,000 children: it is held whole in memory
MAC_BYTES: Final = 32

# Read caps as every client writes them, which cannot be in error: those need no parsing before someone asks.
# (Literal caps are not among them: whether their base32 is sound only parsing tells.)
_KEY: Final = rb"[a-z2-7]{25}[aeimquy4]"
_HASH: Final = rb"[a-z2-7]{51}[aq]"
_IMMUTABLE_READ_CAP: Final = re.compile(rb"URI:(?:DIR2-)?CHK:%b:%b:[0-9]{1,3}:[0-9]{1,3}:[0-9]{1,18}" % (_KEY, _HASH))
_MUTABLE_READ_CAP: Final = re.compile(rb"URI:(?:SSK|MDMF|DIR2|DIR2-MDMF)-RO:%b:%b" % (_KEY, _HASH))


def normalize_name(name: str) -> str:
    """The form names are stored and compared in."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


@frozen
class DirEntry:
    """One child: its name (NFC), cap, and metadata (a JSON object; treat it as constant).

    `raw` is the entry as it stands in the directory it was read from, whose writekey is `writekey`; packing
    that same mutable directory again copies it. A changed entry has none: use `changed`.
    """

    name: str = field(converter=normalize_name)
    _cap: Cap | _StoredCap = field(repr=False)
    metadata: dict[str, Any]
    raw: bytes | memoryview | None = field(default=None, repr=False, eq=False)
    writekey: bytes | None = field(default=None, repr=False, eq=False)

    @property
    def cap(self) -> Cap:
        """The child's strongest cap we can know; a write cap is decrypted when this is first asked for."""
        return self._cap.open() if isinstance(self._cap, _StoredCap) else self._cap

    def changed(self, **changes: Any) -> Self:
        """The same child with another `name`, `cap` or `metadata`; it will be packed anew."""
        return evolve(self, raw=None, writekey=None, **changes)


class _StoredCap:
    """A child's slots, one of them perhaps encrypted. Opened once, on demand: most never are."""

    __slots__ = ("_cap", "_ro", "_slot", "_writekey")

    def __init__(self, ro: bytes, slot: bytes, writekey: bytes | None) -> None:
        self._ro, self._slot, self._writekey = ro, slot, writekey
        self._cap: Cap | None = None

    def open(self) -> Cap:
        if self._cap is None:
            rw = b"" if self._writekey is None else decrypt_rwcap(self._writekey, self._slot)
            self._cap = _cap_of_slots(rw, self._ro, deep_immutable=False)
        return self._cap

    def __eq__(self, other: object) -> bool:
        return (other.open() if isinstance(other, _StoredCap) else other) == self.open()

    __hash__ = None  # type: ignore[assignment]


def unpack_directory(data: bytes | memoryview, *, mutable: bool, writekey: bytes | None) -> dict[str, DirEntry]:
    """{name: child} in stored order, from a directory's whole plaintext.

    `writekey` is the directory's; None shows every child as a holder of the read cap sees it. Children that
    break the rules for caps are left out, of two with one name the later counts. Raises FormatError.
    """
    if len(data) > DIRECTORY_BYTES_MAX:
        raise FormatError(f"directory over {DIRECTORY_BYTES_MAX} bytes")
    if writekey is not None and not mutable:
        raise ValueError("an immutable directory has no writekey")
    view = memoryview(data)
    entries: dict[str, DirEntry] = {}
    position = left_out = 0
    while position < len(view):
        start = position
        content, position = read_netstring(view, start)
        name, ro, slot, metadata = _split_entry(content)
        cap = _child(ro, slot, mutable=mutable, writekey=writekey)
        if cap is None:
            left_out += 1
            continue
        entry = DirEntry(name, cap, metadata, bytes(view[start:position]), writekey)
        entries[entry.name] = entry
    if left_out:
        log.info("left out %d children of a directory: their caps break the rules", left_out)
    return entries


def pack_directory(entries: Iterable[DirEntry], *, writekey: bytes | None, deep_immutable: bool = False) -> bytes:
    """A directory's plaintext. `writekey` is the directory's; None for an immutable one.

    Entries that were read from this same mutable directory are copied byte for byte. Raises FormatError for a child
    that cannot be stored here: its cap is in error, or not immutable where all must be.
    """
    if (writekey is None) != deep_immutable:
        raise ValueError("a directory is either mutable, with a writekey, or deep-immutable")
    by_name = {entry.name: entry for entry in entries}
    slots: dict[bytes, bytes] = {}  # most children have no write cap: encrypt that once
    packed = []
    for name in sorted(by_name):
        entry = by_name[name]
        if entry.raw is not None and entry.writekey == writekey and not deep_immutable:
            packed.append(entry.raw)
        else:
            packed.append(_pack_entry(name, entry, writekey, deep_immutable, slots))
    data = b"".join(packed)
    if len(data) > DIRECTORY_BYTES_MAX:
        raise FormatError(f"directory would take over {DIRECTORY_BYTES_MAX} bytes")
    return data


def update_metadata(old: Mapping[str, Any] | None, new: Mapping[str, Any] | None, now: float) -> dict[str, Any]:
    """The metadata of a child that is added, replaced or changed at `now` (POSIX seconds).

    `new` is the caller's part, whose `tahoe` does not count; None keeps what `old` had. The `tahoe` part tells
    since when the link is there and when it changed last.
    """
    metadata = dict(old or {}) if new is None else {key: new[key] for key in new if key != "tahoe"}
    old_times = (old or {}).get("tahoe")
    times = dict(old_times) if isinstance(old_times, dict) else {}
    if "linkcrtime" not in times:
        times["linkcrtime"] = (old or {}).get("ctime", now)
    times["linkmotime"] = now
    metadata["tahoe"] = times
    return metadata


def encrypt_rwcap(writekey: bytes, rwcap: bytes) -> bytes:
    """The write slot: 48 bytes and the cap's own. Equal caps in one directory give equal slots."""
    salt = dirnode_child_salt(rwcap)
    key = dirnode_child_key(salt, writekey)
    ciphertext = aes_ctr(key, rwcap)
    return salt + ciphertext + dirnode_mac(key, salt, ciphertext)


def decrypt_rwcap(writekey: bytes, slot: bytes | memoryview) -> bytes:
    """The write cap in a slot, without trailing spaces; empty for none, and for a slot too short for one."""
    salt, ciphertext = bytes(slot[:KEY_BYTES]), slot[KEY_BYTES:-MAC_BYTES]
    if not ciphertext:
        return b""
    return aes_ctr(dirnode_child_key(salt, writekey), ciphertext).rstrip(b" ")


def _split_entry(content: memoryview) -> tuple[str, bytes, memoryview, dict[str, Any]]:
    """Name, read cap, write slot, metadata of one entry."""
    name, position = read_netstring(content, 0)
    ro, position = read_netstring(content, position)
    slot, position = read_netstring(content, position)
    metadata_json, position = read_netstring(content, position)
    try:
        metadata = json.loads(str(metadata_json, "utf-8"))
        text = str(name, "utf-8")
    except (ValueError, RecursionError):
        raise FormatError("directory has a child whose name or metadata does not parse") from None
    if not isinstance(metadata, dict):
        raise FormatError("directory has a child whose metadata is no JSON object")
    return text, bytes(ro).rstrip(b" "), slot, metadata


def _child(ro: bytes, slot: memoryview, *, mutable: bool, writekey: bytes | None) -> Cap | _StoredCap | None:
    """A child's cap; None to leave it out."""
    if not mutable and len(slot):
        raise FormatError("immutable directory has a child with a write cap")
    if writekey is None or len(slot) <= KEY_BYTES + MAC_BYTES:
        if _IMMUTABLE_READ_CAP.fullmatch(ro) or (mutable and _MUTABLE_READ_CAP.fullmatch(ro)):
            return _StoredCap(ro, b"", None)
        cap = _cap_of_slots(b"", ro, deep_immutable=not mutable)
    else:
        if _MUTABLE_READ_CAP.fullmatch(ro):
            return _StoredCap(ro, bytes(slot), writekey)
        # An odd one: only the write cap tells whether it counts.
        cap = _cap_of_slots(decrypt_rwcap(writekey, slot), ro, deep_immutable=False)
    return None if isinstance(cap, UnknownCap) and cap.error is not None else cap


def _cap_of_slots(rw: bytes, ro: bytes, *, deep_immutable: bool) -> Cap:
    rw_text, ro_text = (slot.decode("utf-8", "surrogateescape") or None for slot in (rw, ro))
    return child_cap(rw_text, ro_text, deep_immutable=deep_immutable)


def _pack_entry(
    name: str, entry: DirEntry, writekey: bytes | None, deep_immutable: bool, slots: dict[bytes, bytes]
) -> bytes:
    cap = entry.cap.readonly if entry.metadata.get("no-write") else entry.cap
    rw, ro = child_slots(cap, deep_immutable=deep_immutable)
    if writekey is None:
        slot = b""
    elif (slot := slots.get(rw, b"")) == b"":
        slot = slots[rw] = encrypt_rwcap(writekey, rw)
    try:
        name_utf8 = name.encode("utf-8")
    except UnicodeEncodeError:
        raise FormatError("a child's name is not Unicode") from None
    try:
        metadata = json.dumps(entry.metadata).encode("ascii")
    except RecursionError:  # it was read where the stack had more room
        raise FormatError("a child's metadata is nested too deeply") from None
    return netstring(netstring(name_utf8) + netstring(ro) + netstring(slot) + netstring(metadata))
