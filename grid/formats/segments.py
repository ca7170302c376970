"""Where the bytes of a file stand: segments of the file, blocks of a share. Arithmetic only.

    file      segment 0 | segment 1 | … | tail (1 .. segment_size bytes)
    segment   zero-padded at its end to a multiple of k, cut into k pieces, coded into n blocks
    share     one block of every segment, in order: the share data

The segment size is a multiple of k, so that only the tail is ever padded. It is part of the convergent key: another
choice gives other caps. Source: Tahoe-LAFS 1.20's immutable and MDMF files (its file-encoding document still says
128 KiB for immutable ones, where 1.20 has 1 MiB). Sizes come from caps and shares, so they may be anything:
impossible ones raise FormatError.
"""

from __future__ import annotations

from typing import Final

from attrs import field, frozen

from grid.errors import FormatError

MAX_SEGMENT_BYTES: Final = 1 << 20  # immutable files, before rounding up to a multiple of k
MDMF_SEGMENT_BYTES: Final = 1 << 17  # MDMF files, before the same
LITERAL_BYTES_MAX: Final = 55  # files and immutable directories up to here are kept in their cap


def div_ceil(a: int, b: int) -> int:
    return -(-a // b)


def round_up(a: int, k: int) -> int:
    """The smallest multiple of `k` that is at least `a`."""
    return -(-a // k) * k


def choose_segment_size(size: int, k: int, max_segment_size: int = MAX_SEGMENT_BYTES) -> int:
    """The segment size of a new file of `size` bytes: 0 for an empty one."""
    return round_up(min(max_segment_size, size), k)


@frozen
class Segmentation:
    """One file's arithmetic: `size` plaintext (or ciphertext) bytes in segments of `segment_size`."""

    size: int
    k: int
    segment_size: int  # a multiple of k; may be 0 only for an empty file (SDMF)

    num_segments: int = field(init=False)
    tail_size: int = field(init=False)  # bytes in the last segment
    tail_padded: int = field(init=False)
    block_size: int = field(init=False)
    tail_block_size: int = field(init=False)
    share_data_size: int = field(init=False)  # bytes of blocks in one share

    def __attrs_post_init__(self) -> None:
        size, k, segment_size = self.size, self.k, self.segment_size
        if size < 0 or k < 1:
            raise FormatError(f"no file has {size} bytes in {k} pieces")
        if segment_size < 0 or segment_size % k or (size and not segment_size):
            raise FormatError(f"segments of {segment_size} bytes cannot be cut into {k} pieces")
        num_segments = div_ceil(size, segment_size) if size else 0
        tail_size = size - (num_segments - 1) * segment_size if size else 0
        derived = {
            "num_segments": num_segments,
            "tail_size": tail_size,
            "tail_padded": round_up(tail_size, k),
            "block_size": segment_size // k,
            "tail_block_size": div_ceil(tail_size, k),
            "share_data_size": div_ceil(size, k),
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    @classmethod
    def for_upload(cls, size: int, k: int, max_segment_size: int = MAX_SEGMENT_BYTES) -> Segmentation:
        return cls(size, k, choose_segment_size(size, k, max_segment_size))

    def segment_start(self, segment: int) -> int:
        """Offset in the file of the segment's first byte."""
        return segment * self.segment_size

    def segment_bytes(self, segment: int) -> int:
        """How many bytes of the file it holds, without padding."""
        return self.tail_size if self._is_tail(segment) else self.segment_size

    def padded_bytes(self, segment: int) -> int:
        """The same with padding: k blocks' worth."""
        return self.tail_padded if self._is_tail(segment) else self.segment_size

    def block_bytes(self, segment: int) -> int:
        return self.tail_block_size if self._is_tail(segment) else self.block_size

    def block_start(self, segment: int) -> int:
        """Offset of the segment's block in the share data (of an immutable file: MDMF puts salts between)."""
        return segment * self.block_size

    def locate(self, offset: int) -> tuple[int, int]:
        """The segment that holds the file's byte `offset`, and where in it. Raises ValueError beyond the end."""
        if not 0 <= offset < self.size:
            raise ValueError(f"offset {offset} is not inside {self.size} bytes")
        return divmod(offset, self.segment_size)

    def _is_tail(self, segment: int) -> bool:
        if not 0 <= segment < self.num_segments:
            raise ValueError(f"no segment {segment} of {self.num_segments}")
        return segment == self.num_segments - 1
