"""What no honest client sends is refused here, before anything is done with it. Each raises BadRequestError."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Final

from grid.formats.container import SECRET_BYTES
from grid.interfaces import LeaseSecrets, SlotWrite
from grid.server.errors import BadRequestError

STORAGE_INDEX_BYTES: Final = 16
SHARE_NUMBER_MAX: Final = 255
SHARES_PER_CALL_MAX: Final = 256
VECTORS_MAX: Final = 4096  # ours: tests or reads in one call, for each share
WRITES_MAX: Final = 100_000  # ours: in one call, for each share
OFFSET_MAX: Final = (1 << 63) - 1


def check_storage_index(storage_index: bytes) -> None:
    if len(storage_index) != STORAGE_INDEX_BYTES:
        raise BadRequestError(f"a storage index is {STORAGE_INDEX_BYTES} bytes")


def check_secret(secret: bytes) -> None:
    if len(secret) != SECRET_BYTES:
        raise BadRequestError(f"a secret is {SECRET_BYTES} bytes")


def check_lease(lease: LeaseSecrets) -> None:
    check_secret(lease.renew)
    check_secret(lease.cancel)


def check_share_numbers(numbers: Collection[int]) -> frozenset[int]:
    chosen = frozenset(numbers)
    if len(chosen) > SHARES_PER_CALL_MAX:
        raise BadRequestError("too many shares")
    if any(not 0 <= number <= SHARE_NUMBER_MAX for number in chosen):
        raise BadRequestError(f"share numbers go from 0 to {SHARE_NUMBER_MAX}")
    return chosen


def check_span(offset: int, length: int) -> None:
    if offset < 0 or length < 0 or offset + length > OFFSET_MAX:
        raise BadRequestError("offset or length out of range")


def check_vectors(vectors: Sequence[tuple[int, int]]) -> None:
    if len(vectors) > VECTORS_MAX:
        raise BadRequestError("too many vectors")
    for offset, length in vectors:
        check_span(offset, length)


def check_writes(writes: Mapping[int, SlotWrite]) -> int:
    """About how many bytes the call is about."""
    check_share_numbers(writes)
    weight = 0
    for write in writes.values():
        if len(write.tests) > VECTORS_MAX or len(write.data) > WRITES_MAX:
            raise BadRequestError("too many vectors")
        for test in write.tests:
            check_span(test.offset, test.length)
            weight += len(test.specimen)
        for offset, data in write.data:
            check_span(offset, len(data))
            weight += len(data)
        if write.new_length is not None:
            check_span(0, write.new_length)
    return weight
