"""Caps against Tahoe-LAFS 1.20's: texts, derivations, tolerances, prefixes, and the slots of directories."""

from __future__ import annotations

import string
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grid.errors import BadCapError
from grid.formats import caps
from grid.formats.base32 import ALPHABET, a2b, b2a
from grid.formats.caps import (
    CHKReadCap,
    CHKVerifyCap,
    DirectoryCap,
    LiteralCap,
    MDMFReadCap,
    MDMFVerifyCap,
    MDMFWriteCap,
    SDMFReadCap,
    SDMFVerifyCap,
    SDMFWriteCap,
    UnknownCap,
    child_cap,
    child_slots,
    parse_cap,
    parse_known_cap,
)
from grid.interfaces import IURI
from tests.vectors import name_of, section

CAPS = section("formats.json", "caps.caps")
FIELDS = section("formats.json", "caps.fields")
FILE_KINDS = {
    "CHKFileURI": CHKReadCap,
    "CHKFileVerifierURI": CHKVerifyCap,
    "LiteralFileURI": LiteralCap,
    "WriteableSSKFileURI": SDMFWriteCap,
    "ReadonlySSKFileURI": SDMFReadCap,
    "SSKVerifierURI": SDMFVerifyCap,
    "WriteableMDMFFileURI": MDMFWriteCap,
    "ReadonlyMDMFFileURI": MDMFReadCap,
    "MDMFVerifierURI": MDMFVerifyCap,
}
DIRECTORY_KINDS = {
    "DirectoryURI": SDMFWriteCap,
    "ReadonlyDirectoryURI": SDMFReadCap,
    "DirectoryURIVerifier": SDMFVerifyCap,
    "MDMFDirectoryURI": MDMFWriteCap,
    "ReadonlyMDMFDirectoryURI": MDMFReadCap,
    "MDMFDirectoryURIVerifier": MDMFVerifyCap,
    "ImmutableDirectoryURI": CHKReadCap,
    "ImmutableDirectoryURIVerifier": CHKVerifyCap,
    "LiteralDirectoryURI": LiteralCap,
}


def _is_a(cap: caps.Cap, kind: str) -> bool:
    if kind == "UnknownURI":
        return isinstance(cap, UnknownCap)
    if isinstance(cap, DirectoryCap):
        return type(cap.file) is DIRECTORY_KINDS.get(kind)
    return type(cap) is FILE_KINDS.get(kind)


def _cap(kind: str) -> str:
    """The text of that kind in the vectors."""
    text: str = section("formats.json", "caps.caps", kind=kind)[-1]["cap"]
    return text


# --- texts and derivations ----------------------------------------------------------------------------------


@pytest.mark.parametrize("vector", CAPS, ids=lambda vector: vector["kind"])
def test_every_kind_is_tahoes(vector: dict[str, Any]) -> None:
    cap = parse_known_cap(vector["cap"])
    assert _is_a(cap, vector["kind"])
    assert cap.to_string() == str(cap) == vector["cap"]
    assert cap.is_readonly == vector["is_readonly"]
    assert cap.is_mutable == vector["is_mutable"]
    assert (cap.storage_index and b2a(cap.storage_index)) == vector["storage_index"]
    assert str(cap.readonly) == vector["readcap"]
    assert cap.is_directory == vector["cap"].startswith("URI:DIR2")
    assert cap.is_verifier == ("Verifier" in vector["kind"])
    if vector["verifycap"] != "<real implementation crashes here>":
        assert (cap.verifier and str(cap.verifier)) == vector["verifycap"]
    else:
        assert cap.verifier == cap
    assert isinstance(cap, IURI)


def test_fields() -> None:
    chk, writer, verifier = map(parse_cap, map(_cap, ("CHKFileURI", "DirectoryURI", "MDMFVerifierURI")))
    assert isinstance(chk, CHKReadCap)
    assert (chk.k, chk.n, chk.size) == (FIELDS["needed_shares"], FIELDS["total_shares"], FIELDS["size"])
    assert chk.key.hex() == FIELDS["key_or_writekey"]
    assert chk.ueb_hash.hex() == FIELDS["ueb_hash_or_fingerprint"]
    assert chk.storage_index.hex() == FIELDS["chk_storage_index"]
    assert isinstance(writer, DirectoryCap)
    assert isinstance(writer.file, SDMFWriteCap)
    assert writer.file.writekey.hex() == FIELDS["key_or_writekey"]
    assert writer.file.readkey.hex() == FIELDS["readkey"]
    assert isinstance(verifier, MDMFVerifyCap)
    assert verifier.storage_index.hex() == FIELDS["ssk_storage_index"]
    assert verifier.fingerprint.hex() == FIELDS["ueb_hash_or_fingerprint"]


def test_kinds_and_sizes() -> None:
    expected = {
        "CHKFileURI": ("chk", 123456),
        "LiteralFileURI": ("lit", 55),
        "WriteableSSKFileURI": ("sdmf", None),
        "ReadonlyMDMFFileURI": ("mdmf", None),
        "DirectoryURI": ("dir-sdmf", None),
        "ReadonlyMDMFDirectoryURI": ("dir-mdmf", None),
        "ImmutableDirectoryURI": ("dir-chk", 123456),
        "LiteralDirectoryURI": ("dir-lit", 1),
    }
    assert {kind: ((cap := parse_cap(_cap(kind))).kind, cap.size) for kind in expected} == expected
    assert UnknownCap().kind == "unknown"


@pytest.mark.parametrize("vector", section("formats.json", "lit"), ids=lambda vector: f"{vector['length']} bytes")
def test_literals(vector: dict[str, Any]) -> None:
    data = bytes.fromhex(vector["plaintext"])
    assert str(LiteralCap(data)) == vector["cap"]
    assert parse_cap(vector["cap"]) == LiteralCap(data)


def test_caps_of_a_real_mutable_file() -> None:
    keys = section("formats.json", "mutable.keys")
    sdmf = SDMFWriteCap(bytes.fromhex(keys["writekey"]), bytes.fromhex(keys["fingerprint"]))
    mdmf = MDMFWriteCap(sdmf.writekey, sdmf.fingerprint)
    assert (str(sdmf), str(mdmf)) == (keys["ssk_cap"], keys["mdmf_cap"])
    assert sdmf.storage_index.hex() == mdmf.readonly.storage_index.hex() == keys["storage_index"]
    assert sdmf.readonly.readkey.hex() == keys["readkey"]
    assert sdmf != mdmf


@pytest.mark.parametrize("vector", section("formats.json", "chk"), ids=name_of)
def test_caps_of_real_immutable_files(vector: dict[str, Any]) -> None:
    cap = parse_known_cap(vector["readcap"])
    assert cap == CHKReadCap(
        bytes.fromhex(vector["key"]),
        bytes.fromhex(vector["ueb_hash"]),
        vector["k"],
        vector["n"],
        vector["plaintext"]["length"],
    )
    assert str(cap.verifier) == vector["verifycap"]
    assert cap.storage_index == a2b(vector["storage_index"])


# --- parsing ------------------------------------------------------------------------------------------------

PARSE = section("formats.json", "caps.parse")


def test_all_parse_vectors_are_here() -> None:
    assert len(PARSE) == 120


@pytest.mark.parametrize("vector", PARSE, ids=name_of)
def test_parsing_is_tahoes(vector: dict[str, Any]) -> None:
    cap = parse_cap(bytes.fromhex(vector["input"]), deep_immutable=vector["deep_immutable"])
    assert _is_a(cap, vector["kind"])
    assert cap.to_string().encode() == bytes.fromhex(vector["to_string"])
    error = cap.error and f"{cap.error}Error" if isinstance(cap, UnknownCap) else None
    assert error == vector["error"]


def test_extension_fields_of_mdmf_and_their_limits() -> None:
    text = _cap("WriteableMDMFFileURI")
    for tail in (":", ":3:131073", ":a\nb", "\n"):
        assert str(parse_cap(text + tail)) == text
    for tail in ("\n\n", " ", "\r\n"):
        assert isinstance(parse_cap(text + tail), UnknownCap)


@pytest.mark.parametrize("numbers", ["0:0:0", "3:10:9223372036854775807"])
def test_numbers_as_they_are(numbers: str) -> None:
    text = _cap("CHKFileURI").rsplit(":", 3)[0]
    assert str(parse_cap(f"{text}:{numbers}")) == f"{text}:{numbers}"


@pytest.mark.parametrize("number", [str(1 << 63), "9" * 5000, "1" + "0" * 100_000])
def test_numbers_too_large_are_garbled(number: str) -> None:
    for kind in ("CHKFileURI", "CHKFileVerifierURI", "ImmutableDirectoryURI"):
        for position in range(3):
            numbers = ["3", "10", "100"]
            numbers[position] = number
            cap = parse_cap(":".join([_cap(kind).rsplit(":", 3)[0], *numbers]))
            assert isinstance(cap, UnknownCap)
            assert cap.error == "BadURI"


@pytest.mark.parametrize("numbers", ["0:10:5", "4:3:5", "1:257:5"])
def test_a_users_cap_must_be_possible(numbers: str) -> None:
    for kind in ("CHKFileURI", "ImmutableDirectoryURI"):
        with pytest.raises(BadCapError, match="cannot be"):
            parse_known_cap(_cap(kind).rsplit(":", 3)[0] + f":{numbers}")


@pytest.mark.parametrize("text", ["", "lafs://x", "URI:CHK:zzz", "ro." + _cap("DirectoryURI"), "/some/path"])
def test_a_users_cap_must_be_known_and_is_never_repeated(text: str) -> None:
    with pytest.raises(BadCapError) as caught:
        parse_known_cap(text)
    assert not text or text not in str(caught.value)


# --- properties ---------------------------------------------------------------------------------------------

_key, _hash = st.binary(min_size=16, max_size=16), st.binary(min_size=32, max_size=32)
_number = st.integers(0, (1 << 63) - 1)
_files = st.one_of(
    st.builds(LiteralCap, st.binary(max_size=55)),
    *(st.builds(kind, _key, _hash, _number, _number, _number) for kind in (CHKReadCap, CHKVerifyCap)),
    *(st.builds(kind, _key, _hash) for kind in (SDMFWriteCap, SDMFReadCap, SDMFVerifyCap)),
    *(st.builds(kind, _key, _hash) for kind in (MDMFWriteCap, MDMFReadCap, MDMFVerifyCap)),
)
known_caps = _files | st.builds(DirectoryCap, _files)


@given(known_caps)
def test_there_and_back(cap: caps.KnownCap) -> None:
    assert parse_cap(str(cap)) == cap
    assert parse_cap(f"{cap!s}\n".encode()) == cap
    assert hash(parse_cap(str(cap))) == hash(cap)


@given(known_caps)
def test_authority_only_shrinks(cap: caps.KnownCap) -> None:
    assert cap.readonly.is_readonly
    assert cap.readonly.readonly == cap.readonly
    assert cap.readonly.storage_index == cap.storage_index
    if cap.verifier is not None:
        assert cap.verifier.is_verifier
        assert cap.verifier == cap.readonly.verifier == cap.verifier.verifier
        assert cap.verifier.storage_index == cap.storage_index
    assert cap.readonly.kind == cap.kind


@given(known_caps)
def test_repr_shows_no_secret(cap: caps.KnownCap) -> None:
    shown = repr(cap) + repr(UnknownCap(str(cap), str(cap)))
    assert "URI:" not in shown
    file = cap.file if isinstance(cap, DirectoryCap) else cap
    for name in ("key", "readkey", "writekey", "data"):
        secret = getattr(file, name, b"")
        if len(secret) > 4:
            assert repr(secret)[2:-1] not in shown
            assert b2a(secret) not in shown


_words = st.sampled_from(["URI:", "CHK:", "DIR2-", "LIT:", "SSK-RO:", "MDMF:", "ro.", "imm.", "-Verifier:", "a" * 26])
_garbage = st.lists(_words | st.text(ALPHABET + string.digits + ":\n", max_size=60) | st.text(max_size=5), max_size=8)


@given(st.binary(max_size=60) | _garbage.map("".join) | _garbage.map(lambda words: "".join(words).encode("utf-16")))
def test_any_text_is_a_cap_of_some_kind(text: str | bytes) -> None:
    cap = parse_cap(text)
    if isinstance(cap, UnknownCap):
        kept = cap.to_string()
        assert kept == text if isinstance(text, str) else kept.encode("utf-8", "surrogateescape") == text
        with pytest.raises(BadCapError):
            parse_known_cap(text)
    else:
        assert parse_cap(str(cap)) == cap


@given(st.data())
def test_one_changed_character_is_noticed_or_means_something_else(data: st.DataObject) -> None:
    text = data.draw(st.sampled_from([vector["cap"] for vector in CAPS]))
    position = data.draw(st.integers(0, len(text) - 1))
    other = text[:position] + data.draw(st.characters(codec="ascii")) + text[position + 1 :]
    cap = parse_cap(other)
    assert isinstance(cap, UnknownCap) or other == text or cap != parse_cap(text) or "Verifier" in text


# --- children -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vector", section("formats.json", "dirnode.create_errors"), ids=name_of)
def test_children_tahoe_refuses(vector: dict[str, Any]) -> None:
    cap = child_cap(vector["rw"], vector["ro"], deep_immutable=vector["deep_immutable"])
    assert isinstance(cap, UnknownCap)
    assert f"{cap.error}Error" == vector["error"]
    with pytest.raises(BadCapError):
        child_slots(cap, deep_immutable=vector["deep_immutable"])


@pytest.mark.parametrize(
    ("rw", "ro", "deep_immutable", "expected"),
    [
        (None, None, False, UnknownCap()),
        ("", "", True, UnknownCap()),
        ("lafs://w", None, False, UnknownCap("lafs://w", None, "MustNotBeUnknownRW")),
        ("ro.lafs://w", None, True, UnknownCap("ro.lafs://w", None, "MustNotBeUnknownRW")),
        ("ro.lafs://w", None, False, UnknownCap(None, "ro.lafs://w")),
        ("imm.lafs://w", None, False, UnknownCap(None, "imm.lafs://w")),
        ("imm.lafs://w", None, True, UnknownCap(None, "imm.lafs://w")),
        ("lafs://w", "lafs://r", True, UnknownCap("lafs://w", "lafs://r", "MustBeDeepImmutable")),
        ("lafs://w", "imm.lafs://r", False, UnknownCap("lafs://w", "imm.lafs://r", "MustBeDeepImmutable")),
        ("lafs://w", "URI:CHK:zz", False, UnknownCap("lafs://w", "URI:CHK:zz", "BadURI")),
        ("lafs://w", "lafs://r", False, UnknownCap("lafs://w", "ro.lafs://r")),
        ("lafs://w", "ro.lafs://r", False, UnknownCap("lafs://w", "ro.lafs://r")),
        (None, "lafs://r", False, UnknownCap(None, "ro.lafs://r")),
        (None, "imm.lafs://r", False, UnknownCap(None, "imm.lafs://r")),
        (None, "lafs://r", True, UnknownCap(None, "imm.lafs://r")),
        (None, "ro.lafs://r", True, UnknownCap(None, "imm.lafs://r")),
    ],
)
def test_the_rule_for_unknown_children(
    rw: str | None, ro: str | None, deep_immutable: bool, expected: UnknownCap
) -> None:
    assert child_cap(rw, ro, deep_immutable=deep_immutable) == expected


def test_children_of_known_kinds_come_from_one_slot() -> None:
    writer, reader, chk = (_cap(kind) for kind in ("WriteableSSKFileURI", "ReadonlySSKFileURI", "CHKFileURI"))
    assert child_cap(writer, chk, deep_immutable=False) == parse_cap(writer)
    assert child_cap(None, writer, deep_immutable=False) == parse_cap(writer)
    assert child_cap(None, reader, deep_immutable=False) == parse_cap(reader)
    assert child_cap("", f"imm.{chk}", deep_immutable=True) == parse_cap(chk)


def test_verify_caps_are_kept_like_unknown_ones() -> None:
    for kind in ("CHKFileVerifierURI", "SSKVerifierURI", "DirectoryURIVerifier"):
        cap = child_cap(None, _cap(kind), deep_immutable=False)
        assert cap == UnknownCap(None, f"ro.{_cap(kind)}")
        assert child_slots(cap, deep_immutable=False) == (b"", _cap(kind).encode())


@pytest.mark.parametrize("kind", [*FILE_KINDS, *DIRECTORY_KINDS])
def test_slots_of_known_children(kind: str) -> None:
    cap = parse_known_cap(_cap(kind))
    rw, ro = child_slots(cap, deep_immutable=False)
    assert (rw, ro) == (b"" if cap.is_readonly else str(cap).encode(), str(cap.readonly).encode())
    if cap.is_mutable:
        with pytest.raises(BadCapError, match="change"):
            child_slots(cap, deep_immutable=True)
    else:
        assert child_slots(cap, deep_immutable=True) == (rw, ro)


@pytest.mark.parametrize(
    ("cap", "deep_immutable", "slots"),
    [
        (UnknownCap(), False, (b"", b"")),
        (UnknownCap(), True, (b"", b"")),
        (UnknownCap("lafs://w", "ro.lafs://r"), False, (b"lafs://w", b"lafs://r")),
        (UnknownCap(None, "imm.lafs://r"), False, (b"", b"imm.lafs://r")),
        (UnknownCap(None, "imm.lafs://r"), True, (b"", b"lafs://r")),
        (UnknownCap("lafs://w"), False, None),
        (UnknownCap(None, "ro.lafs://r"), True, None),
        (UnknownCap("lafs://w", "imm.lafs://r"), True, None),
        (UnknownCap(None, "imm.lafs://r", "BadURI"), False, None),
    ],
)
def test_slots_of_unknown_children(cap: UnknownCap, deep_immutable: bool, slots: tuple[bytes, bytes] | None) -> None:
    if slots is None:
        with pytest.raises(BadCapError):
            child_slots(cap, deep_immutable=deep_immutable)
    else:
        assert child_slots(cap, deep_immutable=deep_immutable) == slots


@given(st.one_of(known_caps.map(str), st.text(max_size=8)), st.sampled_from(["", "ro.", "imm."]), st.booleans())
def test_what_was_stored_is_found_again(text: str, prefix: str, deep_immutable: bool) -> None:
    """Slots written from a child, read back in the same kind of directory, give the same child."""
    cap = child_cap(None, prefix + text, deep_immutable=deep_immutable)
    try:
        rw, ro = child_slots(cap, deep_immutable=deep_immutable)
    except BadCapError:
        assert isinstance(cap, UnknownCap)
        assert cap.error
        return
    again = child_cap(rw.decode(), ro.decode(), deep_immutable=deep_immutable)
    assert again == cap or (isinstance(cap, UnknownCap) and cap.ro in ("ro.", "imm."))
