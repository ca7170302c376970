"""One connection's core: recorded malformed input and odd answers get foolscap's verdict; references are counted."""

from __future__ import annotations

import contextlib
import gc
import sys
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grid.errors import RemoteFailure, RemoteProtocolError, Violation
from grid.wire.banana import PIECES_BYTES_MIN, VOCABULARIES, Pieces, header
from grid.wire.calls import (
    RELEASES_BATCH,
    STRANGER_STRING_BYTES_MAX,
    Answered,
    Broker,
    Event,
    Failed,
    InboundCall,
)
from grid.wire.failures import Copyable, failure_of, failure_to_send, trim
from grid.wire.references import Referenceable, RemoteHandle
from grid.wire.remote_interfaces import RIBucketWriter, RIStorageServer
from grid.wire.schemas import RemoteInterface
from tests.grid.wire.trees import decode_trees
from tests.vectors import section

MALFORMED = [c for c in section("foolscap.json", "malformed_input") if c.get("sent_after_negotiation_hex")]
ODD_ANSWERS = [c for c in section("foolscap.json", "odd_answers") if c["answer_hex"]]
PEER = "b" * 32


class Writer(Referenceable):
    remote_interface: ClassVar[RemoteInterface | None] = RIBucketWriter


class OneName:
    def __init__(self, target: Referenceable | None = None) -> None:
        self.target = target

    def object_by_name(self, name: str) -> Referenceable | None:
        return self.target if name == "target" else None

    def furl_of(self, target: Referenceable) -> str | None:
        return None


def broker(target: Referenceable | None = None) -> Broker:
    return Broker(vocabulary_index=1, peer_tub_id=PEER, names=OneName(target))


def take(core: Broker) -> bytes:
    return b"".join(core.data_to_send())


def pass_on(sender: Broker, receiver: Broker) -> list[Event]:
    return receiver.receive_data(take(sender))


def pair(target: Referenceable) -> tuple[Broker, Broker, RemoteHandle]:
    """A caller, a server that holds `target`, and the caller's handle on it."""
    caller, server = broker(), broker(target)
    caller.send_call(0, "", "getReferenceByName", (), {"name": b"target"})
    assert pass_on(caller, server) == []
    (event,) = pass_on(server, caller)
    assert isinstance(event, Answered)
    assert isinstance(event.value, RemoteHandle)
    return caller, server, event.value


@pytest.mark.parametrize("step", [1, 1000])
@pytest.mark.parametrize("case", MALFORMED, ids=lambda case: case["case"])
def test_malformed_input_gets_foolscaps_verdict(case: dict[str, Any], step: int) -> None:
    core = broker()
    data = bytes.fromhex(case["sent_after_negotiation_hex"])
    expected = bytes.fromhex(case["received_hex"])

    def feed() -> None:
        for start in range(0, len(data), step):
            assert core.receive_data(data[start : start + step]) == []

    if case["closed"]:
        with pytest.raises(RemoteProtocolError):
            feed()
        # Where foolscap said why, so do we; the words are our own.
        assert (b"\x8d" in take(core)) == (b"\x8d" in expected)
        return
    feed()
    mine, theirs = decode_trees(take(core), VOCABULARIES[1]), decode_trees(expected, VOCABULARIES[1])
    assert [reply[:3] for reply in mine if isinstance(reply, list)] == [
        reply[:3] for reply in theirs if isinstance(reply, list)
    ]
    assert [reply for reply in mine if not isinstance(reply, list)] == [
        reply for reply in theirs if not isinstance(reply, list)
    ]
    for reply in mine:
        if isinstance(reply, list):
            assert b"foolscap.tokens.Violation" in reply[3]


@pytest.mark.parametrize("case", ODD_ANSWERS, ids=lambda case: case["case"])
def test_odd_answers_get_foolscaps_verdict(case: dict[str, Any]) -> None:
    core = broker()
    data = bytes.fromhex(case["answer_hex"])
    core._next_reqid = data[4]
    core.send_call(1, "", "anything", ())
    take(core)
    core._reader.opens_received = data[0]
    if not case["still_connected"]:
        with pytest.raises(RemoteProtocolError):
            core.receive_data(data)
        return
    (event,) = core.receive_data(data)
    seen = case["seen_by_caller"]
    if seen.startswith("Violation"):
        assert isinstance(event, Failed)
        assert isinstance(event.error, Violation)
    elif seen.startswith("RemoteException"):
        assert isinstance(event, Failed)
        assert isinstance(event.error, RemoteFailure)
        assert (event.error.short_type, event.error.message) == ("ValueError", "v")
    else:
        assert isinstance(event, Answered)
        assert isinstance(event.value, RemoteHandle) if seen == "RemoteReference" else repr(event.value) == seen


def test_call_and_answer() -> None:
    writer = Writer()
    caller, server, handle = pair(writer)
    assert handle.interface_name == "RIBucketWriter"
    reqid = caller.send_call(handle.clid, handle.interface_name, "write", (7, memoryview(b"data")))
    (call,) = pass_on(caller, server)
    assert call == InboundCall(reqid, writer, "write", (7, b"data"), {})
    server.send_answer(reqid, None)
    assert pass_on(server, caller) == [Answered(reqid, None)]


@pytest.mark.parametrize(
    ("method", "arguments", "keywords", "reason"),
    [
        ("write", (7,), {}, "missing"),
        ("write", (7, b"", b""), {}, "too many"),
        ("write", (7, "text"), {}, "data"),
        ("write", (True, b""), {}, "offset"),
        ("write", (1 << 64, b""), {}, "offset"),
        ("write", (7, b""), {"data": b""}, "unknown or repeated"),
        ("write", (7, b""), {"more": b""}, "unknown or repeated"),
        ("read", (), {}, "not defined"),
        ("__init__", (), {}, "not defined"),
    ],
)
def test_calls_that_break_the_schema_are_answered_with_a_violation(
    method: str, arguments: tuple[Any, ...], keywords: dict[str, Any], reason: str
) -> None:
    caller, server, handle = pair(Writer())
    caller.send_call(handle.clid, handle.interface_name, method, arguments, keywords)
    assert pass_on(caller, server) == []
    (event,) = pass_on(server, caller)
    assert isinstance(event, Failed)
    assert isinstance(event.error, RemoteFailure)
    assert event.error.type_name == "foolscap.tokens.Violation"
    assert reason in event.error.message


def test_keyword_arguments_are_put_in_order() -> None:
    writer = Writer()
    caller, server, handle = pair(writer)
    reqid = caller.send_call(handle.clid, "", "write", (), {"data": b"x", "offset": 3})
    assert pass_on(caller, server) == [InboundCall(reqid, writer, "write", (3, b"x"), {})]


def test_answers_that_break_the_schema_are_violations() -> None:
    caller, server, handle = pair(Writer())
    reqid = caller.send_call(handle.clid, handle.interface_name, "close", ())
    pass_on(caller, server)
    server.send_answer(reqid, b"not None")
    (event,) = pass_on(server, caller)
    assert isinstance(event, Failed)
    assert isinstance(event.error, Violation)


def test_an_answer_that_cannot_be_sent_is_an_error() -> None:
    caller, server, handle = pair(Writer())
    reqid = caller.send_call(handle.clid, handle.interface_name, "close", ())
    pass_on(caller, server)
    server.send_answer(reqid, object())
    (event,) = pass_on(server, caller)
    assert isinstance(event, Failed)


def test_a_call_that_cannot_be_sent_leaves_nothing_behind() -> None:
    caller, server, handle = pair(Writer())
    canary = Referenceable()
    with pytest.raises(Violation):
        caller.send_call(handle.clid, "", "write", (canary, object()))
    assert take(caller) == b""
    assert caller._tables._ours == {}
    reqid = caller.send_call(handle.clid, "RIBucketWriter", "close", ())
    (call,) = pass_on(caller, server)
    assert isinstance(call, InboundCall)
    assert call.reqid == reqid


def test_a_reference_goes_there_and_comes_home() -> None:
    caller, server, handle = pair(Referenceable())
    canary = Referenceable()
    caller.send_call(handle.clid, "", "echo", ([canary, canary],))
    (call,) = pass_on(caller, server)
    assert isinstance(call, InboundCall)
    ((first, second),) = call.arguments
    assert (first.clid, second.clid) == (1, 1)
    server.send_answer(call.reqid, [first, second])
    (event,) = pass_on(server, caller)
    assert isinstance(event, Answered)
    assert event.value[0] is canary
    assert event.value[1] is canary


def test_released_references_are_given_back_with_their_count() -> None:
    caller, server, handle = pair(Writer())
    other = [_again(caller, server) for _ in range(2)]
    handle.release()
    handle.release()
    caller.flush_releases()
    assert take(caller) == b""  # two handles are still held
    for again in other:
        again.release()
    caller.flush_releases()
    assert pass_on(caller, server) == []
    assert server._tables._ours == {}
    assert pass_on(server, caller) == []
    assert caller._tables._theirs == {}


def _again(caller: Broker, server: Broker) -> RemoteHandle:
    caller.send_call(0, "", "getReferenceByName", (), {"name": b"target"})
    pass_on(caller, server)
    (event,) = pass_on(server, caller)
    assert isinstance(event, Answered)
    assert isinstance(event.value, RemoteHandle)
    return event.value


def test_an_object_that_arrives_while_it_is_given_back_stays() -> None:
    caller, server, handle = pair(Writer())
    caller.send_call(0, "", "getReferenceByName", (), {"name": b"target"})
    pass_on(caller, server)  # the answer, short form, is on its way
    handle.release()
    caller.flush_releases()
    given_back = take(caller)
    (event,) = pass_on(server, caller)
    assert isinstance(event, Answered)
    assert event.value.interface_name == "RIBucketWriter"
    assert server.receive_data(given_back) == []
    pass_on(server, caller)
    event.value.release()
    caller.flush_releases()
    pass_on(caller, server)
    pass_on(server, caller)
    assert (server._tables._ours, caller._tables._theirs) == ({}, {})


def test_forgotten_handles_are_given_back_in_batches() -> None:
    caller, server, handle = pair(Referenceable())
    server_calls = 0
    for _ in range(RELEASES_BATCH + 1):
        reqid = caller.send_call(handle.clid, "", "new", ())
        for call in pass_on(caller, server):
            assert isinstance(call, InboundCall)
            server.send_answer(reqid, Referenceable())
            server_calls += 1
        pass_on(server, caller)
    gc.collect()
    assert server_calls == RELEASES_BATCH + 1
    assert len(server._tables._ours) <= 3
    assert caller.releases_waiting <= 2


def test_request_ids_wrap_around() -> None:
    caller, server, handle = pair(Writer())
    caller._next_reqid = (1 << 31) - 1
    first = caller.send_call(handle.clid, "RIBucketWriter", "close", ())
    assert (first, caller.send_call(handle.clid, "RIBucketWriter", "close", ())) == ((1 << 31) - 1, 1)
    assert len(pass_on(caller, server)) == 2


def test_a_request_id_in_use_is_fatal() -> None:
    caller, server, handle = pair(Writer())
    for _ in range(2):
        caller._next_reqid = 5
        caller._waiting.pop(5, None)
        caller.send_call(handle.clid, "RIBucketWriter", "close", ())
    with pytest.raises(RemoteProtocolError, match="in use"):
        pass_on(caller, server)


def test_a_handle_of_another_connection_cannot_be_sent() -> None:
    _, _, foreign = pair(Referenceable())
    caller, _, handle = pair(Referenceable())
    with pytest.raises(Violation):
        caller.send_call(handle.clid, "", "echo", (foreign,))


def test_errors_are_trimmed_by_encoded_length() -> None:
    sent = failure_to_send(RemoteFailure("x" * 300, "ü" * 600))
    assert len(sent.attributes[b"value"]) <= 1000
    assert len(sent.attributes[b"type"]) <= 200
    assert failure_of(sent.attributes).message.endswith("ü..")
    assert trim("é" * 3, 6) == "é".encode() * 3


def test_what_a_bug_says_is_not_sent() -> None:
    sent: Copyable = failure_to_send(ValueError("URI:DIR2:secret"))
    assert sent.attributes[b"value"] == b""
    assert sent.attributes[b"type"] == b"builtins.ValueError"


def test_what_a_peer_says_goes_wrong_is_fit_for_a_log() -> None:
    attributes = {b"type": b"a.B\r", b"value": b"no\n2026 ERROR \x1b[2J", b"traceback": b"", b"parents": []}
    assert str(failure_of(attributes)) == "remote B?: no?2026 ERROR ?[2J"


def test_arguments_are_not_shown() -> None:
    caller, server, handle = pair(Writer())
    caller.send_call(handle.clid, RIBucketWriter.name, "write", (0, b"a secret"))
    (event,) = pass_on(caller, server)
    assert isinstance(event, InboundCall) and event.arguments == (0, b"a secret")
    assert "secret" not in repr(event)


class Plain(Referenceable):
    remote_interface = None


def arguments_in_pieces(method: str, interface: RemoteInterface, target: Referenceable, *args: object) -> object:
    """What a call's arguments are when it arrives in pieces of 1,000 bytes."""
    caller, server, handle = pair(target)
    caller.send_call(handle.clid, interface.name, method, args)
    sent = take(caller)
    (event,) = [event for i in range(0, len(sent), 1000) for event in server.receive_data(sent[i : i + 1000])]
    assert isinstance(event, InboundCall)
    return event.arguments


LONG = bytes(range(256)) * (PIECES_BYTES_MIN // 256)


def test_what_is_to_be_written_stays_in_pieces() -> None:
    (offset, data) = arguments_in_pieces("write", RIBucketWriter, Writer(), 5, LONG)
    assert isinstance(data, Pieces) and (offset, bytes(data)) == (5, LONG)
    assert "\\x" not in repr(data)


def test_other_long_strings_are_joined() -> None:
    assert arguments_in_pieces("any", RIBucketWriter, Plain(), LONG, [LONG]) == (LONG, [LONG])
    secrets = (b"w" * 32, b"r" * 32, b"c" * 32)
    writes = {3: ([], [(0, LONG)], None)}
    arguments = (b"s" * 16, secrets, writes, [])
    target = Writer()
    target.remote_interface = RIStorageServer
    assert arguments_in_pieces("slot_testv_and_readv_and_writev", RIStorageServer, target, *arguments) == arguments


def test_a_long_string_in_an_answer_is_joined() -> None:
    caller, server, handle = pair(Plain())
    reqid = caller.send_call(handle.clid, "", "any", ())
    server.receive_data(take(caller))
    server.send_answer(reqid, LONG)
    sent = take(server)
    (event,) = [event for i in range(0, len(sent), 1000) for event in caller.receive_data(sent[i : i + 1000])]
    assert event == Answered(reqid, LONG)


def test_pongs_that_are_not_taken_count_for_the_memory_they_cost() -> None:
    core = broker()
    core.receive_data(b"\x01\x8e" * 10_000)
    reply_bytes, buffers = core.reply_bytes, core.data_to_send()
    assert reply_bytes >= sum(map(sys.getsizeof, buffers))


def test_interface_schemas_take_what_is_sent() -> None:
    bound = RIStorageServer.methods["slot_testv_and_readv_and_writev"].bind(
        (
            b"s" * 16,
            (b"w" * 32, b"r" * 32, b"c" * 32),
            {0: ([(0, 1, b"eq", b"")], [(0, b"data")], None), 1: ([], [], 0)},
            [(0, 10)],
        ),
        {},
    )
    assert len(bound) == 4


PIECES = st.lists(
    st.one_of(
        st.binary(max_size=6),
        st.sampled_from([bytes((kind,)) for kind in range(0x80, 0x90)]),
        st.sampled_from([bytes((number, 0x87)) for number in range(26)]),
        st.sampled_from(
            [b"\x00\x88", b"\x01\x88", b"\x00\x89", b"\x01\x89", b"\x00\x81", b"\x01\x81", b"\x05\x82hello"]
        ),
    ),
    max_size=30,
)


@settings(max_examples=300)
@given(PIECES)
def test_garbage_raises_the_protocol_error_or_nothing(pieces: list[bytes]) -> None:
    core = broker(Writer())
    core.send_call(1, "", "method", ())
    try:
        for piece in pieces:
            core.receive_data(piece)
    except RemoteProtocolError:
        pass


RECORDED = [
    bytes.fromhex(block["hex"])
    for transcript in section("foolscap.json", "transcripts")
    for block in transcript["blocks"]
    if block.get("phase") == "banana" and len(block["hex"]) < 2000
]


@settings(max_examples=300)
@given(st.lists(st.sampled_from(RECORDED), min_size=1, max_size=5), st.data())
def test_damaged_recordings_raise_the_protocol_error_or_nothing(messages: list[bytes], data: st.DataObject) -> None:
    core = broker(Writer())
    damaged = bytearray(b"".join(messages))
    for _ in range(data.draw(st.integers(0, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(RemoteProtocolError):
        core.receive_data(bytes(damaged))


def test_strangers_must_be_brief() -> None:
    """Who knows a name of ours may send long strings, and so may who answers us; nobody else."""
    long_string = header(STRANGER_STRING_BYTES_MAX + 1) + b"\x82"
    with pytest.raises(RemoteProtocolError, match="too large"):
        broker(Writer()).receive_data(long_string)
    asked = broker()
    asked.send_call(0, "", "getReferenceByName", (), {"name": b"target"})
    assert asked.receive_data(long_string) == []
    for name, is_known in ((b"target", True), (b"guess", False)):
        caller, server = broker(), broker(Writer())
        caller.send_call(0, "", "getReferenceByName", (), {"name": name})
        pass_on(caller, server)
        if is_known:
            assert server.receive_data(long_string) == []
        else:
            with pytest.raises(RemoteProtocolError, match="too large"):
                server.receive_data(long_string)
