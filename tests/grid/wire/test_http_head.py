"""Plain request heads: what is read here, h11 reads alike; the rest is left to it."""

from __future__ import annotations

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grid.wire.http_head import HEAD_BYTES_MAX, Head, read_head

READ = b"GET /storage/v1/immutable/vis5723fn2t2okcx2fabf5kwou/3 HTTP/1.1\r\nHost: a:1\r\nRange: bytes=0-9\r\n\r\n"
WRITE = (
    b"PATCH /storage/v1/immutable/vis5723fn2t2okcx2fabf5kwou/3 HTTP/1.1\r\nHost:a\r\nX-Tahoe-Authorization: a b=  \r\n"
    b"x-tahoe-authorization: c d\r\nContent-Length: 007\r\n\r\n"
)


def of_h11(data: bytes) -> Head:
    """What h11 makes of it. Raises h11.RemoteProtocolError."""
    parser = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_BYTES_MAX)
    parser.receive_data(data)
    event = parser.next_event()
    assert isinstance(event, h11.Request) and event.http_version == b"1.1"
    headers = [(bytes(name), bytes(value)) for name, value in event.headers]
    assert not {b"transfer-encoding", b"connection", b"expect", b"upgrade"} & {name for name, _ in headers}
    length = int(dict(headers).get(b"content-length", b"0"))
    return Head(bytes(event.method), bytes(event.target), headers, length, len(data) - len(parser.trailing_data[0]))


@pytest.mark.parametrize("data", [READ, WRITE, READ + WRITE, WRITE + b"\r\n\r\n of it"])
def test_what_storage_clients_send_is_plain(data: bytes) -> None:
    head = read_head(data)
    assert head is not None and head == of_h11(data)
    assert "b=" not in repr(head)


PARTS = st.sampled_from(
    [
        *(
            b"GET",
            b"PATCH",
            b"get",
            b" ",
            b"  ",
            b"/",
            b"/a?b",
            b"*",
            b"http://a/",
            b"HTTP/1.1",
            b"HTTP/1.0",
            b"\r\n",
            b"\n",
        ),
        *(b"Host", b"host: a", b"Content-Length", b"content-length: 5", b": ", b":", b"5", b"+5", b"5,5", b"x" * 50),
        *(
            b"Transfer-Encoding: chunked",
            b"Connection: close",
            b"Expect: 100-continue",
            b"\t",
            b"\xff",
            b"\0",
            b"x y: z",
        ),
        *(b"\r\nhost: b", b"\r\nx:", b"\r\n folded", b"\r\n\r\n", b"\r\n", b"\r", b"9" * 21, b"x y: z"),
    ]
)


@given(st.sampled_from([READ, WRITE]), st.lists(st.tuples(st.integers(0, 200), st.integers(0, 3), PARTS), max_size=4))
def test_what_is_read_h11_reads_alike(data: bytes, changes: list[tuple[int, int, bytes]]) -> None:
    for place, cut, part in changes:
        data = data[:place] + part + data[place + cut :]
    if (head := read_head(data)) is not None:
        assert head == of_h11(data)


@given(st.binary(max_size=200), PARTS)
def test_random_heads(rest: bytes, part: bytes) -> None:
    data = b"GET / HTTP/1.1\r\nhost: a\r\n" + part + rest + b"\r\n\r\n"
    if (head := read_head(data)) is not None:
        assert head == of_h11(data)


@pytest.mark.parametrize(
    "line",
    [
        *(
            b"host: again",
            b"content-length: 1\r\ncontent-length: 1",
            b"content-length: -1",
            b"content-length: " + b"1" * 21,
        ),
        *(b"transfer-encoding: chunked", b"connection: close", b"expect: 100-continue", b"upgrade: h2c"),
        *(b"x: \xc3\xa4", b"x: a\tb", b"x:", b" x: folded", b"x : y", b"x", b"x: a\rb"),
        b"x: " + b"y" * HEAD_BYTES_MAX,
    ],
)
def test_what_is_not_plain_is_left_to_h11(line: bytes) -> None:
    assert read_head(READ[:-2] + line + b"\r\n\r\n") is None


def test_neither_is_what_is_not_all_there() -> None:
    assert [read_head(READ[:end]) for end in range(len(READ))] == [None] * len(READ)
