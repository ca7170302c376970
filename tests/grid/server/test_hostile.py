"""A storage server, as a process of its own, among peers that do everything wrong.

Their connections end, with a reason in the log; its memory does not grow; clients beside them, one for each protocol,
go on all the time and notice nothing. TAHOEFS_SOAK=1 (`make soak`) makes it 10,000 half-open connections, and more of
everything else. What is only a matter of waiting (the silent, the slow) is tested where time can be skipped, in
tests/grid/transports; here such peers are many, and stay.
"""

from __future__ import annotations

import os
import random
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio

from grid.crypto import make_tub_identity
from grid.errors import PeerError
from grid.interfaces import IStorageServer, LeaseSecrets, SlotSecrets, SlotWrite
from grid.transports.handshake import Handshaker
from grid.transports.tls import TubTLS, dial_pinned
from grid.transports.tls_stream import TLSStream
from grid.wire.banana import header
from grid.wire.duplicates import ConnectionRecords
from grid.wire.gbs import authorization
from grid.wire.negotiation import Negotiation, pack_block, parse_block, plaintext_request
from tests.grid.peers.loopback import until
from tests.real.our_grid import HOST, StorageNode
from tests.vectors import section

SOAK = bool(os.environ.get("TAHOEFS_SOAK"))
HALF_OPEN = 10_000 if SOAK else 300
HELD_AT_ONCE = 600  # of those; more than the server lets strangers have
RANDOM = 1000 if SOAK else 60
SLOW = 100 if SOAK else 20
GROWTH_BYTES_MAX = 24 << 20
ENDLESS_BYTES = 64 << 20
END_TIMEOUT_S = 60.0

MALFORMED = section("foolscap.json", "malformed_input")
PLAINTEXT = [case for case in section("foolscap.json", "plaintext_errors") if case["received_hex"]]
EXCHANGES = [exchange for exchange in section("storage.json", "http.exchanges") if "path" in exchange]
LEASE = LeaseSecrets(b"r" * 32, b"c" * 32)
GONE = (trio.BrokenResourceError, trio.ClosedResourceError, OSError, ssl.SSLError, PeerError)


class Good:
    """A client that does what clients do, over and over; it must never see an error."""

    def __init__(self, server: IStorageServer, name: str) -> None:
        self.server = server
        self.rng = random.Random(name)
        self.secrets = SlotSecrets(self.rng.randbytes(32), LEASE)
        self.slot = self.rng.randbytes(16)
        self.rounds = 0

    async def run(self) -> None:
        while True:
            storage_index, data = self.rng.randbytes(16), self.rng.randbytes(self.rng.randrange(1, 100_000))
            _, writers = await self.server.allocate_buckets(storage_index, LEASE, frozenset({0}), len(data))
            await writers[0].write(0, data)
            await writers[0].close()
            readers = await self.server.get_buckets(storage_index)
            assert await readers[0].read(0, len(data) + 1) == data
            text = b"round %d" % self.rounds
            write = {1: SlotWrite([], [(0, text)], len(text))}
            passed, _ = await self.server.slot_testv_and_readv_and_writev(self.slot, self.secrets, write, [])
            assert passed and await self.server.slot_readv(self.slot, [1], [(0, 99)]) == {1: [text]}
            self.rounds += 1


async def to_its_end(stream: trio.abc.Stream) -> bytes:
    """What is said until the connection ends."""
    said = b""
    with suppress(*GONE):
        while data := await stream.receive_some():
            said += data
    return said


class Target:
    """The server, and ways to reach it."""

    def __init__(self, node: StorageNode) -> None:
        self.node = node
        self.spki_hash, self.furl = node.spki_hash, node.furl
        self.authorization = authorization(self.furl.name)

    async def reach(self) -> trio.SocketStream:
        return await trio.open_tcp_stream(HOST, self.node.port)

    async def tls(self) -> TLSStream:
        transport = await self.reach()
        try:
            return await dial_pinned(transport, self.spki_hash)
        except BaseException:
            await trio.aclose_forcefully(transport)
            raise

    async def send(self, stream: trio.abc.Stream, data: bytes) -> None:
        """All of it, then hear how it ends: it must."""
        with trio.fail_after(END_TIMEOUT_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._send, stream, data)
                await to_its_end(stream)
                nursery.cancel_scope.cancel()
        await trio.aclose_forcefully(stream)

    async def _send(self, stream: trio.abc.Stream, data: bytes) -> None:
        with suppress(*GONE):
            await stream.send_all(data)
            if isinstance(stream, trio.SocketStream):
                await stream.send_eof()

    async def negotiated(self) -> TLSStream:
        """As another tub each time."""
        identity = make_tub_identity()
        handshaker = Handshaker(identity.tub_id, TubTLS(identity), ConnectionRecords("0" * 16))
        stream, _ = await handshaker.dial(self.furl.tub_id, HOST, self.node.port)
        return stream

    async def hello(self, changes: dict[str, str | None]) -> None:
        """Say one that is not as it should be, and hear what comes of it."""
        identity = make_tub_identity()
        transport = await self.reach()
        try:
            await transport.send_all(plaintext_request(self.furl.tub_id, HOST))
            text = b""
            while not text.endswith(b"\r\n\r\n"):
                text += await transport.receive_some()
            stream = await TubTLS(identity).dial(transport)
            negotiation = Negotiation(
                records=ConnectionRecords("0" * 16),
                my_tub_id=identity.tub_id,
                certificate_tub_id=lambda: self.furl.tub_id,
                expected_tub_id=self.furl.tub_id,
            )
            hello: dict[str, str | None] = {**parse_block(negotiation.hello().removesuffix(b"\r\n\r\n")), **changes}
            await stream.send_all(pack_block({key: value for key, value in hello.items() if value is not None}))
            with trio.move_on_after(1):  # a hello that is good enough leaves the connection open
                await to_its_end(stream)
        finally:
            await trio.aclose_forcefully(transport)


@pytest.fixture
async def target(tmp_path: Path) -> AsyncIterator[Target]:
    """With two clients at work on it, for as long as the test takes; and not larger at the end than after a while."""
    node = StorageNode(tmp_path / "node")
    try:
        node.start()
        async with AsyncExitStack() as stack:
            servers = [await stack.enter_async_context(node.joined(http=http)) for http in (True, False)]
            good = [Good(server, f"good {number}") for number, server in enumerate(servers)]
            async with trio.open_nursery() as nursery:
                for each in good:
                    nursery.start_soon(each.run)
                yield Target(node)
                before = [each.rounds for each in good]
                await until(lambda: all(each.rounds > then + 1 for each, then in zip(good, before, strict=True)), 60)
                nursery.cancel_scope.cancel()
        assert node.running
    finally:
        node.kill()


@asynccontextmanager
async def memory_is_steady(target: Target) -> AsyncIterator[None]:
    before = target.node.rss_bytes()
    yield
    after = target.node.rss_bytes()
    print(f"memory: {before >> 20} MiB, then {after >> 20}")
    assert after - before < GROWTH_BYTES_MAX


async def at_once(works: list[Callable[[], Awaitable[Any]]], most: int = 20) -> None:
    limiter = trio.CapacityLimiter(most)

    async def run(work: Callable[[], Awaitable[Any]]) -> None:
        async with limiter:
            await work()

    async with trio.open_nursery() as nursery:
        for work in works:
            nursery.start_soon(run, work)


def logged(target: Target, *reasons: str) -> None:
    text = target.node.log()
    missing = [reason for reason in reasons if reason not in text]
    assert not missing, text[-3000:]


async def test_random_bytes(target: Target) -> None:
    """In the clear, after the first bytes of either protocol, and inside TLS where HTTP should be."""
    rng = random.Random(6)
    starts = (b"", b"GET /id/", b"GET /id/" + target.furl.tub_id.encode() + b" HTTP/1.1\r\n", b"\x16\x03\x01\x40\x00")

    async def clear(data: bytes) -> None:
        await target.send(await target.reach(), data)

    async def inside(data: bytes) -> None:
        await target.send(await target.tls(), data)

    works: list[Callable[[], Awaitable[Any]]] = []
    for number in range(RANDOM):
        data = starts[number % len(starts)] + rng.randbytes(rng.choice((1, 100, 5000, 100_000)))
        works.append(lambda data=data: clear(data))  # type: ignore[misc]
        works.append(lambda data=b"\r\n" + data + b"\r\n\r\n": inside(data))  # type: ignore[misc]
    async with memory_is_steady(target):
        await at_once(works)
    logged(target, "inbound connection refused", "connection ended: TLS handshake failed", "not the HTTP we know")


async def test_malformed_foolscap(target: Target) -> None:
    """Every recorded case, over a real connection. What foolscap closes for, we close for."""

    async def banana(case: dict[str, Any]) -> None:
        stream = await target.negotiated()
        data = bytes.fromhex(case["sent_after_negotiation_hex"])
        if case["closed"]:
            await target.send(stream, data)
        else:
            await stream.send_all(data)
            await trio.aclose_forcefully(stream)

    async def hello(case: dict[str, Any]) -> None:
        with suppress(*GONE):
            await target.hello(case.get("hello_changes") or {"error": "no"})

    async def plain(case: dict[str, str]) -> None:
        await target.send(await target.reach(), case["sent"].encode() + b"a" * 5000)

    async with memory_is_steady(target):
        for case in MALFORMED:
            await (banana if case.get("sent_after_negotiation_hex") else hello)(case)
        for case in PLAINTEXT:
            await plain(case)
    logged(target, "dropping connection to", "inbound connection refused")


async def test_malformed_http(target: Target) -> None:
    """Every recorded request, with bytes of it changed, by somebody who is authorized."""
    rng = random.Random(7)

    async def send(exchange: dict[str, Any]) -> None:
        body = bytes.fromhex(exchange["request_body"] or "") if "request_body_note" not in exchange else bytes(8193)
        lines = [line for line in exchange["request_headers"] if not line.startswith(("Authorization", "Content-L"))]
        head = [f"{exchange['method']} {exchange['path']} HTTP/1.1", *lines, f"Content-Length: {len(body)}"]
        text = bytearray(
            "\r\n".join(head).encode() + b"\r\nAuthorization: " + target.authorization + b"\r\n\r\n" + body
        )
        for _ in range(rng.randrange(3)):
            position = rng.randrange(len(text))
            text[position : position + rng.randrange(2)] = rng.randbytes(rng.randrange(3))
        stream = await target.tls()
        with suppress(*GONE), trio.fail_after(END_TIMEOUT_S):
            await stream.send_all(text + b"GET / HTTP/1.0\r\nconnection: close\r\n\r\n" + bytes(9000))
            await to_its_end(stream)
        await trio.aclose_forcefully(stream)

    rounds = 20 if SOAK else 2
    async with memory_is_steady(target):
        await at_once([lambda each=each: send(each) for _ in range(rounds) for each in EXCHANGES])  # type: ignore[misc]
    assert " ERROR " not in target.node.log()


async def test_half_open_connections(target: Target) -> None:
    """Opened, left at some stage of the handshake, never closed until many others were opened."""
    starts = (b"", b"GET", b"GET /id/", b"\x16\x03\x01", b"\x16\x03\x01\x02\x00\x01", b"SSH-")
    held: list[trio.abc.Stream] = []

    async def open_one(number: int) -> None:
        stream: trio.abc.Stream
        with suppress(*GONE):  # it may be let go at any moment
            if number % 8 == 7:
                stream = await target.tls()
            else:
                stream = await target.reach()
            held.append(stream)
            if number % 8 != 7 and (start := starts[number % len(starts)]):
                await stream.send_all(start)

    async def open_many(first: int, count: int) -> None:
        await at_once([lambda number=number: open_one(number) for number in range(first, first + count)])  # type: ignore[misc]
        while len(held) > HELD_AT_ONCE:
            await trio.aclose_forcefully(held.pop(0))

    batch = HELD_AT_ONCE if SOAK else HALF_OPEN // 3
    crowd = 2 * batch if SOAK else batch  # in a soak: as large as it gets
    await open_many(0, crowd)
    async with memory_is_steady(target):
        for first in range(crowd, HALF_OPEN, batch):
            await open_many(first, batch)
    for stream in held:
        await trio.aclose_forcefully(stream)
    await until(lambda: "closed before it said anything" in target.node.log(), 60)
    if SOAK:
        logged(target, "made room for others")


async def test_slow_senders(target: Target) -> None:
    """One byte at a time, of every part of a request, for as long as others work."""
    body = b"PATCH /storage/v1/immutable/%s/0 HTTP/1.1\r\nhost: x\r\nauthorization: %s\r\ncontent-length: 90000\r\n\r\n"
    request = body % (b"a" * 26, target.authorization) + bytes(90_000)

    async def trickle(number: int) -> None:
        with suppress(*GONE):
            async with await (target.tls() if number % 2 else target.reach()) as stream:
                start = number * 20 % (len(body) + 100)
                await stream.send_all(request[:start])
                for position in range(start, start + 400):
                    await stream.send_all(request[position : position + 1])
                    await trio.lowlevel.checkpoint()

    async with memory_is_steady(target):
        await at_once([lambda number=number: trickle(number) for number in range(SLOW)], SLOW)  # type: ignore[misc]


async def test_bodies_without_end(target: Target) -> None:
    """More than any endpoint takes: announced, in chunks, in headers, and as one string of Foolscap's."""
    common = b"host: x\r\nauthorization: " + target.authorization + b"\r\n"
    si = b"a" * 26
    write = b"POST /storage/v1/mutable/" + si + b"/read-test-write HTTP/1.1\r\n" + common
    write += b"".join(
        b"X-Tahoe-Authorization: %s-secret YWFhYWFhYWFhYWFhYWFhYWFhYWFhYWFhYWFhYWFhYWE=\r\n" % name
        for name in (b"lease-renew", b"lease-cancel", b"write-enabler")
    ).replace(b"write-enabler-secret", b"write-enabler")
    allocate = b"POST /storage/v1/immutable/" + si + b" HTTP/1.1\r\n" + common
    chunk = b"100000\r\n" + bytes(1 << 20) + b"\r\n"

    async def pour(stream: trio.abc.Stream, head: bytes, piece: bytes) -> bytes:
        """Until it is stopped, or 64 MiB were sent; what was said to that."""
        said = b""

        async def listen() -> None:
            nonlocal said
            said = await to_its_end(stream)
            nursery.cancel_scope.cancel()

        with trio.fail_after(END_TIMEOUT_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(listen)
                with suppress(*GONE):
                    await stream.send_all(head)
                    for _ in range(0, ENDLESS_BYTES, len(piece)):
                        await stream.send_all(piece)
                    pytest.fail("nobody stopped it")
        await trio.aclose_forcefully(stream)
        return said

    async with memory_is_steady(target):
        for head, piece, status in (
            (write + b"content-length: 99999999999\r\n\r\n", bytes(1 << 20), b"413"),
            (write + b"transfer-encoding: chunked\r\n\r\n", chunk, b"413"),
            (allocate + b"content-length: 9999999\r\n\r\n", bytes(1 << 20), b""),
            (allocate + b"transfer-encoding: chunked\r\n\r\n", chunk, b""),
            (b"GET /storage/v1/version HTTP/1.1\r\n" + common, b"x: " + bytes(b"y" * 1000) + b"\r\n", b"431"),
        ):
            said = await pour(await target.tls(), head, piece)
            assert said[9:12] in (status or said[9:12], b""), said[:200]
        for length in (1 << 40, 33 << 20):
            await pour(await target.negotiated(), header(length) + b"\x82", bytes(1 << 20))
        call = b"\x00\x88\x0b\x87\x01\x81\x00\x81\x06\x82decref\x01\x88\x0c\x87\x01\x81" + b"\x04\x82clid"
        await pour(await target.negotiated(), call + header(20 << 20) + b"\x82", bytes(1 << 20))
    logged(target, "too large")
