"""How two tubs agree on a connection, from TCP connect to the first banana token. Does no I/O.

    dialler  GET ->            acceptor  -> 101       plain text, blocks end in an empty line
    ---- TLS; both present certificates ----
    both     hello ->                                 `key: value` lines, sorted
    master   decision ->                              the side with the greater tub id
    ---- banana ----

Real peers refuse more than 4096 bytes received and not consumed, in every text phase; so do we, except that we
mind no banana that follows the decision.
Source: foolscap 24.9's negotiation, version 3.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Callable, Collection
from typing import Final

from attrs import frozen

from grid.errors import NegotiationError
from grid.wire.banana import VOCABULARIES, error_token, vocabulary_hash
from grid.wire.duplicates import ConnectionRecords, DuplicateConnectionError, LastConnection
from grid.wire.failures import shown

TEXT_BYTES_MAX: Final = 4096
TUB_ID_CHARACTERS: Final = 32
BANANA_VERSION: Final = 3
VOCABULARY_INDEX_MAX: Final = len(VOCABULARIES) - 1
DUPLICATE: Final = "Duplicate connection"
INTERNAL_ERROR: Final = "internal server error, see logs"

_END: Final = b"\r\n\r\n"
_INCARNATION = re.compile(r"[0-9A-Za-z._-]{1,64}")

Block = dict[str, str]


class PlaintextRefusalError(NegotiationError):
    """Send `response`, then close: the acceptor does not speak with this dialler."""

    def __init__(self, text: str) -> None:
        super().__init__(shown(text.encode()))
        self.response = f"HTTP/1.1 500 Internal Server Error: {text}\r\n\r\n".encode()


class TextBuffer:
    """Gathers a block of text lines; what follows it is kept for the next state."""

    def __init__(self) -> None:
        self._data = b""

    def receive_data(self, data: bytes) -> None:
        self._data += data

    def next_block(self) -> bytes | None:
        """One block without its final empty line, or None. Raises NegotiationError if it is too long."""
        end = self._data.find(_END)
        if (len(self._data) if end < 0 else end) > TEXT_BYTES_MAX:
            raise NegotiationError("too much text in negotiation")
        if end < 0:
            return None
        block, self._data = self._data[:end], self._data[end + len(_END) :]
        return block

    def take_rest(self) -> bytes:
        rest, self._data = self._data, b""
        return rest


# --- plain text


def plaintext_request(peer_tub_id: str, host: str) -> bytes:
    return f"GET /id/{peer_tub_id} HTTP/1.1\r\nHost: {host}\r\nUpgrade: TLS/1.0\r\nConnection: Upgrade\r\n\r\n".encode()


PLAINTEXT_RESPONSE: Final = (
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: TLS/1.0, PB/1.0\r\nConnection: Upgrade\r\n\r\n"
)


def read_request(block: bytes, our_tub_ids: Collection[str]) -> str:
    """Acceptor: the tub id asked for. Raises PlaintextRefusalError."""
    words = block.split(b"\r\n")[0].decode("latin-1").split(" ")
    if len(words) != 3 or words[0] != "GET" or not words[1].startswith("/id/"):
        raise PlaintextRefusalError(INTERNAL_ERROR)
    tub_id = words[1][len("/id/") :]
    if not tub_id:
        raise PlaintextRefusalError("secure Tubs require encryption")
    if tub_id not in our_tub_ids:
        raise PlaintextRefusalError(f"unknown TubID {tub_id}")
    return tub_id


def check_response(block: bytes) -> None:
    """Dialler: raise NegotiationError unless the acceptor goes on to TLS."""
    lines = block.split(b"\r\n")
    words = lines[0].split(b" ")
    if len(words) < 2 or words[1] != b"101":
        raise NegotiationError(f"peer refused: {shown(lines[0])}")
    if not any(line.strip().lower().startswith(b"upgrade: tls/1.0") for line in lines[1:]):
        raise NegotiationError("peer does not offer TLS")


# --- blocks of keys and values


def pack_block(block: Block) -> bytes:
    return "".join(f"{key}: {block[key]}\r\n" for key in sorted(block)).encode() + b"\r\n"


def parse_block(data: bytes) -> Block:
    block = {}
    for line in data.split(b"\r\n"):
        key, colon, value = line.decode("utf-8", "replace").partition(":")
        if not colon:
            raise NegotiationError("negotiation line without a colon")
        block[key.lower()] = value.lstrip()
    return block


class State(enum.Enum):
    HELLO = "waiting for the peer's hello"
    DECISION = "waiting for the master's decision"
    AGREED = "banana"
    FAILED = "failed"


@frozen
class Agreement:
    """What two tubs have agreed on; `rest` are banana bytes that came with the last text."""

    peer_tub_id: str
    vocabulary_index: int
    is_master: bool
    connection_number: int  # as master: what ConnectionRecords.accept gave
    rest: bytes


class Negotiation:
    """One connection's hello and decision, for either side of either role.

    Send hello(), then hand over what arrives inside TLS, and send what take_outgoing() gives after each
    time, also after an error: then it is the refusal, to be sent before closing.
    """

    def __init__(
        self,
        *,
        records: ConnectionRecords,
        my_tub_id: str,
        certificate_tub_id: Callable[[], str | None],
        expected_tub_id: str | None,
    ) -> None:
        """`certificate_tub_id` is asked when the hello is there, since only then the certificate is, too.

        `expected_tub_id` is whom a dialler dialled; None for an acceptor.
        """
        self.state = State.HELLO
        self.agreement: Agreement | None = None
        self._records = records
        self._my_tub_id = my_tub_id
        self._certificate_tub_id = certificate_tub_id
        self._expected_tub_id = expected_tub_id
        self._text = TextBuffer()
        self._outgoing = b""
        self._peer_tub_id = ""

    def hello(self) -> bytes:
        hello = {
            "banana-negotiation-range": f"{BANANA_VERSION} {BANANA_VERSION}",
            "initial-vocab-table-range": f"0 {VOCABULARY_INDEX_MAX}",
            "my-tub-id": self._my_tub_id,
            "my-incarnation": self._records.incarnation,
        }
        if self._expected_tub_id is not None:
            incarnation, number = self._records.last_told(self._expected_tub_id)
            hello["last-connection"] = f"{incarnation} {number}"
        return pack_block(hello)

    def take_outgoing(self) -> bytes:
        outgoing, self._outgoing = self._outgoing, b""
        return outgoing

    def receive_data(self, data: bytes) -> Agreement | None:
        """The agreement, once there is one. Raises NegotiationError and nothing else."""
        self._text.receive_data(data)
        try:
            while self.agreement is None and (block := self._text.next_block()) is not None:
                self._read_block(parse_block(block))
        except _PeerReportedError:
            self.state = State.FAILED
            raise
        except NegotiationError as error:
            self._refuse(str(error) if isinstance(error, _TellableError | DuplicateConnectionError) else INTERNAL_ERROR)
            raise
        return self.agreement

    def _read_block(self, block: Block) -> None:
        if "error" in block:
            reason = shown(block["error"].encode())
            raise (_RefusedAsDuplicateError if reason == DUPLICATE else _PeerReportedError)(f"peer refused: {reason}")
        if self.state is State.HELLO:
            self._read_hello(block)
        else:
            self._read_decision(block)

    def _refuse(self, text: str) -> None:
        # Once we wait for a decision, the master reads banana and no more text.
        if self.state is State.DECISION:
            self._outgoing += error_token(text)
        elif self.state is State.HELLO:
            self._outgoing += pack_block({"banana-decision-version": "1", "error": text})
        self.state = State.FAILED

    def _read_hello(self, block: Block) -> None:
        if "banana-negotiation-range" not in block:
            raise _TellableError("No valid banana-negotiation sequence seen")
        low, high = _numbers(block["banana-negotiation-range"])
        if min(high, BANANA_VERSION) < BANANA_VERSION:
            raise _TellableError(f"I can't handle banana version {high}")
        if low > BANANA_VERSION:
            raise _TellableError(f"You can't handle banana version {BANANA_VERSION}")
        if block.get("negotiation-forced", "false").lower() not in ("false", ""):
            raise NegotiationError("forced negotiation is not supported")
        self._peer_tub_id = self._check_identity(block.get("my-tub-id"))
        if self._my_tub_id > self._peer_tub_id:
            self._decide(block)
        elif self._my_tub_id == self._peer_tub_id:
            raise NegotiationError("connection to ourselves")
        else:
            self.state = State.DECISION

    def _check_identity(self, claimed: str | None) -> str:
        proven = self._certificate_tub_id()
        if not claimed or not proven or claimed != proven:
            raise NegotiationError("peer's certificate is not that of the tub it claims to be")
        if self._expected_tub_id is not None and claimed != self._expected_tub_id[:TUB_ID_CHARACTERS]:
            raise NegotiationError("another tub answers at this address")
        return claimed

    def _decide(self, hello: Block) -> None:
        low, high = _numbers(hello.get("initial-vocab-table-range", "0 0"))
        index = min(high, VOCABULARY_INDEX_MAX)
        if low > index:
            raise _TellableError(f"You can't handle initial vocab set {index}")
        incarnation = hello.get("my-incarnation") or None
        last = _last_connection(hello["last-connection"]) if "last-connection" in hello else None
        number = self._records.accept(self._peer_tub_id, incarnation, last)
        self._outgoing += pack_block(
            {
                "banana-decision-version": str(BANANA_VERSION),
                "current-connection": f"{self._records.incarnation} {number}",
                "initial-vocab-table-index": f"{index} {vocabulary_hash(index)}",
            }
        )
        self._agree(index, True, number)

    def _read_decision(self, block: Block) -> None:
        if "banana-decision-version" not in block:
            raise NegotiationError("decision without a version")
        (version,) = _numbers(block["banana-decision-version"], 1)
        if version != BANANA_VERSION:
            raise _TellableError(f"I can't handle banana version {version}")
        index, index_hash = 0, vocabulary_hash(0)
        if "initial-vocab-table-index" in block:
            first, _, index_hash = block["initial-vocab-table-index"].partition(" ")
            (index,) = _numbers(first, 1)
        if index > VOCABULARY_INDEX_MAX:
            raise _TellableError(f"I can't handle initial vocab table index {index}")
        if index and index_hash != vocabulary_hash(index):
            raise _TellableError(
                f"Our hash for vocab-table-index {index} ({vocabulary_hash(index)}) does not match your hash"
                f" ({shown(index_hash.encode())})"
            )
        if "current-connection" in block:
            self._records.remember_told(self._peer_tub_id, _last_connection(block["current-connection"]))
        self._agree(index, False, 0)

    def _agree(self, index: int, is_master: bool, number: int) -> None:
        self.state = State.AGREED
        self.agreement = Agreement(self._peer_tub_id, index, is_master, number, self._text.take_rest())


class _TellableError(NegotiationError):
    """A failure whose text the peer is told."""


class _PeerReportedError(NegotiationError):
    """The peer gave up and said so: it wants no answer."""


class _RefusedAsDuplicateError(_PeerReportedError, DuplicateConnectionError):
    """The peer is the master and keeps another connection between us."""


def _numbers(text: str, count: int = 2) -> list[int]:
    words = text.split(" ")
    if len(words) != count or not all(word.isascii() and word.isdigit() and len(word) < 10 for word in words):
        raise NegotiationError("malformed number in negotiation")
    return [int(word) for word in words]


def _last_connection(text: str) -> LastConnection:
    incarnation, _, number = text.partition(" ")
    if not _INCARNATION.fullmatch(incarnation):
        raise NegotiationError("malformed connection number")
    return incarnation, _numbers(number, 1)[0]
