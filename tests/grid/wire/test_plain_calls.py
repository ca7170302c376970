"""Plain calls: what is read at once means what it means token by token; the rest is left to the readers of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grid.errors import RemoteProtocolError
from grid.wire.banana import VOCABULARIES, ping_token
from grid.wire.calls import Broker, Event
from grid.wire.plain_calls import STRING_BYTES_MAX, read_plain_call
from grid.wire.slicers import MessageWriter
from tests.grid.wire.test_calls import Writer, pair, take


def encoded(method: str, *args: object) -> bytes:
    def refuse(value: object) -> Any:
        raise AssertionError

    return b"".join(MessageWriter(VOCABULARIES[1], refuse, refuse).call(300, 2, method, args))


@pytest.mark.parametrize(
    "args",
    [(), (0,), (5, 1 << 20), (1 << 40, b"data"), (b"secret" * 1000, 127, 128, b""), (b"x" * STRING_BYTES_MAX,)],
    ids=len,
)
def test_what_storage_clients_call_is_plain(args: Sequence[object]) -> None:
    data = encoded("read", *args)
    call = read_plain_call(b"before" + data + b"after", 6)
    assert call is not None and call.is_whole and call.end == 6 + len(data)
    assert (call.items, call.arguments) == ([300, 2, b"read"], [*args])
    assert "secret" not in repr(call) + repr(call.message())
    cut = read_plain_call(data[:-1], 0)
    assert cut is not None and not cut.is_whole


@pytest.mark.parametrize("odd", [b"x" * (STRING_BYTES_MAX + 1), -1, 1 << 64, None, True, "text", {1}, [2], (3,)])
def test_it_stops_before_what_is_not_plain(odd: object) -> None:
    data = encoded("write", 7, odd, 8)
    call = read_plain_call(data, 0)
    assert call is not None and not call.is_whole
    assert (call.items, call.arguments, call.count) == ([300, 2, b"write"], [7], 3)
    assert call.end == len(encoded("write", 7)) - len(b"\x01\x89\x00\x89")


def test_other_messages_are_not_plain() -> None:
    writer = MessageWriter(VOCABULARIES[1], lambda _: (0, None, None), lambda _: 0)
    assert read_plain_call(b"".join(writer.answer(1, None)), 0) is None
    assert read_plain_call(b"", 0) is None
    words_spelt_out = b"".join(MessageWriter((), lambda _: (0, None, None), lambda _: 0).call(1, 2, "close", ()))
    assert read_plain_call(words_spelt_out, 0) is None


VALUES = st.one_of(
    st.integers(-(1 << 70), 1 << 70),
    st.binary(max_size=40),
    st.sampled_from([b"y" * 20_000, b"z" * 70_000, None, True, "text", {1, 2}, [b"a", 1], (b"b",), {b"k": 1}]),
)
CALLS = st.tuples(
    st.sampled_from(["write", "close", "abort", "no such method"]),
    st.one_of(st.just(()), st.tuples(st.integers(0, 1 << 40), st.binary(max_size=40)), st.lists(VALUES, max_size=4)),
    st.dictionaries(st.sampled_from(["offset", "data", "other"]), VALUES, max_size=1),
)


def told(core: Broker, *pieces: bytes) -> tuple[list[Event] | str, bytes]:
    """What it makes of them: events or the reason for dropping the connection, and what it sends."""
    try:
        return core.receive_data(*pieces), take(core)
    except RemoteProtocolError as error:
        return str(error), take(core)


@given(
    calls=st.lists(CALLS, max_size=5),
    changes=st.lists(
        st.tuples(st.integers(0, 1 << 20), st.sampled_from(b"\x00\x01\x7f\x80\x81\x82\x87\x88\x89")), max_size=2
    ),
    cuts=st.lists(st.integers(0, 1 << 20), max_size=4),
    together=st.booleans(),
)
def test_it_means_the_same_token_by_token(
    calls: list[tuple[str, Sequence[object], dict[str, object]]],
    changes: list[tuple[int, int]],
    cuts: list[int],
    together: bool,
) -> None:
    target = Writer()
    caller, server, handle = pair(target)
    _, by_tokens, _ = pair(target)
    by_tokens._reads_plain_calls = False
    for method, args, keywords in calls:
        caller.send_call(handle.clid, "", method, args, keywords)
        if len(args) == 1:
            caller.send_ping()
    data = bytearray(take(caller) + ping_token(0x8E, 3))
    for place, byte in changes:
        data[place % len(data)] = byte
    edges = sorted({0, len(data), *(cut % len(data) for cut in cuts)})
    pieces = [bytes(data[begin:end]) for begin, end in pairwise(edges)]
    for some in [pieces] if together else [[piece] for piece in pieces]:
        got = told(server, *some)
        assert got == told(by_tokens, *some)
        if isinstance(got[0], str):
            return
    assert server._reader.opens_received == by_tokens._reader.opens_received
