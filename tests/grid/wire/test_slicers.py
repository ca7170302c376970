"""Values to bytes and back: every value vector in both vocabularies, and round trips."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grid.errors import RemoteFailure, RemoteProtocolError, Violation
from grid.wire.banana import OPEN, STRING, VOCABULARIES, TokenReader
from grid.wire.failures import FAILURE_TYPE, Copyable
from grid.wire.references import RemoteHandle
from grid.wire.slicers import UNCOPIED_BYTES_MIN, MessageWriter
from grid.wire.unslicers import Message, MessageReader, SpoiledMessage
from tests.grid.wire.trees import mentions, value_of
from tests.vectors import section

VALUES = section("foolscap.json", "values")


class NoTable:
    """Stands for a connection on which no objects are passed."""

    def their_object(self, clid: int, interface_name: bytes | None, furl: bytes | None) -> object:
        return RemoteHandle(clid, (interface_name or b"").decode(), [])

    def my_object(self, clid: int) -> object:
        raise RemoteProtocolError("no such object")

    def check_call(self, clid: int, method: bytes) -> None:
        raise Violation("no such method")


def refuse(*arguments: object) -> Any:
    raise Violation("no references here")


def encode(value: object, vocabulary: tuple[bytes, ...]) -> bytes:
    return b"".join(MessageWriter(vocabulary, refuse, refuse).value(value))


def decode(encoded: bytes, vocabulary: tuple[bytes, ...], step: int = 1 << 20) -> Any:
    """Wrap a value in an `answer`, and number so that the value's first OPEN is number 0."""
    tokens, reader = TokenReader(vocabulary), MessageReader(NoTable())
    reader.opens_received = -1
    data = b"\x7f\x88\x06\x82answer\x01\x81" + encoded + b"\x7f\x89"
    message = None
    for start in range(0, len(data), step):
        tokens.receive_data(data[start : start + step])
        while (token := tokens.next_token()) is not None:
            assert message is None
            message = reader.feed(token)
    assert isinstance(message, Message | SpoiledMessage)
    if isinstance(message, SpoiledMessage):
        raise Violation(message.reason)
    return message.items[1]


@pytest.mark.parametrize("table", [0, 1])
@pytest.mark.parametrize("vector", VALUES, ids=lambda vector: vector["value"][:30])
def test_decodes_what_foolscap_sent(vector: dict[str, Any], table: int) -> None:
    encoded = bytes.fromhex(vector[f"vocab{table}"])
    for step in (len(encoded) + 100, 1):
        found = decode(encoded, VOCABULARIES[table], step)
        expected = value_of(vector["tree"])
        if vector["value"].startswith("L=[]"):
            assert found[0] is found
        elif isinstance(expected, Copyable) and expected.type_name == FAILURE_TYPE:
            assert isinstance(found, RemoteFailure)
            assert (found.type_name, found.message) == ("builtins.KeyError", "'no such thing'")
        else:
            assert found == expected
            assert type(found) is type(expected)
            assert repr(found) == repr(expected)


@pytest.mark.parametrize("table", [0, 1])
@pytest.mark.parametrize(
    "vector", [v for v in VALUES if not mentions(v["tree"], "b:reference")], ids=lambda vector: vector["value"][:30]
)
def test_encodes_as_foolscap_does(vector: dict[str, Any], table: int) -> None:
    assert encode(value_of(vector["tree"]), VOCABULARIES[table]).hex() == vector[f"vocab{table}"]


@pytest.mark.parametrize(
    "vector", [v for v in VALUES if mentions(v["tree"], "b:reference")], ids=lambda vector: vector["value"][:30]
)
def test_shared_objects_are_shared_again(vector: dict[str, Any]) -> None:
    found = decode(bytes.fromhex(vector["vocab1"]), VOCABULARIES[1])
    assert found[0] is found[-1]


KEYS = st.one_of(st.integers(), st.binary(max_size=20), st.text(max_size=20), st.none(), st.booleans())
PLAIN = st.recursive(
    st.one_of(
        KEYS, st.floats(allow_nan=False), st.binary(min_size=UNCOPIED_BYTES_MIN, max_size=UNCOPIED_BYTES_MIN + 9)
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.tuples(inner, inner),
        st.sets(KEYS, max_size=4),
        st.frozensets(KEYS, max_size=4),
        st.dictionaries(KEYS, inner, max_size=4),
    ),
    max_leaves=15,
)


@given(PLAIN)
def test_round_trip(value: object) -> None:
    for vocabulary in VOCABULARIES:
        assert decode(encode(value, vocabulary), vocabulary) == value


def test_large_bytes_are_handed_on_uncopied() -> None:
    large = bytearray(UNCOPIED_BYTES_MIN)
    view = memoryview(large)[:]
    buffers = MessageWriter(VOCABULARIES[1], refuse, refuse).call(1, 2, "write", (0, view, large, b"small"))
    assert any(buffer is view for buffer in buffers)
    assert any(buffer is large for buffer in buffers)
    assert len(buffers) == 5


@pytest.mark.parametrize("value", [object(), [1, [object()]], "\ud800", 1 << 9000, {1: {2: range(3)}}])
def test_what_cannot_be_sent_uses_no_numbers(value: object) -> None:
    writer = MessageWriter(VOCABULARIES[1], refuse, refuse)
    with pytest.raises(Violation):
        writer.answer(1, value)
    assert writer.opens_sent == 0
    assert b"".join(writer.answer(1, None)) == bytes.fromhex("00880d870181 01880087 0189 0089")


def test_too_deep_a_value_is_not_sent() -> None:
    value: list[Any] = []
    value.append(value)
    with pytest.raises(Violation):
        encode(value, VOCABULARIES[1])


@pytest.mark.parametrize(
    "encoded",
    [
        "00 88 05 87 01 88 02 87 00 81 01 89 00 89",  # tuple that contains itself
        "00 88 03 87 01 81 01 81 01 81 02 81 00 89",  # duplicate key
        "00 88 06 87 01 88 04 87 01 89 00 89",  # set of a list
        "00 88 03 87 01 88 04 87 01 89 00 81 00 89",  # dict with a list for a key
        "00 88 08 87 01 82 ff 00 89",  # text that is not UTF-8
        "00 88 03 82 77 61 74 00 89",  # unknown opentype
        "00 88 11 87 01 81 03 82 70 62 3a 00 89",  # gift
        "00 88 07 82 64 65 63 69 6d 61 6c 01 82 78 00 89",  # decimal x
        "00 88 00 89",  # no opentype
        "00 88 0c 87 00 81 00 89",  # arguments outside a call
        "00 88 12 87 01 82 78 00 89",  # copyable of an unknown type
    ],
)
def test_violations(encoded: str) -> None:
    with pytest.raises(Violation):
        decode(bytes.fromhex(encoded), VOCABULARIES[1])


@pytest.mark.parametrize(
    "encoded",
    [
        "00 88 03 87 01 81 00 89",  # key without a value
        "00 88 02 87 05 81 00 89",  # reference to nothing
        "00 88 01 87 00 89",  # boolean without a value
        "00 88 0f 87 00 89",  # my-reference without a clid
        "00 88 10 87 01 81 00 89",  # your-reference to nothing
        "00 88 0f 87 01 82 61 00 89",  # my-reference with a string for a clid
        "00 88 00 87 01 81 00 89",  # none with something in it
    ],
)
def test_what_ends_the_connection(encoded: str) -> None:
    with pytest.raises(RemoteProtocolError):
        decode(bytes.fromhex(encoded), VOCABULARIES[1])


def test_references_to_references_cost_what_they_stand_for() -> None:
    """A few hundred bytes that stand for 2**40 items are refused, not walked through."""
    encoded = b"\x00\x88\x04\x87" + b"\x01\x88\x05\x87\x01\x81\x01\x89"
    last = 1
    opened = 2
    for _ in range(40):
        pair = b"".join(b"\x00\x88\x02\x87" + bytes((last % 128, last // 128)) + b"\x81\x00\x89" for _ in range(2))
        encoded += b"\x00\x88\x05\x87" + pair + b"\x00\x89"
        last, opened = opened, opened + 3
    with pytest.raises(Violation, match="too large"):
        decode(encoded + b"\x00\x89", VOCABULARIES[1])


def test_what_calls_itself_a_type_is_not_kept() -> None:
    reader, name = MessageReader(NoTable()), bytes(1 << 20)
    references = sys.getrefcount(name)
    for depth in range(50):
        reader.feed((OPEN, depth))
        reader.feed((STRING, name))
    assert sys.getrefcount(name) == references


@pytest.mark.parametrize(
    ("keys", "taken"),
    [
        ([number * ((1 << 61) - 1) for number in range(1000)], False),  # their hashes are all zero
        ([(number, None) for number in range(1000)], False),
        ([float(number) for number in range(1000)], False),
        (list(range(256)), True),
        ([b"%d" % number for number in range(1000)], True),
        ([(b"%d" % number, b"", b"") for number in range(1000)], True),
    ],
)
def test_few_keys_whose_hashes_a_peer_can_choose(keys: list[Any], taken: bool) -> None:
    for value in (dict.fromkeys(keys), set(keys)):
        encoded = encode(value, VOCABULARIES[1])
        if taken:
            assert decode(encoded, VOCABULARIES[1]) == value
        else:
            with pytest.raises(Violation, match="not strings"):
                decode(encoded, VOCABULARIES[1])
