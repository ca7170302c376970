"""The URI extension block: golden bytes, and what a reader refuses."""

from __future__ import annotations

from typing import Any

import pytest
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st

from grid.errors import FormatError
from grid.formats.hashutil import uri_extension_hash
from grid.formats.netstring import netstring
from grid.formats.segments import Segmentation, choose_segment_size
from grid.formats.ueb import SEGMENT_BYTES_MAX, UEB_BYTES_MAX, URIExtension, expected_ueb_size, read_unproven
from tests.vectors import name_of, section

CHK = section("formats.json", "chk")
HASHES = st.binary(min_size=32, max_size=32)


def extension_of(vector: dict[str, Any]) -> URIExtension:
    fields = vector["ueb_fields"]
    return URIExtension(
        size=fields["size"],
        segment_size=fields["segment_size"],
        k=fields["needed_shares"],
        n=fields["total_shares"],
        num_segments=fields["num_segments"],
        crypttext_hash=bytes.fromhex(fields["crypttext_hash"]),
        crypttext_root_hash=bytes.fromhex(fields["crypttext_root_hash"]),
        share_root_hash=bytes.fromhex(fields["share_root_hash"]),
    )


def read(data: bytes, *, k: int = 3, n: int = 10, size: int = 100, strict: bool = False) -> URIExtension:
    """Read a UEB as if the cap had its hash."""
    return URIExtension.unpack(data, ueb_hash=uri_extension_hash(data), k=k, n=n, size=size, strict=strict)


def ueb(**values: bytes) -> bytes:
    """The bytes of a UEB for 100 bytes of file in one segment, 3 of 10; `values` replace or add, b"-" removes."""
    good = {
        "crypttext_root_hash": b"c" * 32,
        "segment_size": b"102",
        "share_root_hash": b"s" * 32,
    }
    return b"".join(
        key.encode("ascii") + b":" + netstring(value) for key, value in sorted((good | values).items()) if value != b"-"
    )


@pytest.mark.parametrize("vector", CHK, ids=name_of)
def test_ueb_matches_tahoe(vector: dict[str, Any]) -> None:
    data = bytes.fromhex(vector["ueb"])
    extension = extension_of(vector)
    assert extension.pack() == data
    assert extension.hash().hex() == vector["ueb_hash"]
    k, n, size = extension.k, extension.n, extension.size
    ueb_hash = bytes.fromhex(vector["ueb_hash"])
    assert URIExtension.unpack(memoryview(data), ueb_hash=ueb_hash, k=k, n=n, size=size, strict=True) == extension
    assert expected_ueb_size(extension.segmentation, n) == len(data)


def test_three_keys_are_enough() -> None:
    extension = read(ueb(), strict=True)
    assert (extension.segment_size, extension.num_segments, extension.crypttext_hash) == (102, 1, None)
    assert (extension.crypttext_root_hash, extension.share_root_hash) == (b"c" * 32, b"s" * 32)


def test_old_and_unknown_keys_are_ignored() -> None:
    assert read(ueb(plaintext_hash=b"p" * 32, **{"some-future-key": b"x"}), strict=True) == read(ueb())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("codec_name", b"raptor"),
        ("codec_params", b"102-3-9"),
        ("needed_shares", b"4"),
        ("num_segments", b"2"),
        ("size", b"101"),
        ("tail_codec_params", b"99-3-10"),
        ("total_shares", b"11"),
    ],
)
def test_only_a_verifier_minds_contradictions(key: str, value: bytes) -> None:
    """A download takes k, N and size from the cap: the real one reads such a file, the real verifier does not."""
    data = ueb(**{key: value})
    assert read(data) == read(ueb())
    with pytest.raises(FormatError, match=key):
        read(data, strict=True)


@pytest.mark.parametrize(
    "data",
    [
        ueb(segment_size=b"-"),
        ueb(segment_size=b""),
        ueb(segment_size=b"+102"),
        ueb(segment_size=b"1_02"),
        ueb(segment_size=b"0"),
        ueb(segment_size=b"100"),  # no multiple of k
        ueb(segment_size=b"%d" % (SEGMENT_BYTES_MAX - SEGMENT_BYTES_MAX % 3 + 3)),
        ueb(segment_size=b"9" * 5000),
        ueb(share_root_hash=b"-"),
        ueb(share_root_hash=b"s" * 31),
        ueb(crypttext_root_hash=b"-"),
        ueb(crypttext_root_hash=b"c" * 33),
        ueb(crypttext_hash=b"short"),
        ueb() + ueb(),
        ueb() + b"x",
        ueb()[:-1],
        b"=" + ueb(),
        b"",
        ueb(extra=b"x" * UEB_BYTES_MAX),
    ],
)
def test_unusable_ueb(data: bytes) -> None:
    with pytest.raises(FormatError):
        read(data)


def test_the_limit_on_size_is_the_real_verifiers() -> None:
    filler = UEB_BYTES_MAX - 1 - len(ueb(x=b"." * 1000)) + 1000
    longest = ueb(x=b"." * filler)
    assert len(longest) == UEB_BYTES_MAX - 1
    assert read(longest) == read(ueb())
    with pytest.raises(FormatError):
        read(ueb(x=b"." * (filler + 1)))


@pytest.mark.parametrize(("k", "n", "size"), [(0, 0, 0), (0, 10, 100), (11, 10, 100), (3, 257, 100), (3, 10, 0)])
def test_impossible_caps(k: int, n: int, size: int) -> None:
    """Such caps parse; nothing can be read with them."""
    with pytest.raises(FormatError):
        read(ueb(), k=k, n=n, size=size)


def test_too_many_segments() -> None:
    """A cap may claim any size: it must not decide how large our hash trees become."""
    with pytest.raises(FormatError, match="segments"):
        read(ueb(segment_size=b"3"), size=1 << 50)


@given(st.data())
def test_any_other_byte_is_refused(data: st.DataObject) -> None:
    """The hash in the cap covers every byte."""
    packed = bytes.fromhex(CHK[0]["ueb"])
    position = data.draw(st.integers(0, len(packed) - 1))
    changed = packed[:position] + bytes([packed[position] ^ data.draw(st.integers(1, 255))]) + packed[position + 1 :]
    fields = CHK[0]["ueb_fields"]
    with pytest.raises(FormatError):
        URIExtension.unpack(changed, ueb_hash=bytes.fromhex(CHK[0]["ueb_hash"]), k=3, n=10, size=fields["size"])


@given(
    size=st.integers(1, 1 << 36),
    k=st.integers(1, 256),
    more=st.integers(0, 255),
    maximum=st.sampled_from([1 << 17, 1 << 20]),
    hashes=st.tuples(HASHES, HASHES, HASHES),
)
def test_unpack_undoes_pack(size: int, k: int, more: int, maximum: int, hashes: tuple[bytes, bytes, bytes]) -> None:
    n = min(256, k + more)
    segmentation = Segmentation(size=size, k=k, segment_size=choose_segment_size(size, k, maximum))
    extension = URIExtension(size, segmentation.segment_size, k, n, segmentation.num_segments, *hashes)
    packed = extension.pack()
    assert len(packed) == expected_ueb_size(segmentation, n) < UEB_BYTES_MAX
    assert read(packed, k=k, n=n, size=size, strict=True) == extension


@given(
    st.lists(st.tuples(st.sampled_from(["segment_size", "size", "share_root_hash", "x y"]), st.binary()), max_size=6)
)
def test_garbage_raises_nothing_else(pairs: list[tuple[str, bytes]]) -> None:
    data = b"".join(key.encode("ascii") + b":" + netstring(value) for key, value in pairs)
    with pytest.raises(FormatError):
        read(data)


@given(st.binary(max_size=100))
def test_noise_raises_nothing_else(data: bytes) -> None:
    with pytest.raises(FormatError):
        read(data)


def test_repr_shows_no_hashes() -> None:
    extension = evolve(extension_of(CHK[0]), crypttext_hash=b"Q" * 32)
    assert "QQQQ" not in repr(extension)


@pytest.mark.parametrize("vector", CHK, ids=name_of)
def test_a_ueb_tells_what_the_cap_would(vector: dict[str, Any]) -> None:
    assert read_unproven(bytes.fromhex(vector["ueb"])) == extension_of(vector)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"needed_shares": b"3", "total_shares": b"10"},
        {"needed_shares": b"3", "total_shares": b"2", "size": b"100"},
        {"needed_shares": b"3", "total_shares": b"10", "size": b"0"},
        {"needed_shares": b"3", "total_shares": b"10", "size": b"x"},
        {"needed_shares": b"3", "total_shares": b"10", "size": b"100", "num_segments": b"2"},
        {"needed_shares": b"3", "total_shares": b"10", "size": b"100", "codec_params": b"102-3-11"},
    ],
)
def test_a_ueb_that_does_not_agree_with_itself(values: dict[str, bytes]) -> None:
    with pytest.raises(FormatError):
        read_unproven(ueb(**values))


@given(st.binary(max_size=3000))
def test_only_the_named_error_escapes_from_what_nobody_vouches_for(data: bytes) -> None:
    with pytest.raises(FormatError):
        read_unproven(data)
