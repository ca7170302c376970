"""Directories: golden bytes both ways, what is left out, what is fatal, and that nothing untouched changes."""

from __future__ import annotations

import json
import unicodedata
from hashlib import sha256
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grid.errors import FormatError
from grid.formats import directory
from grid.formats.caps import (
    CHKReadCap,
    DirectoryCap,
    LiteralCap,
    MDMFWriteCap,
    SDMFReadCap,
    SDMFWriteCap,
    UnknownCap,
    child_cap,
    parse_known_cap,
)
from grid.formats.directory import (
    DirEntry,
    decrypt_rwcap,
    encrypt_rwcap,
    normalize_name,
    pack_directory,
    unpack_directory,
    update_metadata,
)
from grid.formats.hashutil import dirnode_child_key
from grid.formats.netstring import netstring, read_netstring
from tests.vectors import name_of, section

PACK = section("formats.json", "dirnode.pack")
UNPACK = section("formats.json", "dirnode.unpack")
WRITEKEY = b"directory w key!"
READ_CAP = SDMFReadCap(b"r" * 16, b"f" * 32)


def key_of(vector: dict[str, Any]) -> bytes | None:
    return None if vector["writekey"] is None else bytes.fromhex(vector["writekey"])


def one_child(
    *,
    name: bytes = b"n",
    ro: bytes = b"URI:LIT:",
    slot: bytes | None = None,
    metadata: bytes = b"{}",
) -> bytes:
    """One entry, as stored in a mutable directory."""
    slot = encrypt_rwcap(WRITEKEY, b"") if slot is None else slot
    return netstring(netstring(name) + netstring(ro) + netstring(slot) + netstring(metadata))


# --- golden vectors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vector", PACK, ids=name_of)
def test_packs_as_tahoe(vector: dict[str, Any]) -> None:
    deep_immutable = vector["deep_immutable"]
    entries = [
        DirEntry(
            child["name"],
            child_cap(child["given_rw"], child["given_ro"], deep_immutable=deep_immutable),
            child["metadata"],
        )
        for child in vector["children"]
    ]
    packed = pack_directory(reversed(entries), writekey=key_of(vector), deep_immutable=deep_immutable)
    assert packed.hex() == vector["packed"]
    assert sha256(packed).hexdigest() == vector["packed_sha256"]


@pytest.mark.parametrize("vector", [v for v in UNPACK if v["error"] is None], ids=name_of)
def test_unpacks_as_tahoe(vector: dict[str, Any]) -> None:
    entries = unpack_directory(
        memoryview(bytes.fromhex(vector["packed"])), mutable=vector["mutable"], writekey=key_of(vector)
    )
    assert sorted(entries) == sorted(child["name"] for child in vector["children"])
    for child in vector["children"]:
        entry = entries[child["name"]]
        assert entry.metadata == child["metadata"]
        if "ro" not in child:  # a CHK verify cap: the real client has no caps to show for it
            assert isinstance(entry.cap, UnknownCap)
        elif child["unknown"]:
            assert isinstance(entry.cap, UnknownCap)
            assert (entry.cap.rw, entry.cap.ro, entry.cap.error) == (child["rw"], child["ro"], None)
        else:
            assert not isinstance(entry.cap, UnknownCap)
            assert entry.cap.readonly.to_string() == child["ro"]
            assert (None if entry.cap.is_readonly else entry.cap.to_string()) == child["rw"]


@pytest.mark.parametrize("vector", [v for v in UNPACK if v["error"] is not None], ids=name_of)
def test_fatal_as_in_tahoe(vector: dict[str, Any]) -> None:
    with pytest.raises(FormatError):
        unpack_directory(bytes.fromhex(vector["packed"]), mutable=vector["mutable"], writekey=key_of(vector))


@pytest.mark.parametrize("vector", [v for v in UNPACK if v["error"] is None and v["writekey"]], ids=name_of)
def test_untouched_entries_are_copied(vector: dict[str, Any]) -> None:
    """Read and written again, each remaining entry keeps its bytes: bad MAC, odd prefix, trailing blanks."""
    writekey = key_of(vector)
    data = bytes.fromhex(vector["packed"])
    stored, position = [], 0
    while position < len(data):
        start = position
        _, position = read_netstring(data, position)
        stored.append(data[start:position])
    entries = unpack_directory(data, mutable=True, writekey=writekey)
    raw = {entry.name: bytes(entry.raw or b"") for entry in entries.values()}
    assert set(raw.values()) <= set(stored)
    assert pack_directory(entries.values(), writekey=writekey) == b"".join(raw[name] for name in sorted(raw))


@pytest.mark.parametrize("vector", section("formats.json", "dirnode.rwcap_encryption"))
def test_write_slot_matches_tahoe(vector: dict[str, Any]) -> None:
    writekey, rwcap = bytes.fromhex(vector["writekey"]), bytes.fromhex(vector["rw_cap"])
    slot = encrypt_rwcap(writekey, rwcap)
    assert slot.hex() == vector["encrypted"]
    assert slot[:16].hex() == vector["salt"]
    assert slot[-32:].hex() == vector["mac"]
    assert dirnode_child_key(slot[:16], writekey).hex() == vector["key"]
    assert decrypt_rwcap(writekey, memoryview(slot)) == rwcap


@pytest.mark.parametrize("vector", section("formats.json", "dirnode.metadata_updates"), ids=name_of)
def test_metadata_updates_as_in_tahoe(vector: dict[str, Any]) -> None:
    before = json.dumps([vector["old"], vector["new"]])
    result = update_metadata(vector["old"], vector["new"], vector["now"])
    assert json.dumps(result) == vector["result_json"]
    assert json.dumps([vector["old"], vector["new"]]) == before  # the arguments are left alone


# --- reading ----------------------------------------------------------------------------------------------------


def test_old_tahoe_part_that_is_no_object() -> None:
    assert update_metadata({"tahoe": 5}, None, 9.0) == {"tahoe": {"linkcrtime": 9.0, "linkmotime": 9.0}}


@pytest.mark.parametrize(
    "data",
    [
        one_child()[:-1],
        one_child() + b"x",
        one_child(name=b"\xff"),
        one_child(metadata=b""),
        one_child(metadata=b"[]"),
        one_child(metadata=b"null"),
        one_child(metadata=b"{"),
        one_child(metadata=b'{"\xff": 1}'),
        one_child(metadata=b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"),
        one_child(metadata=b'{"a": ' + b"9" * 10_000 + b"}"),
        one_child(metadata="{}".encode("utf-16")),
        netstring(netstring(b"n") + netstring(b"URI:LIT:") + netstring(b"")),
        netstring(b"n"),
        netstring(b""),
        b"0:",
        b"99999999999999999999:x",
    ],
)
def test_unreadable_directories(data: bytes) -> None:
    with pytest.raises(FormatError):
        unpack_directory(data, mutable=True, writekey=WRITEKEY)


def test_one_bad_child_does_not_hide_the_others(caplog: pytest.LogCaptureFixture) -> None:
    data = one_child(name=b"bad", ro=b"URI:CHK:secret") + one_child(name=b"good")
    with caplog.at_level("INFO"):
        assert list(unpack_directory(data, mutable=True, writekey=WRITEKEY)) == ["good"]
    assert "1 child" in caplog.text
    assert "secret" not in caplog.text


def test_order_is_kept_and_the_later_of_two_counts() -> None:
    data = (
        one_child(name=b"b")
        + one_child(name="e\u0301".encode())
        + one_child(name=b"a")
        + one_child(name="\u00e9".encode(), metadata=b'{"second": true}')
    )
    entries = unpack_directory(data, mutable=True, writekey=WRITEKEY)
    assert list(entries) == ["b", "\u00e9", "a"]
    assert entries["\u00e9"].metadata == {"second": True}


@pytest.mark.parametrize("slot", [b"", b"x" * 10, b"x" * 47, b"x" * 48])
def test_slot_too_short_for_a_write_cap(slot: bytes) -> None:
    entries = unpack_directory(one_child(slot=slot, ro=READ_CAP.to_string().encode()), mutable=True, writekey=WRITEKEY)
    assert entries["n"].cap == READ_CAP


def test_reader_sees_read_caps_only() -> None:
    cap = SDMFWriteCap(b"w" * 16, b"f" * 32)
    packed = pack_directory([DirEntry("n", cap, {})], writekey=WRITEKEY)
    assert unpack_directory(packed, mutable=True, writekey=WRITEKEY)["n"].cap == cap
    assert unpack_directory(packed, mutable=True, writekey=None)["n"].cap == cap.readonly


def test_wrong_writekey_gives_no_write_cap() -> None:
    """Garbage is decrypted, then: it must neither raise nor pass for a cap."""
    packed = pack_directory([DirEntry("n", SDMFWriteCap(b"w" * 16, b"f" * 32), {})], writekey=WRITEKEY)
    cap = unpack_directory(packed, mutable=True, writekey=b"another w key!!!")["n"].cap
    assert isinstance(cap, UnknownCap)


def test_caps_that_are_not_text_are_kept() -> None:
    data = one_child(ro=b"\xff\xfe")
    entries = unpack_directory(data, mutable=True, writekey=WRITEKEY)
    assert isinstance(entries["n"].cap, UnknownCap)
    assert pack_directory(entries.values(), writekey=WRITEKEY) == data


def test_write_slots_are_opened_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    """A listing of a large directory must not pay for write caps nobody uses."""
    cap = DirectoryCap(SDMFWriteCap(b"w" * 16, b"f" * 32))
    packed = pack_directory([DirEntry(f"{i}", cap, {}) for i in range(10)], writekey=WRITEKEY)
    opened = []

    def counting_decrypt(writekey: bytes, slot: bytes) -> bytes:
        opened.append(slot)
        return decrypt_rwcap(writekey, slot)

    monkeypatch.setattr(directory, "decrypt_rwcap", counting_decrypt)
    entries = unpack_directory(packed, mutable=True, writekey=WRITEKEY)
    assert pack_directory(entries.values(), writekey=WRITEKEY) == packed
    assert not opened
    assert entries["3"].cap == cap == entries["3"].cap
    assert len(opened) == 1


def test_directory_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory, "DIRECTORY_BYTES_MAX", 150)
    entries = [DirEntry(name, LiteralCap(b"x"), {}) for name in "ab"]
    packed = pack_directory(entries[:1], writekey=WRITEKEY)
    assert unpack_directory(packed, mutable=True, writekey=WRITEKEY).keys() == {"a"}
    with pytest.raises(FormatError):
        pack_directory(entries, writekey=WRITEKEY)
    with pytest.raises(FormatError):
        unpack_directory(packed * 2, mutable=True, writekey=WRITEKEY)


# --- writing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vector", section("formats.json", "dirnode.create_errors"), ids=name_of)
def test_caps_in_error_are_not_stored(vector: dict[str, Any]) -> None:
    """Which pairs are in error is the cap rules' business; that they cannot be stored is ours."""
    deep_immutable = vector["deep_immutable"]
    cap = child_cap(vector["rw"], vector["ro"], deep_immutable=deep_immutable)
    writekey = None if deep_immutable else WRITEKEY
    with pytest.raises(FormatError):
        pack_directory([DirEntry("n", cap, {})], writekey=writekey, deep_immutable=deep_immutable)


@pytest.mark.parametrize("cap", [READ_CAP, SDMFWriteCap(b"w" * 16, b"f" * 32), DirectoryCap(READ_CAP)])
def test_mutable_child_of_an_immutable_directory(cap: Any) -> None:
    with pytest.raises(FormatError):
        pack_directory([DirEntry("n", cap, {})], writekey=None, deep_immutable=True)


def test_no_write_stores_the_read_cap_alone() -> None:
    """A wish of the metadata that every writer honours."""
    cap = SDMFWriteCap(b"w" * 16, b"f" * 32)
    packed = pack_directory([DirEntry("n", cap, {"no-write": True})], writekey=WRITEKEY)
    assert unpack_directory(packed, mutable=True, writekey=WRITEKEY)["n"].cap == cap.readonly


def test_name_that_is_not_unicode() -> None:
    """As the kernel may hand one over: bytes that are no UTF-8."""
    with pytest.raises(FormatError):
        pack_directory([DirEntry(b"\xff".decode("utf-8", "surrogateescape"), LiteralCap(b""), {})], writekey=WRITEKEY)


def test_metadata_nested_too_deeply() -> None:
    """It may have been read with more stack left than there is when it is to be written."""
    metadata: dict[str, Any] = {}
    for _ in range(100_000):
        metadata = {"a": metadata}
    with pytest.raises(FormatError):
        pack_directory([DirEntry("n", LiteralCap(b""), metadata)], writekey=WRITEKEY)


def test_entry_of_another_directory_is_encrypted_anew() -> None:
    """Its bytes are under that directory's writekey: copied, they would be garbage here."""
    cap = MDMFWriteCap(b"w" * 16, b"f" * 32)
    elsewhere = pack_directory([DirEntry("n", cap, {"x": 1})], writekey=b"another w key!!!")
    entries = unpack_directory(elsewhere, mutable=True, writekey=b"another w key!!!")
    packed = pack_directory(entries.values(), writekey=WRITEKEY)
    assert packed == pack_directory([DirEntry("n", cap, {"x": 1})], writekey=WRITEKEY) != elsewhere


def test_changed_entry_is_packed_anew() -> None:
    foreign = one_child(metadata=b'{"a":1,"b":2}')  # not formatted as we would
    (entry,) = unpack_directory(foreign, mutable=True, writekey=WRITEKEY).values()
    assert pack_directory([entry], writekey=WRITEKEY) == foreign
    renamed = entry.changed(name="e\u0301")
    assert renamed.name == "\u00e9"
    assert pack_directory([renamed], writekey=WRITEKEY) == one_child(
        name="\u00e9".encode(), metadata=b'{"a": 1, "b": 2}'
    )
    other = entry.changed(cap=LiteralCap(b"y"), metadata={})
    assert pack_directory([other], writekey=WRITEKEY) == one_child(ro=b"URI:LIT:pe")


def test_which_kind_of_directory_must_be_said() -> None:
    with pytest.raises(ValueError, match="either"):
        pack_directory([], writekey=None)
    with pytest.raises(ValueError, match="either"):
        pack_directory([], writekey=WRITEKEY, deep_immutable=True)
    with pytest.raises(ValueError, match="writekey"):
        unpack_directory(b"", mutable=False, writekey=WRITEKEY)


def test_repr_shows_no_caps() -> None:
    cap = SDMFWriteCap(b"w" * 16, b"f" * 32)
    packed = pack_directory([DirEntry("n", cap, {})], writekey=WRITEKEY)
    (entry,) = unpack_directory(packed, mutable=True, writekey=WRITEKEY).values()
    for shown in (repr(DirEntry("n", cap, {})), repr(entry)):
        assert "URI" not in shown
        assert "www" not in shown


# --- properties -------------------------------------------------------------------------------------------------

KEYS = st.binary(min_size=16, max_size=16)
HASHES = st.binary(min_size=32, max_size=32)
IMMUTABLE_FILES = st.one_of(
    st.builds(LiteralCap, st.binary(max_size=55)),
    st.builds(
        CHKReadCap,
        KEYS,
        HASHES,
        st.integers(1, 5),
        st.integers(5, 256),
        st.integers(56, 1 << 50),
    ),
)
MUTABLE_FILES = st.one_of(
    st.builds(SDMFWriteCap, KEYS, HASHES), st.builds(MDMFWriteCap, KEYS, HASHES), st.builds(SDMFReadCap, KEYS, HASHES)
)
FUTURE = st.text("abc:/", min_size=1, max_size=20).map(lambda text: child_cap(None, "lafs" + text, deep_immutable=True))


def directories_of(files: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return files | files.map(DirectoryCap)


NAMES = st.text(max_size=30).map(normalize_name)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=10),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=5), values, max_size=3),
    max_leaves=5,
)
METADATA = st.dictionaries(st.text(max_size=8).filter(lambda key: key != "no-write"), JSON, max_size=4)


@given(st.dictionaries(NAMES, st.tuples(directories_of(IMMUTABLE_FILES | MUTABLE_FILES), METADATA), max_size=6), KEYS)
def test_mutable_directory_reads_back(children: dict[str, Any], writekey: bytes) -> None:
    entries = [DirEntry(name, cap, metadata) for name, (cap, metadata) in children.items()]
    packed = pack_directory(entries, writekey=writekey)
    read = unpack_directory(packed, mutable=True, writekey=writekey)
    assert list(read) == sorted(children)
    assert sorted(read.values(), key=lambda e: e.name) == sorted(entries, key=lambda e: e.name)
    assert pack_directory(read.values(), writekey=writekey) == packed
    assert pack_directory((entry.changed() for entry in read.values()), writekey=writekey) == packed
    for name, entry in unpack_directory(packed, mutable=True, writekey=None).items():
        assert entry.cap == children[name][0].readonly


@given(st.dictionaries(NAMES, st.tuples(directories_of(IMMUTABLE_FILES) | FUTURE, METADATA), max_size=6))
def test_immutable_directory_reads_back(children: dict[str, Any]) -> None:
    entries = [DirEntry(name, cap, metadata) for name, (cap, metadata) in children.items()]
    packed = pack_directory(entries, writekey=None, deep_immutable=True)
    read = unpack_directory(packed, mutable=False, writekey=None)
    assert [(entry.name, entry.metadata) for entry in read.values()] == [
        (name, children[name][1]) for name in sorted(children)
    ]
    assert {name: entry.cap.to_string() for name, entry in read.items()} == {
        name: cap.to_string() for name, (cap, _) in children.items()
    }


@given(st.sampled_from([v for v in UNPACK + PACK if v["packed"]]), st.data())
def test_changed_directories_raise_nothing_else(vector: dict[str, Any], data: st.DataObject) -> None:
    changed = bytearray(bytes.fromhex(vector["packed"]))
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    mutable = vector["writekey"] is not None
    try:
        entries = unpack_directory(bytes(changed), mutable=mutable, writekey=key_of(vector))
    except FormatError:
        return
    for entry in entries.values():
        assert unicodedata.is_normalized("NFC", entry.name)
        assert entry.cap is not None


@given(st.binary(max_size=60), st.binary(max_size=80), st.binary(max_size=20), st.booleans())
def test_noise_in_slots_raises_nothing_else(ro: bytes, slot: bytes, name: bytes, mutable: bool) -> None:
    data = one_child(name=name, ro=ro, slot=slot)
    try:
        entries = unpack_directory(data, mutable=mutable, writekey=WRITEKEY if mutable else None)
    except FormatError:
        return
    assert all(entry.cap is not None for entry in entries.values())


@given(st.binary(max_size=100))
def test_noise_raises_nothing_else(data: bytes) -> None:
    try:
        entries = unpack_directory(data, mutable=True, writekey=WRITEKEY)
    except FormatError:
        return
    assert data == b"" or not entries


CAPS = section("formats.json", "caps.caps")


@pytest.mark.parametrize("mutable", [True, False])
@given(st.data())
def test_caps_taken_unparsed_would_have_parsed(mutable: bool, data: st.DataObject) -> None:
    """Read caps that look sound are parsed only when asked for: nothing in error may look sound."""
    ro = bytearray(data.draw(st.sampled_from(CAPS))["cap"].encode("ascii"))
    for _ in range(data.draw(st.integers(0, 2))):
        ro[data.draw(st.integers(0, len(ro) - 1))] = data.draw(st.sampled_from(b"aeZ:0-\n \xff"))
    child = one_child(ro=bytes(ro), slot=None if mutable else b"")
    entries = unpack_directory(child, mutable=mutable, writekey=None)
    expected = child_cap(None, ro.rstrip(b" ").decode("utf-8", "surrogateescape"), deep_immutable=not mutable)
    if isinstance(expected, UnknownCap) and expected.error is not None:
        assert not entries
    else:
        assert entries["n"].cap == expected


def test_entries_of_a_mutable_directory_are_packed_anew_for_an_immutable_one() -> None:
    """Also those read with a read cap, when neither has a writekey."""
    child = parse_known_cap("URI:LIT:mfrgg")
    packed = pack_directory([DirEntry("n", child, {"a": 1})], writekey=WRITEKEY)
    (entry,) = unpack_directory(packed, mutable=True, writekey=None).values()
    immutable = pack_directory([entry], writekey=None, deep_immutable=True)
    (again,) = unpack_directory(immutable, mutable=False, writekey=None).values()
    assert (again.name, again.cap, again.metadata) == ("n", child, {"a": 1})
