"""A new file's encryption key, and how it is to be spread; the key is taken while the file is written in order.

A convergent key is a hash over (secret, k, n, segment size) and then the whole plaintext, so it depends on the
segment size, which is that of every large file as soon as the file reaches the largest segment. The hash is
therefore started for a large file; a smaller one is hashed again at the end, which costs little.
"""

from __future__ import annotations

from attrs import field, frozen

from grid.formats.hashutil import TaggedHasher, convergence_hasher
from grid.formats.segments import MAX_SEGMENT_BYTES, choose_segment_size


@frozen
class FileEncoding:
    """How new files are spread and keyed."""

    k: int  # shares needed
    happy: int  # distinct servers that must each hold a share of their own
    n: int  # shares made
    convergence: bytes | None = field(repr=False)  # None: a random key for each file
    max_segment_size: int = MAX_SEGMENT_BYTES

    def segment_size(self, size: int) -> int:
        return choose_segment_size(size, self.k, self.max_segment_size)

    def hasher(self, size: int) -> TaggedHasher:
        """For the key of a file of `size` bytes. Only when convergent."""
        assert self.convergence is not None
        return convergence_hasher(self.convergence, self.k, self.n, self.segment_size(size))


class RunningHash:
    """The key's hash over [0, `done`) of a file that will reach the largest segment size, if it does.

    Writes that go on at `done` extend it; one that changes what was hashed spoils it for good (until the file is
    emptied); one that leaves a gap leaves `done` where it is, to be caught up with later.
    """

    __slots__ = ("_encoding", "_hasher", "done")

    def __init__(self, encoding: FileEncoding) -> None:
        self._encoding = encoding
        self.done = 0
        self._hasher: TaggedHasher | None = None
        self.restart()

    def restart(self) -> None:
        self.done = 0
        if self._encoding.convergence is not None:
            self._hasher = self._encoding.hasher(self._encoding.max_segment_size)

    @property
    def spoiled(self) -> bool:
        return self._hasher is None

    def extend(self, data: bytes | memoryview) -> None:
        if self._hasher is not None:
            self._hasher.update(data)
            self.done += len(data)

    def spoil(self) -> None:
        """Of no use, until the file is emptied."""
        self._hasher = None
        self.done = 0

    def changed_from(self, offset: int) -> None:
        """Bytes from `offset` on are no longer what they were."""
        if offset < self.done:
            self.spoil()

    def take(self, size: int) -> tuple[TaggedHasher, int]:
        """A hasher for the file, now known to have `size` bytes, and how many of them it has seen already."""
        if self._hasher is not None and self._encoding.segment_size(size) == self._encoding.segment_size(
            self._encoding.max_segment_size
        ):
            return self._hasher.copy(), self.done
        return self._encoding.hasher(size), 0
