"""Whole recorded connections, replayed from the recording side: what was received must be understood, and what
was sent must come out of our encoder byte for byte, wherever the transcript says all there is to know.

Not determined by a transcript, and so left out: traceback and parents of errors, messages with an ABORT or a
back reference (we never send those), gifts and bound methods (we offer none).
"""

from __future__ import annotations

from typing import Any

import pytest

from grid.errors import PeerError, RemoteFailure, Violation
from grid.wire.banana import VOCABULARIES
from grid.wire.calls import Answered, Broker, Failed, InboundCall
from grid.wire.references import Referenceable, RemoteHandle
from grid.wire.remote_interfaces import INTERFACES
from tests.grid.wire.trees import (
    ABORTED,
    Mine,
    Theirs,
    decode_trees,
    is_cut,
    is_sequence,
    mentions,
    number,
    shape,
    value_of,
)
from tests.vectors import section

TRANSCRIPTS = [t for t in section("foolscap.json", "transcripts") if any(b.get("tree") for b in t["blocks"])]
UNSENDABLE = ("b:reference", "b:their-reference", ABORTED)


class Ours(Referenceable):
    def __init__(self, clid: int, interface: str, furl: str | None) -> None:
        self.clid = clid
        self.furl = furl
        self.remote_interface = INTERFACES.get(interface)  # type: ignore[misc]


class Replay:
    """Stands where the recording side stood."""

    def __init__(self, transcript: dict[str, Any], step: int) -> None:
        self.step = step
        self.blocks = [block for block in transcript["blocks"] if block.get("phase") == "banana"]
        self.objects = dict(self._objects_sent())
        hello = next(b["text"] for b in transcript["blocks"] if b["dir"] == "<" and b["phase"] == "hello")
        peer = hello.partition("my-tub-id: ")[2][:32]
        self.broker = Broker(vocabulary_index=1, peer_tub_id=peer, names=self)
        self.handles: dict[int, RemoteHandle] = {}
        self.done: set[int] = set()  # indices of our blocks that came out already
        self.compared = 0

    def _objects_sent(self) -> Any:
        def find(tree: Any) -> Any:
            if is_sequence(tree):
                if tree[1] == "b:my-reference" and len(tree) > 3 and tree[2] > 0:
                    furl = tree[4].removeprefix("b:") if len(tree) > 4 else None
                    yield tree[2], Ours(tree[2], tree[3].removeprefix("b:"), furl)
                for child in tree[2:]:
                    yield from find(child)

        for block in self.blocks:
            if block["dir"] == ">":
                yield from find(block["tree"])

    def object_by_name(self, name: str) -> Referenceable | None:
        return next((o for o in self.objects.values() if o.furl and o.furl.endswith("/" + name)), None)

    def furl_of(self, target: Referenceable) -> str | None:
        assert isinstance(target, Ours)
        return target.furl

    def run(self) -> None:
        for index, block in enumerate(self.blocks):
            if block["dir"] == "<":
                self.receive(index, block)
            elif index not in self.done:
                self.send(block)

    def take(self) -> bytes:
        return b"".join(self.broker.data_to_send())

    def receive(self, index: int, block: dict[str, Any]) -> None:
        tree = block["tree"]
        reply = self.automatic_reply(index, tree)
        if reply is not None:
            # A real tub may send other messages before this answer; ours comes at once, under the same numbers.
            self.broker._writer.opens_sent, kept = number(reply["tree"]), self.broker._writer.opens_sent
        data = bytes.fromhex(block["hex"])
        events = []
        for start in range(0, len(data), self.step):
            events += self.broker.receive_data(data[start : start + self.step])
        if reply is not None:
            if mentions(tree, -2):
                assert b"decref of what was not sent" in self.take()  # a bound method, which we did not send
            else:
                self.check(reply, self.take())
            self.broker._writer.opens_sent = max(kept, self.broker._writer.opens_sent)
        elif tree[0] == "PING":
            assert self.take() == b"\x8f"
            self.done.add(index + 1)
        elif mentions(tree, "b:their-reference"):
            assert b"gifts are prohibited" in self.take()
        else:
            assert self.take() == b""
        self.check_events(tree, events)

    def automatic_reply(self, index: int, tree: Any) -> dict[str, Any] | None:
        if tree[:2][-1] != "b:call" or tree[3] != 0 or mentions(tree, ABORTED):
            return None
        for later in range(index, len(self.blocks)):
            reply = self.blocks[later]
            if reply["dir"] == ">" and reply["tree"][1] in ("b:answer", "b:error") and reply["tree"][2] == tree[2]:
                self.done.add(later)
                return reply
        return None

    def check_events(self, tree: Any, events: list[Any]) -> None:
        if not is_sequence(tree) or (tree[3] == 0 and tree[1] == "b:call"):
            assert events == []
        elif tree[1] == "b:call":
            if mentions(tree, ABORTED) or mentions(tree, "b:their-reference"):
                assert events == []
                return
            (event,) = events
            assert isinstance(event, InboundCall)
            assert (event.reqid, event.method) == (tree[2], tree[4].removeprefix("b:"))
            assert isinstance(event.target, Ours)
            assert event.target.clid == tree[3]
            positional, keywords = arguments_of(tree[5])
            if not is_cut(tree):
                assert self.shape(event.arguments) == positional
                assert self.shape(event.keywords) == keywords
        else:
            self.check_result(tree, events)

    def check_result(self, tree: Any, events: list[Any]) -> None:
        if not events:
            return  # the answer to a decref, which nobody waits for
        (event,) = events
        assert event.reqid == tree[2]
        if tree[1] == "b:error":
            assert isinstance(event, Failed)
            assert isinstance(event.error, RemoteFailure)
            attributes = value_of(tree[3]).attributes
            assert event.error.type_name.encode() == attributes[b"type"]
            if not is_cut(tree):
                assert event.error.message.encode() == attributes[b"value"]
        elif isinstance(event, Failed):
            assert isinstance(event.error, Violation)
            assert mentions(tree, ABORTED)
        else:
            assert isinstance(event, Answered)
            if not is_cut(tree):
                assert self.shape(event.value) == value_of(tree[3])
            self.keep_handles(event.value)

    def keep_handles(self, value: Any) -> None:
        if isinstance(value, RemoteHandle):
            self.handles[value.clid] = value
        elif isinstance(value, list | tuple | dict):
            for item in value.values() if isinstance(value, dict) else value:
                self.keep_handles(item)

    def shape(self, value: Any) -> Any:
        self.keep_handles(value)
        return shape(value, lambda target: target.clid)

    def live(self, value: Any) -> Any:
        """The inverse of shape."""
        if isinstance(value, Theirs):
            return self.objects[value.clid]
        if isinstance(value, Mine):
            return self.handles[value.clid]
        if isinstance(value, list | tuple | set):
            return type(value)(map(self.live, value))
        return {k: self.live(v) for k, v in value.items()} if isinstance(value, dict) else value

    def send(self, block: dict[str, Any]) -> None:
        """Have our encoder say what the recording side said."""
        tree = block["tree"]
        if tree[0] == "PING":
            self.broker.send_ping()
            self.check(block, self.take())
            return
        if any(mentions(tree, mark) for mark in UNSENDABLE) or is_cut(tree) or tree[2] == 0 or mentions(tree, -2):
            if tree[1] == "b:call" and tree[2]:
                # It cannot be sent by us, but its answer must find it waiting.
                self.broker._next_reqid = tree[2]
                self.broker.send_call(tree[3], "", tree[4].removeprefix("b:"), ())
                self.take()
            return
        if tree[1] == "b:answer" and not is_sequence(tree[3]) and tree[3] == ABORTED:
            return
        self.broker._writer.opens_sent = number(tree)
        if tree[1] == "b:call":
            positional, keywords = arguments_of(tree[5])
            self.broker._next_reqid = tree[2]
            interface = self.handles[tree[3]].interface_name if tree[3] in self.handles else ""
            method = tree[4].removeprefix("b:")
            self.broker.send_call(tree[3], interface, method, self.live(positional), self.live(keywords))
        elif tree[1] == "b:answer":
            self.broker.send_answer(tree[2], self.live(value_of(tree[3])))
        else:
            attributes = value_of(tree[3]).attributes
            error: PeerError = RemoteFailure(attributes[b"type"].decode(), attributes[b"value"].decode())
            self.broker.send_error(tree[2], error)
        self.check(block, self.take())

    def check(self, block: dict[str, Any], sent: bytes) -> None:
        expected = bytes.fromhex(block["hex"])
        self.compared += 1
        if is_sequence(block["tree"]) and block["tree"][1] == "b:error":
            (mine,), (theirs,) = decode_trees(sent, VOCABULARIES[1]), decode_trees(expected, VOCABULARIES[1])
            assert mine[:3] == theirs[:3]
            assert mine[3][1:9] == theirs[3][1:9]
        else:
            assert sent.hex() == expected.hex()


def arguments_of(tree: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    count = tree[2]
    # One table of numbers for all of them: they may refer to each other.
    values = value_of([tree[0], "b:list", *tree[3:]])
    names = [name.decode() for name in values[count::2]]
    return tuple(values[:count]), dict(zip(names, values[count + 1 :: 2], strict=True))


@pytest.mark.parametrize("step", [1, 7, 1 << 20])
@pytest.mark.parametrize("transcript", TRANSCRIPTS, ids=lambda t: t["label"])
def test_replay(transcript: dict[str, Any], step: int) -> None:
    replay = Replay(transcript, step)
    replay.run()
    sent = [block for block in replay.blocks if block["dir"] == ">"]
    left_out = sum(
        any(mentions(b["tree"], mark) for mark in UNSENDABLE) or is_cut(b["tree"]) or b["tree"][2:3] == [0]
        for b in sent
        if is_sequence(b["tree"])
    )
    assert replay.compared >= len(sent) - left_out - 3
    assert replay.compared > 0
