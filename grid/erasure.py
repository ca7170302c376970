"""The erasure code: k pieces become n blocks, any k of which give the pieces back. The only importer of zfec.

    segment   zero-padded at its end to a multiple of k, cut into k equal pieces
    block i   is piece i itself for i < k ("primary"), a combination of all pieces beyond

Block numbers are share numbers. Source: Tahoe-LAFS 1.20's files, coded with zfec (Reed-Solomon over GF(2^8)).
Coding releases the interpreter's lock but takes milliseconds a megabyte: run it in a worker thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, TypeAlias

import zfec

from grid.errors import FormatError
from grid.interfaces import ICodecDecoder, ICodecEncoder

SHARES_MAX: Final = 256

Buffer: TypeAlias = bytes | memoryview


def _check(k: int, n: int) -> None:
    if not 1 <= k <= n <= SHARES_MAX:
        raise FormatError(f"cannot code {k} of {n}")


def split_segment(data: Buffer, k: int) -> list[memoryview]:
    """Cut `data` into k pieces of ceil(len/k) bytes; only what needs padding is copied."""
    view = memoryview(data)
    size = -(-len(view) // k)
    whole = len(view) // size if size else k
    pieces = [view[i * size : (i + 1) * size] for i in range(whole)]
    if whole < k:
        padded = memoryview(bytes(view[whole * size :]).ljust((k - whole) * size, b"\0"))
        pieces += [padded[i * size : (i + 1) * size] for i in range(k - whole)]
    return pieces


class Encoder:
    """Raises FormatError for an impossible k and n."""

    __slots__ = ("_zfec", "k", "n")

    def __init__(self, k: int, n: int) -> None:
        _check(k, n)
        self.k, self.n = k, n
        self._zfec = zfec.Encoder(k, n)

    def encode(self, pieces: Sequence[Buffer], numbers: Sequence[int] | None = None) -> list[Buffer]:
        """The blocks of these numbers (all n unless given), in their order. Primary blocks are the pieces given,
        not copies.
        """
        _check_blocks(pieces, self.k)
        numbers = range(self.n) if numbers is None else numbers
        if any(not 0 <= number < self.n for number in numbers):
            raise ValueError(f"a block number outside 0..{self.n - 1}")
        made: list[Buffer] = self._zfec.encode(list(pieces), list(numbers))
        return made


class Decoder:
    """Raises FormatError for an impossible k and n."""

    __slots__ = ("_zfec", "k", "n")

    def __init__(self, k: int, n: int) -> None:
        _check(k, n)
        self.k, self.n = k, n
        self._zfec = zfec.Decoder(k, n)

    def decode(self, blocks: Sequence[Buffer], numbers: Sequence[int]) -> list[Buffer]:
        """The k pieces, in order, from exactly k blocks and their numbers. Blocks must have been verified: wrong
        ones give wrong pieces, silently.
        """
        _check_blocks(blocks, self.k)
        if len(numbers) != self.k or len(set(numbers)) != self.k:
            raise ValueError(f"decoding takes {self.k} different blocks")
        if any(not 0 <= number < self.n for number in numbers):
            raise ValueError(f"a block number outside 0..{self.n - 1}")
        pieces: list[Buffer] = self._zfec.decode(list(blocks), list(numbers))
        return pieces


def _check_blocks(blocks: Sequence[Buffer], k: int) -> None:
    """zfec trusts its caller with the lengths."""
    if len(blocks) != k:
        raise ValueError(f"coding takes {k} blocks, not {len(blocks)}")
    if len({len(block) for block in blocks}) != 1:
        raise ValueError("blocks differ in length")


# --- behind the interfaces of 2008 --------------------------------------------------------------------------


class CRSEncoder(ICodecEncoder):
    """ICodecEncoder: Cauchy Reed-Solomon by name (`crs`), though Vandermonde in fact."""

    ENCODER_TYPE: Final = "crs"

    def set_params(self, data_size: int, required_shares: int, max_shares: int) -> None:
        """Raises FormatError unless `data_size` is a multiple of `required_shares`."""
        if required_shares < 1 or data_size % required_shares:
            raise FormatError(f"{data_size} bytes cannot be cut into {required_shares} pieces")
        self._encoder = Encoder(required_shares, max_shares)
        self._data_size = data_size

    def get_encoder_type(self) -> str:
        return self.ENCODER_TYPE

    def get_serialized_params(self) -> bytes:
        return b"%d-%d-%d" % (self._data_size, self._encoder.k, self._encoder.n)

    def get_block_size(self) -> int:
        return self._data_size // self._encoder.k

    def encode_proposal(
        self, data: Buffer, desired_share_ids: Sequence[int] | None = None
    ) -> tuple[list[Buffer], list[int]]:
        if len(data) != self._data_size:
            raise ValueError(f"{len(data)} bytes where {self._data_size} were announced")
        return self.encode(split_segment(data, self._encoder.k), desired_share_ids)

    def encode(
        self, inshares: Sequence[Buffer], desired_share_ids: Sequence[int] | None = None
    ) -> tuple[list[Buffer], list[int]]:
        numbers = list(range(self._encoder.n) if desired_share_ids is None else desired_share_ids)
        return self._encoder.encode(inshares, numbers), numbers


class CRSDecoder(ICodecDecoder):
    """ICodecDecoder for the same."""

    def set_serialized_params(self, params: bytes) -> None:
        """Raises FormatError."""
        numbers = params.split(b"-")
        if len(numbers) != 3 or not all(number.isdigit() and len(number) < 20 for number in numbers):
            raise FormatError("not codec parameters")
        self._decoder = Decoder(int(numbers[1]), int(numbers[2]))

    def get_needed_shares(self) -> int:
        return self._decoder.k

    def decode(self, some_shares: Sequence[Buffer], their_shareids: Sequence[int]) -> list[Buffer]:
        return self._decoder.decode(some_shares, their_shareids)
