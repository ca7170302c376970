"""Bodies of the HTTP storage protocol: the CBOR of each endpoint, built and checked. Does no I/O.

    allocate          {"share-numbers": set, "allocated-size": n}      → {"already-have": set, "allocated": set}
    write             the data itself                                  → {"required": [{"begin": n, "end": n}, …]}
    list              → set of share numbers
    corrupt           {"reason": text}
    read-test-write   {"test-write-vectors": {number: {"test": […], "write": […], "new-length": n or null}},
                       "read-vector": [{"offset": n, "size": n}, …]}   → {"success": bool, "data": {number: [bytes]}}
    version           → {b"http://allmydata.org/…/v1": {b"…": n}, b"application-version": bytes}

Source: the storage protocol of Tahoe-LAFS 1.20 over HTTP, version 1. Every reader raises FormatError, only.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Final

from grid.errors import FormatError
from grid.interfaces import SlotWrite, TestVector
from grid.wire.cbor import Buffer, TaggedSet, decode, encode

SHARES_MAX: Final = 256  # in one message
TESTS_MAX: Final = 30  # for one share
READS_MAX: Final = 30
REASON_CHARS_MAX: Final = 32765
SMALL_ITEMS_MAX: Final = 2048  # CBOR items in messages that only hold share numbers
SMALL_BYTES_MAX: Final = 16 << 10  # in answers that only hold share numbers, or the version
ALLOCATE_BYTES_MAX: Final = 8192
CORRUPT_BYTES_MAX: Final = 32768

VERSION_KEY: Final = b"http://allmydata.org/tahoe/protocols/storage/v1"
APPLICATION_KEY: Final = b"application-version"
# True of every server that speaks this protocol, and never sent
IMPLIED_FEATURES: Final = (
    b"tolerates-immutable-read-overrun",
    b"delete-mutable-shares-with-zero-length-writev",
    b"fills-holes-with-zero-bytes",
    b"prevents-read-past-end-of-share-data",
)
_SPACE_KEYS: Final = (b"maximum-immutable-share-size", b"maximum-mutable-share-size", b"available-space")


# --- checks -------------------------------------------------------------------------------------------------


def _map(value: Any, *keys: str) -> list[Any]:
    """The values of exactly these keys."""
    if type(value) is not dict or value.keys() != set(keys):
        raise FormatError("a map with other keys than expected")
    return [value[key] for key in keys]


def _number(value: Any) -> int:
    if type(value) is not int:
        raise FormatError("not an unsigned number")
    return value


def _bytes(value: Any) -> memoryview:
    if type(value) is not memoryview:
        raise FormatError("not a byte string")
    return value


def _list(value: Any, most: int | None = None) -> list[Any]:
    if type(value) is not list or (most is not None and len(value) > most):
        raise FormatError("not an array, or too long a one")
    return value


def _numbers(value: Any) -> frozenset[int]:
    if type(value) is not TaggedSet or len(value.items) > SHARES_MAX:
        raise FormatError("not a set of share numbers, or too large a one")
    return frozenset(_number(item) for item in value.items)


def _ranges(value: Any) -> list[tuple[int, int]]:
    pairs = []
    for item in _list(value, READS_MAX):
        offset, size = _map(item, "offset", "size")
        pairs.append((_number(offset), _number(size)))
    return pairs


# --- version ------------------------------------------------------------------------------------------------


def version_answer(*, available_space: int, maximum_mutable_share_size: int, application: bytes) -> list[Buffer]:
    values = (available_space, maximum_mutable_share_size, available_space)
    inner = dict(zip(_SPACE_KEYS, values, strict=True))
    return encode({VERSION_KEY: inner, APPLICATION_KEY: application})


def read_version(body: Buffer) -> dict[bytes, Any]:
    """As Foolscap's get_version gives it: the features every such server has are in there."""
    version = decode(body, items_max=SMALL_ITEMS_MAX)
    inner = version.get(VERSION_KEY) if type(version) is dict else None
    if type(inner) is not dict:
        raise FormatError("not a version message of protocol 1")
    features: dict[bytes, Any] = {key: _number(inner.get(key)) for key in _SPACE_KEYS}
    features.update(dict.fromkeys(IMPLIED_FEATURES, True))
    return {VERSION_KEY: features, APPLICATION_KEY: bytes(_bytes(version.get(APPLICATION_KEY)))}


# --- immutable ----------------------------------------------------------------------------------------------


def allocate_request(share_numbers: Collection[int], allocated_size: int) -> list[Buffer]:
    return encode({"share-numbers": frozenset(share_numbers), "allocated-size": allocated_size})


def read_allocate_request(body: Buffer) -> tuple[frozenset[int], int]:
    numbers, size = _map(decode(body, items_max=SMALL_ITEMS_MAX), "share-numbers", "allocated-size")
    return _numbers(numbers), _number(size)


def allocate_answer(already: Collection[int], allocated: Collection[int]) -> list[Buffer]:
    return encode({"already-have": frozenset(already), "allocated": frozenset(allocated)})


def read_allocate_answer(body: Buffer) -> tuple[frozenset[int], frozenset[int]]:
    already, allocated = _map(decode(body, items_max=SMALL_ITEMS_MAX), "already-have", "allocated")
    return _numbers(already), _numbers(allocated)


def write_answer(required: Iterable[tuple[int, int]]) -> list[Buffer]:
    """`required`: (begin, end) of what is still missing, ascending; end is exclusive."""
    return encode({"required": [{"begin": begin, "end": end} for begin, end in required]})


def share_numbers_answer(numbers: Collection[int]) -> list[Buffer]:
    return encode(frozenset(numbers))


def read_share_numbers(body: Buffer) -> frozenset[int]:
    return _numbers(decode(body, items_max=SMALL_ITEMS_MAX))


def corrupt_request(reason: str) -> list[Buffer]:
    """The reason is cut to what fits; it is never empty."""
    plain = reason.encode("ascii", "backslashreplace").decode("ascii")
    return encode({"reason": plain[: REASON_CHARS_MAX // 2] or "unknown"})


def read_corrupt_request(body: Buffer) -> str:
    (reason,) = _map(decode(body, items_max=SMALL_ITEMS_MAX), "reason")
    if type(reason) is not str or not 0 < len(reason.encode("utf-8")) <= REASON_CHARS_MAX:
        raise FormatError("not a reason, or too long a one")
    return reason


# --- mutable ------------------------------------------------------------------------------------------------


def read_test_write_request(writes: Mapping[int, SlotWrite], read_vectors: Sequence[tuple[int, int]]) -> list[Buffer]:
    vectors = {
        number: {
            "test": [{"offset": test.offset, "size": test.length, "specimen": test.specimen} for test in write.tests],
            "write": [{"offset": offset, "data": data} for offset, data in write.data],
            "new-length": write.new_length,
        }
        for number, write in writes.items()
    }
    reads = [{"offset": offset, "size": size} for offset, size in read_vectors]
    return encode({"test-write-vectors": vectors, "read-vector": reads})


def read_read_test_write_request(body: Buffer) -> tuple[dict[int, SlotWrite], list[tuple[int, int]]]:
    """The data to be written are views of `body`."""
    vectors, reads = _map(decode(body), "test-write-vectors", "read-vector")
    if type(vectors) is not dict or len(vectors) > SHARES_MAX:
        raise FormatError("not a map of share numbers, or too large a one")
    return {_number(number): _slot_write(entry) for number, entry in vectors.items()}, _ranges(reads)


def _slot_write(entry: Any) -> SlotWrite:
    wanted_keys = ("test", "write", "new-length")
    if type(entry) is not dict or any(key not in entry for key in wanted_keys):  # more keys are overlooked, as by 1.20
        raise FormatError("an entry of test-write-vectors lacks something")
    tests, writes, new_length = (entry[key] for key in wanted_keys)
    return SlotWrite(
        [_test(test) for test in _list(tests, TESTS_MAX)],
        [_write(write) for write in _list(writes)],
        None if new_length is None else _number(new_length),
    )


def _test(value: Any) -> TestVector:
    if type(value) is not dict:
        raise FormatError("not a test")
    specimen = bytes(_bytes(value.get("specimen")))
    return TestVector(_number(value.get("offset")), _number(value.get("size")), specimen)


def _write(value: Any) -> tuple[int, Any]:
    if type(value) is not dict:
        raise FormatError("not a write")
    return _number(value.get("offset")), _bytes(value.get("data"))


def read_test_write_answer(success: bool, data: Mapping[int, Sequence[Buffer]]) -> list[Buffer]:
    return encode({"success": success, "data": {number: list(pieces) for number, pieces in data.items()}})


def read_read_test_write_answer(
    body: Buffer, read_vectors: Sequence[tuple[int, int]]
) -> tuple[bool, dict[int, list[bytes]]]:
    """Checked against the read vectors the request had."""
    success, data = _map(decode(body), "success", "data")
    if type(success) is not bool or type(data) is not dict or len(data) > SHARES_MAX:
        raise FormatError("not an answer to read-test-write")
    shares = {}
    for number, pieces in data.items():
        if len(_list(pieces)) != len(read_vectors):
            raise FormatError("an answer that does not fit the read vectors")
        shares[_number(number)] = [bytes(_bytes(piece)) for piece in pieces]
        if any(len(piece) > size for piece, (_, size) in zip(shares[_number(number)], read_vectors, strict=True)):
            raise FormatError("an answer that does not fit the read vectors")
    return success, shares
