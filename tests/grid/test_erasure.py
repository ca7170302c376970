"""The erasure code against zfec's blocks as Tahoe-LAFS 1.20 stores them."""

from __future__ import annotations

import random
from hashlib import sha256
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grid.erasure import CRSDecoder, CRSEncoder, Decoder, Encoder, split_segment
from grid.errors import FormatError
from tests.vectors import expand, name_of, section


@pytest.mark.parametrize("vector", section("formats.json", "zfec"), ids=name_of)
def test_rows_and_blocks_are_zfecs(vector: dict[str, Any]) -> None:
    k, n = vector["k"], vector["n"]
    encoder = Encoder(k, n)
    blocks = [bytes(block) for block in encoder.encode(split_segment(expand(vector["input"]), k))]
    assert sha256(b"".join(blocks)).hexdigest() == vector["blocks_sha256"]
    assert [block.hex() for block in blocks] == vector.get("blocks", [block.hex() for block in blocks])
    # Coding the identity gives the generator's rows: column c is what piece c alone becomes.
    identity = [bytes(int(row == column) for column in range(k)) for row in range(k)]
    rows = [bytes(row) for row in encoder.encode(identity)]
    assert sha256(b"".join(rows)).hexdigest() == vector["rows_sha256"]
    assert [row.hex() for row in rows] == vector.get("rows", [row.hex() for row in rows])


@settings(max_examples=60)
@given(st.data())
def test_any_k_blocks_give_the_segment_back(data: st.DataObject) -> None:
    k = data.draw(st.integers(1, 20))
    n = data.draw(st.integers(k, 30))
    segment = data.draw(st.binary(min_size=1, max_size=200))
    chosen = data.draw(st.permutations(range(n)))[:k]
    pieces = split_segment(segment, k)
    blocks = Encoder(k, n).encode(pieces, chosen)
    for number, block in zip(chosen, blocks, strict=True):
        assert (block is pieces[number]) if number < k else isinstance(block, bytes)
    decoded = b"".join(Decoder(k, n).decode([memoryview(block) for block in blocks], chosen))
    assert decoded[: len(segment)] == segment
    assert decoded[len(segment) :] == bytes(-len(segment) % k)


@pytest.mark.parametrize(("k", "n"), [(100, 256), (256, 256), (1, 256)])
def test_limits_of_the_field(k: int, n: int) -> None:
    rng = random.Random(k)
    segment = rng.randbytes(3 * k + 1)
    chosen = rng.sample(range(n), k)
    blocks = Encoder(k, n).encode(split_segment(segment, k), chosen)
    assert b"".join(Decoder(k, n).decode(blocks, chosen)).startswith(segment)


@given(st.binary(max_size=60), st.integers(1, 70))
def test_pieces_are_equal_and_padded_at_the_end(data: bytes, k: int) -> None:
    pieces = split_segment(data, k)
    assert len(pieces) == k
    assert {len(piece) for piece in pieces} == {-(-len(data) // k)}
    joined = b"".join(pieces)
    assert joined == data.ljust(len(joined), b"\0")


def test_a_whole_segment_is_not_copied() -> None:
    data = bytearray(12)
    pieces = split_segment(data, 3)
    data[11] = 7
    assert pieces[2][3] == 7


@pytest.mark.parametrize(("k", "n"), [(0, 1), (2, 1), (1, 257), (257, 257), (-1, 3)])
def test_impossible_codes(k: int, n: int) -> None:
    for coder in (Encoder, Decoder):
        with pytest.raises(FormatError):
            coder(k, n)
    with pytest.raises(FormatError):
        CRSEncoder().set_params(6, k, n)


@pytest.mark.parametrize(
    ("blocks", "numbers"),
    [([b"a"], [0]), ([b"a", b"bb"], [0, 1]), ([b"a", b"b"], [1, 1]), ([b"a", b"b"], [0, 5]), ([b"a", b"b"], [-1, 0])],
)
def test_blocks_that_cannot_be_decoded(blocks: list[bytes], numbers: list[int]) -> None:
    with pytest.raises(ValueError, match="block"):
        Decoder(2, 5).decode(blocks, numbers)


@pytest.mark.parametrize(("pieces", "numbers"), [([b"a"], None), ([b"a", b"bb"], None), ([b"a", b"b"], [5])])
def test_pieces_that_cannot_be_encoded(pieces: list[bytes], numbers: list[int] | None) -> None:
    with pytest.raises(ValueError, match="block"):
        Encoder(2, 5).encode(pieces, numbers)


def test_the_interfaces_of_2008() -> None:
    encoder, decoder = CRSEncoder(), CRSDecoder()
    encoder.set_params(57, 3, 10)
    assert (encoder.get_encoder_type(), encoder.get_serialized_params()) == ("crs", b"57-3-10")
    assert encoder.get_block_size() == 19
    data = random.Random(1).randbytes(57)
    blocks, numbers = encoder.encode_proposal(data, [9, 0, 4])
    assert numbers == [9, 0, 4]
    assert len(encoder.encode_proposal(data)[0]) == 10
    decoder.set_serialized_params(encoder.get_serialized_params())
    assert decoder.get_needed_shares() == 3
    assert b"".join(decoder.decode(blocks, numbers)) == data
    with pytest.raises(ValueError, match="announced"):
        encoder.encode_proposal(data + b"x")
    with pytest.raises(FormatError):
        encoder.set_params(56, 3, 10)


@given(st.binary(max_size=12) | st.from_regex(rb"[0-9]{0,3}-[0-9]{0,3}-[0-9]{0,4}"))
def test_codec_parameters_from_afar(params: bytes) -> None:
    decoder = CRSDecoder()
    try:
        decoder.set_serialized_params(params)
    except FormatError:
        return
    assert 1 <= decoder.get_needed_shares() <= 256
