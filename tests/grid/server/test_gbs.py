"""The HTTP front end against what a real 1.20 server answered, and against clients that mean no good."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from grid.formats.base32 import a2b
from grid.interfaces import SlotWrite
from grid.server import gbs as gbs_server
from grid.server.shares import ShareStore
from grid.transports.http import Answer, HTTPConnection
from grid.wire import gbs, gbs_bodies
from grid.wire.cbor import decode
from grid.wire.gbs import Secret
from tests.grid.server.gbs_peer import SWISSNUM, gbs_peer
from tests.grid.server.stores import LEASES, NOW, SI, WRITE_ENABLER, files_in, share_file, upload
from tests.vectors import section

HTTP = section("storage.json", "http")
AUTHORIZED = [(b"authorization", gbs.authorization(SWISSNUM)), (b"accept", b"application/cbor")]
UPLOAD = gbs.secret_headers({Secret.UPLOAD: b"u" * 20})
LEASE = gbs.lease_headers(LEASES[0])
MINUTE = 60


async def ask(connection: HTTPConnection, method: bytes, path: bytes, headers: Any = (), body: Any = ()) -> Answer:
    return await connection.request(method, path, [*AUTHORIZED, *headers], body, answer_bytes_max=1 << 24)


async def replay(connection: HTTPConnection, exchange: dict[str, Any]) -> Answer:
    """Send a vector's request. Bodies that are only described are made up."""
    headers = [
        tuple(line.encode().split(b": ", 1))
        for line in exchange["request_headers"]
        if not line.startswith(("Host:", "Content-Length:"))
    ]
    if (note := exchange.get("request_body_note")) is not None:
        body = bytes(int(note.split()[0]))
    else:
        body = bytes.fromhex(exchange["request_body"] or "")
    return await connection.request(
        exchange["method"].encode(),
        exchange["path"].encode(),
        headers,  # type: ignore[arg-type]
        (body,) if body else (),
        answer_bytes_max=1 << 20,
    )


def check(exchange: dict[str, Any], answer: Answer) -> None:
    what = exchange["what"]
    assert answer.status == exchange["status"], what
    expected = {
        name: value
        for name, value in (line.split(": ", 1) for line in exchange["response_headers"])
        if name not in ("Transfer-Encoding", "Content-Length")  # ours have a length instead
    }
    for name, value in expected.items():
        assert answer.header(name.lower().encode()) == value.encode(), what
    if "Content-Type" not in expected:
        assert answer.header(b"content-type") is None, what
    if (body := exchange["response_body"]) is not None:
        assert answer.body == bytes.fromhex(body), what


async def test_every_exchange_of_the_real_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """All vectors in their order, with the files and the advisories they leave."""
    monkeypatch.setattr(ShareStore, "available_space", lambda self: 10**9)
    storage_indexes = {
        "http-imm": a2b(HTTP["exchanges"][4]["path"].split("/")[4]),
        "http-mut": a2b(next(e for e in HTTP["exchanges"] if e.get("what") == "mutable create")["path"].split("/")[4]),
    }
    async with gbs_peer(tmp_path) as peer:
        connection = await peer.connect()
        done = 0
        for exchange in HTTP["exchanges"]:
            if "files_after" in exchange:
                for number, content in exchange["files"].items():
                    found = share_file(peer.service.store, storage_indexes[exchange["si"]], int(number))
                    assert found == base64.b64decode(content), exchange["files_after"]
                peer.service.store.clock.now = NOW + 1000  # type: ignore[attr-defined]
                continue
            if exchange["what"] == "write after the 30 minute timeout":
                assert peer.service.uploads_in_progress == HTTP["incoming_before_timeout"]
                await trio.sleep(30 * MINUTE - 1)
                assert peer.service.uploads_in_progress == HTTP["incoming_at_29m59s"]
                await trio.sleep(1)
                await trio.testing.wait_all_tasks_blocked()
                assert peer.service.uploads_in_progress == HTTP["incoming_at_30m"]
                connection = await peer.connect()  # the old one was idle for too long
            check(exchange, await replay(connection, exchange))
            done += 1
        assert done == sum("what" in each for each in HTTP["exchanges"]) > 60
        texts = {
            path.name.split("--", 1)[1]: path.read_text() for path in (tmp_path / "corruption-advisories").iterdir()
        }
        assert texts == {name.split("--", 1)[1]: text for name, text in HTTP["advisories"].items()}


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        (b"GET", b"/", 404),
        (b"GET", b"/storage/v1/version/", 404),
        (b"GET", b"/storage/v1/version?a=b", 200),
        (b"POST", b"/storage/v1/version", 405),
        (b"GET", gbs.path("immutable", SI).upper(), 404),
        (b"GET", gbs.path("immutable", SI)[:-1] + b"b/shares", 404),  # spare bits that are not zero
        (b"GET", gbs.path("immutable", SI, "0001"), 200),
        (b"GET", gbs.path("immutable", SI, "-1"), 404),
        (b"GET", gbs.path("immutable", SI, "9" * 30), 404),
        (b"DELETE", gbs.path("immutable", SI, 1), 405),
        (b"GET", gbs.path("mutable", SI, 1), 500),  # a share of the other kind
        (b"GET", gbs.path("mutable", SI, "shares"), 200),
        (b"GET", gbs.path("immutable", SI, "99999999999999999999"), 404),
        (b"PUT", gbs.path("lease", SI), 400),
    ],
)
async def test_paths_and_methods(tmp_path: Path, method: bytes, path: bytes, status: int) -> None:
    async with gbs_peer(tmp_path) as peer:
        await upload(peer.service, SI, 1, b"data")
        assert (await ask(await peer.connect(), method, path)).status == status


async def test_head_is_get_without_a_body(tmp_path: Path) -> None:
    async with gbs_peer(tmp_path) as peer:
        await upload(peer.service, SI, 1, b"data")
        connection = await peer.connect()
        answer = await ask(connection, b"HEAD", gbs.path("immutable", SI, 1))
        assert (answer.status, answer.header(b"content-length"), answer.body) == (200, b"4", b"")
        assert (await ask(connection, b"GET", gbs.VERSION_PATH)).status == 200  # and the connection goes on


@pytest.mark.parametrize(
    "authorization",
    [b"", b"Tahoe-LAFS", b"tahoe-lafs " + gbs.authorization(SWISSNUM)[11:], gbs.authorization("wrong"), b"Basic eA=="],
)
async def test_the_swissnum_must_be_right(tmp_path: Path, authorization: bytes) -> None:
    async with gbs_peer(tmp_path) as peer:
        answer = await (await peer.connect()).request(
            b"GET", gbs.VERSION_PATH, [(b"authorization", authorization)], answer_bytes_max=1000
        )
        assert (answer.status, SWISSNUM.encode() in answer.body) == (401, False)


@pytest.mark.parametrize(
    ("accept", "status"),
    [
        (b"application/cbor", 200),
        (b"text/html;q=0.2, application/cbor;q=0.9", 200),
        (b"application/cbor;q=0.1, text/html", 406),
        (b"application/*", 406),
        (b"*/*", 406),
    ],
)
async def test_only_cbor_is_served(tmp_path: Path, accept: bytes, status: int) -> None:
    async with gbs_peer(tmp_path) as peer:
        headers = [AUTHORIZED[0], (b"accept", accept)]
        answer = await (await peer.connect()).request(b"GET", gbs.VERSION_PATH, headers, answer_bytes_max=1000)
        assert answer.status == status


async def allocate(connection: HTTPConnection, size: int, numbers: tuple[int, ...] = (0,)) -> None:
    answer = await ask(
        connection,
        b"POST",
        gbs.path("immutable", SI),
        [*LEASE, *UPLOAD],
        gbs_bodies.allocate_request(numbers, size),
    )
    assert gbs_bodies.read_allocate_answer(answer.body) == (frozenset(), frozenset(numbers))


def patch(offset: int, length: int) -> list[tuple[bytes, bytes]]:
    return [*UPLOAD, (b"content-range", gbs.content_range_header(offset, length))]


async def test_a_large_share_in_one_request_and_back(tmp_path: Path) -> None:
    data = bytes(range(256)) * 12_000
    async with gbs_peer(tmp_path) as peer:
        connection = await peer.connect()
        await allocate(connection, len(data))
        path = gbs.path("immutable", SI, 0)
        assert (await ask(connection, b"PATCH", path, patch(0, len(data)), (data,))).status == 201
        whole = await ask(connection, b"GET", path)
        assert (whole.status, whole.body) == (200, data)
        part = await ask(connection, b"GET", path, [(b"range", b"bytes=100-3000000")])
        assert (part.status, part.body) == (206, data[100:3000001])
        past = await ask(connection, b"GET", path, [(b"range", b"bytes=3000000-99999999999")])
        assert (past.status, past.body) == (206, data[3000000:])
        assert past.header(b"content-range") == b"bytes 3000000-3071999/*"
        assert (await ask(connection, b"GET", path, [(b"range", b"bytes=3072000-99999999999")])).status == 204


async def test_writes_that_do_not_fit(tmp_path: Path) -> None:
    async with gbs_peer(tmp_path) as peer:
        connection = await peer.connect()
        await allocate(connection, 100)
        path = gbs.path("immutable", SI, 0)
        for value in (
            b"",
            b"bytes 0-9",
            b"bytes 9-0/*",
            b"bytes 0-9/9",
            b"bytes */100",
            b"items 0-9/*",
            b"bytes 95-104/*",
        ):
            answer = await ask(connection, b"PATCH", path, [*UPLOAD, (b"content-range", value)], (b"0123456789",))
            assert answer.status == 416, value
        assert (await ask(connection, b"PATCH", path, patch(0, 20), (b"0123456789",))).status == 400
        longer = await ask(connection, b"PATCH", path, patch(0, 5), (b"0123456789",))  # is cut to its range
        assert decode(longer.body) == {"required": [{"begin": 5, "end": 100}]}
        other = gbs.secret_headers({Secret.UPLOAD: b"other"})
        assert (await ask(connection, b"PUT", path + b"/abort", other)).status == 401
        assert (await ask(connection, b"PUT", path + b"/abort", UPLOAD)).status == 200
        assert not files_in(tmp_path / "shares")


async def test_an_unfinished_request_leaves_the_upload(tmp_path: Path) -> None:
    """The client goes away in the middle of a body: what came stays, another connection goes on."""
    async with gbs_peer(tmp_path) as peer:
        await allocate(await peer.connect(), 100)
        stream = await peer.stream()
        head = [b"PATCH %s HTTP/1.1" % gbs.path("immutable", SI, 0), b"host: x", b"content-length: 90"]
        head += [b"%s: %s" % line for line in (*AUTHORIZED, *patch(0, 90))]
        await stream.send_all(b"\r\n".join(head) + b"\r\n\r\n" + b"a" * 50)
        await trio.testing.wait_all_tasks_blocked()
        await stream.aclose()
        upload = peer.service.find_upload(SI, 0)
        assert upload is not None and upload.required == [(50, 100)]
        connection = await peer.connect()
        answer = await ask(connection, b"PATCH", gbs.path("immutable", SI, 0), patch(0, 100), (b"a" * 50, b"b" * 50))
        assert answer.status == 201


def slot_request(connection: HTTPConnection, body: list[Any], enabler: bytes = WRITE_ENABLER) -> Any:
    headers = [*LEASE, *gbs.secret_headers({Secret.WRITE_ENABLER: enabler}), (b"content-type", b"application/cbor")]
    return ask(connection, b"POST", gbs.path("mutable", SI, "read-test-write"), headers, body)


async def test_bodies_that_are_too_large_or_nonsense(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gbs_server, "SLOT_BODY_BYTES_MAX", 1 << 21)
    async with gbs_peer(tmp_path) as peer:
        connection = await peer.connect()
        assert (await slot_request(connection, [bytes(1 << 21), b"x"])).status == 413
        for body in (
            b"",
            b"\xa0",
            b"\x9b" + b"\xff" * 8,
            b"\x81" * 1000,
            b"\xa1\x00\x00",
            b"\xf9\x00\x00",
            bytes(1 << 20),
        ):
            assert (await slot_request(connection, [body])).status == 400
        assert (await ask(connection, b"GET", gbs.VERSION_PATH)).status == 200
        assert not files_in(tmp_path / "shares")


async def test_large_bodies_wait_for_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gbs_server, "LARGE_BODIES_BYTES", 3 << 20)
    async with gbs_peer(tmp_path) as peer:
        statuses: list[int] = []

        async def write(number: int) -> None:
            body = gbs_bodies.read_test_write_request({number: SlotWrite([], [(0, bytes(2 << 20))])}, [])
            statuses.append((await slot_request(await peer.connect(), list(body))).status)

        async with trio.open_nursery() as nursery:
            for number in range(5):
                nursery.start_soon(write, number)
        assert statuses == [200] * 5
        assert await peer.service.share_numbers(SI) == frozenset(range(5))


async def test_a_failing_disk_is_a_500_without_paths(tmp_path: Path) -> None:
    async with gbs_peer(tmp_path) as peer:
        await upload(peer.service, SI, 0, b"data")
        (share,) = (tmp_path / "shares").rglob("0")
        share.write_bytes(b"\0\0\0\x63garbage")
        peer.service.store.open_shares.close()
        answer = await ask(await peer.connect(), b"GET", gbs.path("immutable", SI, "shares"))
        assert (answer.status, answer.body) == (500, b"")
