"""Tokens: golden bytes, every cut of the input, limits, and garbage."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grid.errors import RemoteProtocolError
from grid.wire.banana import (
    CLOSE,
    FLOAT,
    INT,
    INT_MAX,
    LONGINT,
    NEG,
    OPEN,
    PIECES_BYTES_MIN,
    PING,
    PONG,
    STRING,
    STRING_BYTES_MAX,
    VOCABULARIES,
    Pieces,
    Token,
    TokenReader,
    error_token,
    float_token,
    header,
    integer_token,
    ping_token,
    vocabulary_hash,
)
from tests.vectors import section

TOKENS = st.one_of(
    st.binary(max_size=300).map(lambda body: (STRING, body)),
    st.integers(-(1 << 200), 1 << 200).map(
        lambda n: (INT if 0 <= n <= INT_MAX else NEG if -INT_MAX - 1 <= n < 0 else LONGINT, n)
    ),
    st.floats(allow_nan=False).map(lambda value: (FLOAT, value)),
    st.tuples(st.sampled_from((OPEN, CLOSE, PING, PONG)), st.integers(0, 1 << 30)),
)


def encode(token: Token) -> bytes:
    kind, value = token
    if kind == STRING:
        return header(len(value)) + b"\x82" + value
    if kind in (INT, NEG, LONGINT):
        return integer_token(value)
    if kind == FLOAT:
        return float_token(value)
    return ping_token(kind, value) if kind in (PING, PONG) else header(value) + bytes((kind,))


def read_at_once(reader: TokenReader, *pieces: bytes) -> list[Token]:
    """As read_all(), of pieces that came together."""
    reader.receive_data(*pieces)
    return read_all(reader, b"")


def read_all(reader: TokenReader, *pieces: bytes) -> list[Token]:
    tokens = []
    for piece in pieces:
        reader.receive_data(piece)
        while (token := reader.next_token()) is not None:
            tokens.append(token)
    return tokens


def test_vocabularies_are_those_of_foolscap() -> None:
    for index, table in section("foolscap.json", "vocab").items():
        assert [word.decode() for word in VOCABULARIES[int(index)]] == table["words"]
        assert vocabulary_hash(int(index)) == table["hash"]


@given(st.lists(TOKENS, max_size=8), st.data())
def test_any_cut_gives_the_same_tokens(tokens: list[Token], data: st.DataObject) -> None:
    encoded = b"".join(map(encode, tokens))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(encoded)), max_size=6)))
    pieces = [encoded[a:b] for a, b in zip([0, *cuts], [*cuts, len(encoded)], strict=True)]
    assert read_all(TokenReader(), *pieces) == tokens
    assert read_all(TokenReader(), *(encoded[i : i + 1] for i in range(len(encoded)))) == tokens


@given(st.lists(TOKENS, min_size=1, max_size=8), st.data())
def test_pieces_that_come_together_give_the_same_tokens(tokens: list[Token], data: st.DataObject) -> None:
    stream = b"".join(map(encode, tokens))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=12)))
    pieces = [stream[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    split = data.draw(st.integers(0, len(pieces) - 1))
    reader = TokenReader()
    got = read_at_once(reader, *pieces[:split]) if split else []
    assert got + read_at_once(reader, *pieces[split:]) == tokens


@given(st.binary(max_size=200), st.binary(max_size=200))
def test_garbage_raises_the_protocol_error_or_nothing(first: bytes, second: bytes) -> None:
    with contextlib.suppress(RemoteProtocolError):
        read_all(TokenReader(VOCABULARIES[1]), first, second)


@pytest.mark.parametrize(
    ("data", "token"),
    [
        (b"\x81", (INT, 0)),
        (b"\x00\x81", (INT, 0)),
        (b"\x8e", (PING, 0)),
        (b"\x01" + b"\x00" * 63 + b"\x8e", (PING, 1)),
        (b"\x7f\x7f\x7f\x7f\x07\x81", (INT, INT_MAX)),
        (b"\x00" * 14 + b"\x04\x81", (INT, 1 << 100)),
        (b"\x04\x85\x80\x00\x00\x00", (LONGINT, 1 << 31)),
        (b"\x04\x86\x80\x00\x00\x01", (LONGINT, -(1 << 31) - 1)),
        (b"\x18\x87", (STRING, b"attrdict")),
    ],
)
def test_odd_but_legal(data: bytes, token: Token) -> None:
    assert read_all(TokenReader(VOCABULARIES[1]), data) == [token]


@pytest.mark.parametrize(
    "data",
    [
        b"\x01" * 65,
        b"\x01" * 65 + b"\x81",
        b"\x80",
        b"\x8b",
        b"\x8c",
        b"\xff",
        b"\x19\x87",
        header(STRING_BYTES_MAX + 1) + b"\x82",
        header(1001) + b"\x8d",
        header(1025) + b"\x85",
    ],
)
def test_refused_before_any_body_is_there(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        read_all(TokenReader(VOCABULARIES[1]), data)


def test_long_string_in_many_pieces_is_not_scanned_again() -> None:
    body = bytes(range(256)) * 4096
    encoded = header(len(body)) + b"\x82" + body + b"\x05\x81"
    pieces = [encoded[i : i + 1000] for i in range(0, len(encoded), 1000)]
    (kind, received), after = read_all(TokenReader(), *pieces)
    assert isinstance(received, Pieces) and (kind, len(received), after) == (STRING, len(body), (INT, 5))
    assert bytes(received) == b"".join(received.parts) == body


@pytest.mark.parametrize(("length", "kind"), [(PIECES_BYTES_MIN - 1, bytes), (PIECES_BYTES_MIN, Pieces)])
def test_only_long_strings_stay_in_pieces(length: int, kind: type) -> None:
    encoded = header(length) + b"\x82" + bytes(length)
    assert [type(body) for _, body in read_all(TokenReader(), encoded[:9000], encoded[9000:])] == [kind]
    assert read_all(TokenReader(), encoded) == [(STRING, bytes(length))]


def test_error_token_is_cut_to_what_peers_take() -> None:
    ((_, body),) = read_all(TokenReader(), error_token("x" * 2000))
    assert body == b"x" * 1000
