"""Negotiation against transcripts of real tubs, whole and byte by byte, and against every broken hello on record."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grid.errors import NegotiationError
from grid.wire.banana import TokenReader
from grid.wire.duplicates import ConnectionRecords, DuplicateConnectionError
from grid.wire.negotiation import (
    PLAINTEXT_RESPONSE,
    TEXT_BYTES_MAX,
    Agreement,
    Negotiation,
    PlaintextRefusalError,
    State,
    TextBuffer,
    check_response,
    pack_block,
    parse_block,
    plaintext_request,
    read_request,
)
from tests.vectors import section

TRANSCRIPTS = section("foolscap.json", "transcripts")
HELLO_CASES = [
    case for case in section("foolscap.json", "malformed_input") if not case.get("sent_after_negotiation_hex")
]
PROBED_INCARNATION = "6158650e4343d7f1"


def blocks_of(transcript: dict[str, Any], direction: str, phase: str) -> list[bytes]:
    return [
        bytes.fromhex(block["hex"])
        for block in transcript["blocks"]
        if block.get("dir") == direction and block.get("phase") == phase
    ]


def parse(data: bytes) -> dict[str, str]:
    return parse_block(data.removesuffix(b"\r\n\r\n"))


@pytest.mark.parametrize("step", [1, 10_000])
@pytest.mark.parametrize("transcript", TRANSCRIPTS, ids=lambda t: t["label"])
def test_says_what_foolscap_said(transcript: dict[str, Any], step: int) -> None:
    (sent,) = blocks_of(transcript, ">", "hello")
    (received,) = blocks_of(transcript, "<", "hello")
    mine, theirs = parse(sent), parse(received)
    dialled = "last-connection" in mine
    records = ConnectionRecords(mine["my-incarnation"])
    if dialled:
        incarnation, number = mine["last-connection"].split()
        records.remember_told(theirs["my-tub-id"], (incarnation, int(number)))
    negotiation = Negotiation(
        records=records,
        my_tub_id=mine["my-tub-id"],
        certificate_tub_id=lambda: theirs["my-tub-id"],
        expected_tub_id=theirs["my-tub-id"] if dialled else None,
    )
    assert negotiation.hello() == sent
    decisions = blocks_of(transcript, "<", "decision")
    stream = received + b"".join(decisions) + b"first banana"
    if any("error" in parse(decision) for decision in decisions):
        with pytest.raises(DuplicateConnectionError):
            negotiation.receive_data(stream)
        assert negotiation.take_outgoing() == b""
        return
    agreement: Agreement | None = None
    while agreement is None:
        agreement = negotiation.receive_data(stream[:step])
        stream = stream[step:]
    assert negotiation.take_outgoing() == b"".join(blocks_of(transcript, ">", "decision"))
    assert agreement.rest + stream == b"first banana"
    assert (agreement.peer_tub_id, agreement.vocabulary_index) == (theirs["my-tub-id"], 1)
    assert agreement.is_master == (not decisions)
    if decisions:
        told = records.last_told(theirs["my-tub-id"])
        assert f"{told[0]} {told[1]}" == parse(decisions[0])["current-connection"]


@pytest.mark.parametrize("transcript", TRANSCRIPTS, ids=lambda t: t["label"])
def test_plain_text_is_that_of_foolscap(transcript: dict[str, Any]) -> None:
    blocks = blocks_of(transcript, ">", "plaintext") + blocks_of(transcript, "<", "plaintext")
    (request,) = [block for block in blocks if block.startswith(b"GET")]
    (response,) = [block for block in blocks if not block.startswith(b"GET")]
    tub_id = request.split(b" ")[1].removeprefix(b"/id/").decode()
    host = request.partition(b"Host: ")[2].partition(b"\r\n")[0].decode()
    assert plaintext_request(tub_id, host) == request
    assert response == PLAINTEXT_RESPONSE
    assert read_request(request.removesuffix(b"\r\n\r\n"), (tub_id,)) == tub_id
    check_response(response.removesuffix(b"\r\n\r\n"))


@pytest.mark.parametrize(
    "case", [c for c in section("foolscap.json", "plaintext_errors") if c["received_hex"]], ids=lambda case: case["why"]
)
def test_plain_text_refusals(case: dict[str, str]) -> None:
    text = TextBuffer()
    text.receive_data(case["sent"].encode())
    if case["why"] == "overlong header":
        text.receive_data(b"a" * TEXT_BYTES_MAX)  # the vector shows only its beginning
    with pytest.raises(NegotiationError) as refusal:
        block = text.next_block()
        assert block is not None
        read_request(block, ("x" * 32,))
    if isinstance(refusal.value, PlaintextRefusalError):
        assert refusal.value.response.hex() == case["received_hex"]
    else:
        assert case["why"] == "overlong header"


@pytest.mark.parametrize("case", HELLO_CASES, ids=lambda case: case["case"])
def test_broken_hellos_get_foolscaps_verdict(case: dict[str, Any]) -> None:
    probe_is_master = case.get("role of the probe") == "master"
    probe, probed = ("z" * 32, "b" * 32) if probe_is_master else ("b" * 32, "z" * 32)
    hello: dict[str, str | None] = {
        "banana-negotiation-range": "3 3",
        "initial-vocab-table-range": "0 1",
        "last-connection": "none 0",
        "my-incarnation": "0123456789abcdef",
        "my-tub-id": probe,
        **(case.get("hello_changes") or {}),
    }
    if case["case"] == "error in hello":
        hello["error"] = "sorry"
    certificate = None if case["case"].startswith("no client certificate") else probe
    negotiation = Negotiation(
        records=ConnectionRecords(PROBED_INCARNATION),
        my_tub_id=probed,
        certificate_tub_id=lambda: certificate,
        expected_tub_id=None,
    )
    sent = pack_block({key: value for key, value in hello.items() if value is not None})
    if case.get("decision_sent"):
        decision = {"banana-decision-version": "3", "current-connection": "0123456789abcdef 1"}
        sent += pack_block({**decision, "initial-vocab-table-index": case["decision_sent"]})
    if case.get("closed", True):
        with pytest.raises(NegotiationError):
            negotiation.receive_data(sent)
        assert negotiation.state is State.FAILED
    else:
        assert negotiation.receive_data(sent) is not None
    reply = negotiation.take_outgoing()
    if case.get("decision_received"):
        assert parse(reply) == case["decision_received"]
    else:
        assert reply.hex() == case.get("received_hex", "")


def test_a_dialler_takes_no_other_tub() -> None:
    negotiation = Negotiation(
        records=ConnectionRecords("0" * 16),
        my_tub_id="a" * 32,
        certificate_tub_id=lambda: "b" * 32,
        expected_tub_id="c" * 32,
    )
    with pytest.raises(NegotiationError, match="another tub"):
        negotiation.receive_data(pack_block({"banana-negotiation-range": "3 3", "my-tub-id": "b" * 32}))
    assert b"error: internal server error" in negotiation.take_outgoing()


def test_text_without_end_is_refused() -> None:
    text = TextBuffer()
    text.receive_data(b"x" * TEXT_BYTES_MAX)
    assert text.next_block() is None
    text.receive_data(b"x")
    with pytest.raises(NegotiationError):
        text.next_block()


@pytest.mark.parametrize(
    ("incarnation", "last", "accepted"),
    [
        (None, ("mine", 1), False),
        ("theirs", None, False),
        ("restarted", ("none", 0), True),
        ("theirs", ("none", 0), False),
        ("theirs", ("earlier", 7), True),
        ("theirs", ("mine", 1), True),
        ("theirs", ("mine", 0), False),
        ("theirs", ("mine", 2), False),
    ],
)
def test_offers_while_a_connection_lives(incarnation: str | None, last: Any, accepted: bool) -> None:
    records = ConnectionRecords("mine")
    assert records.accept("peer", "theirs", ("none", 0)) == 1
    if accepted:
        assert records.accept("peer", incarnation, last) == 2
    else:
        with pytest.raises(DuplicateConnectionError):
            records.accept("peer", incarnation, last)
        records.forget_live("peer", 1)
        assert records.accept("peer", incarnation, last) == 2


@given(st.binary(max_size=300), st.booleans(), st.booleans())
def test_garbage_raises_the_negotiation_error_or_nothing(data: bytes, hello_first: bool, is_master: bool) -> None:
    negotiation = Negotiation(
        records=ConnectionRecords("0" * 16),
        my_tub_id="z" * 32 if is_master else "a" * 32,
        certificate_tub_id=lambda: "b" * 32,
        expected_tub_id=None,
    )
    if hello_first:
        negotiation.receive_data(pack_block({"banana-negotiation-range": "3 3", "my-tub-id": "b" * 32}))
    try:
        negotiation.receive_data(data + b"\r\n\r\n")
    except NegotiationError:
        TokenReader().receive_data(negotiation.take_outgoing())
