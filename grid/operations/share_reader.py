"""Reads one remote CHK share, and believes nothing it has not proven against the cap.

    cap ─ UEB hash → UEB ─ share root → share hash chain → root of the block tree → leaf → block
                      └─ ciphertext root → ciphertext tree → leaf → segment (download.py)

A small share is fetched whole in one read. Of a larger one header, tail (hashes, UEB) and the wanted block are
read at the same time from where they stand if the uploader used the usual segment size; what the header says
otherwise is read again. Source: how Tahoe-LAFS 1.20 verifies a download.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

import trio
from attrs import define, field, frozen

from grid.erasure import Decoder
from grid.errors import CorruptShareError, FormatError, PeerError, ShareVersionError
from grid.formats.chk_share import HEADER_BYTES_MAX, ShareLayout, UnknownVersionError, unpack_share_hashes
from grid.formats.hashtree import IncompleteHashTree
from grid.formats.segments import Segmentation
from grid.formats.ueb import UEB_BYTES_MAX, URIExtension, expected_ueb_size
from grid.interfaces import IBucketReader, IStorageServer

WHOLE_SHARE_BYTES_MAX: Final = 64 << 10  # shares up to here are fetched in one read
TAIL_BYTES_MAX: Final = 64 << 10
WHOLE_TREE_BYTES_MAX: Final = 32 << 10  # hash trees up to here are fetched whole, larger ones node by node
NODE_GAP_MAX: Final = 16  # hash tree nodes read without need to save a request
HASH_BYTES: Final = 32

Range = tuple[int, int]  # offset, length


@define(eq=False)
class FileState:
    """What all shares of one file have in common: the cap's numbers, and what was proven from them so far."""

    storage_index: bytes = field(repr=False)
    ueb_hash: bytes = field(repr=False)
    k: int
    n: int
    size: int
    strict: bool = field(default=False, kw_only=True)  # for verifying: the UEB must agree with the cap in all it says
    ueb: URIExtension | None = field(default=None, init=False)
    ueb_bytes: bytes = field(default=b"", init=False, repr=False)
    share_tree: IncompleteHashTree = field(init=False, repr=False)
    crypttext_tree: IncompleteHashTree = field(init=False, repr=False)
    segmentation: Segmentation = field(init=False)  # a guess until `ueb` is there
    layout: ShareLayout = field(init=False)  # likewise
    decoder: Decoder = field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self._plan(Segmentation.for_upload(self.size, self.k))
        self.decoder = Decoder(self.k, self.n)

    def _plan(self, segmentation: Segmentation) -> None:
        self.segmentation = segmentation
        self.layout = ShareLayout.for_upload(segmentation, self.n, expected_ueb_size(segmentation, self.n))

    @property
    def share_size(self) -> int:
        """Bytes of a share, as far as known."""
        return self.layout.total_size(expected_ueb_size(self.segmentation, self.n))

    def accept_ueb(self, data: bytes | memoryview) -> None:
        """Raises FormatError."""
        extension = URIExtension.unpack(
            data, ueb_hash=self.ueb_hash, k=self.k, n=self.n, size=self.size, strict=self.strict
        )
        if self.ueb is None:
            self.ueb, self.ueb_bytes = extension, bytes(data)
            self._plan(extension.segmentation)
            self.share_tree = IncompleteHashTree(self.n, extension.share_root_hash)
            self.crypttext_tree = IncompleteHashTree(extension.num_segments, extension.crypttext_root_hash)


@frozen
class Block:
    """One share's part of a segment, and the proven hash it must have."""

    share: RemoteShare
    data: bytes | memoryview = field(repr=False)
    block_hash: bytes = field(repr=False)


class _Fragments:
    """Ranges of the share that were read already."""

    def __init__(self, held: Iterable[tuple[int, bytes]] = ()) -> None:
        self._held = list(held)

    def get(self, offset: int, length: int) -> memoryview | None:
        for start, data in self._held:
            if start <= offset and offset + length <= start + len(data):
                return memoryview(data)[offset - start : offset - start + length]
        return None


class RemoteShare:
    """One share on one server. Raises CorruptShareError or ShareVersionError when it is of no use, or PeerError."""

    def __init__(self, file: FileState, server: IStorageServer, number: int, reader: IBucketReader) -> None:
        self.server = server
        self.number = number
        self.reader = reader
        self.bad_segments: set[int] = set()  # whose blocks were wrong; the others may serve
        self._file = file
        self._opening = trio.Lock()  # held over the first reads of the share, so they are made once
        self._layout: ShareLayout | None = None
        self._block_tree: IncompleteHashTree
        self._fragments = _Fragments()

    def __repr__(self) -> str:
        return f"<share {self.number} on {self.server.name}>"

    async def open(self, segment: int | None = None) -> None:
        """Read and prove header, UEB and share hash chain. `segment` is wanted next: read its block as well."""
        async with self._opening:
            if self._layout is not None:
                return
            try:
                await self._open(segment)
            except UnknownVersionError as error:
                raise ShareVersionError(self.server.name, self.number, error.version) from None
            except FormatError as error:
                raise self.corrupt(str(error)) from None

    async def fetch(self, segment: int) -> Block:
        """The block, unchecked, and the proven hash to check it against (in a worker thread)."""
        await self.open(segment)
        try:
            return await self._fetch(segment)
        except FormatError as error:
            raise self.corrupt(str(error)) from None

    @property
    def layout(self) -> ShareLayout:
        """Where everything stands. Only after open()."""
        assert self._layout is not None
        return self._layout

    async def read_range(self, offset: int, length: int) -> bytes | memoryview:
        """Exactly these bytes of the share, unproven. Raises FormatError (it is shorter), PeerError."""
        (data,) = await self._get([(offset, length)], self._fragments)
        return data

    def corrupt(self, reason: str) -> CorruptShareError:
        return CorruptShareError(self.server.name, self.number, reason)

    async def _open(self, segment: int | None) -> None:
        file = self._file
        first = self._first_ranges(segment)
        fragments = _Fragments(zip((offset for offset, _ in first), await self._read_all(first), strict=True))
        header = fragments.get(0, HEADER_BYTES_MAX)
        layout = ShareLayout.parse(b"" if header is None else header)
        file.accept_ueb(await self._read_ueb(layout, fragments))
        (chain,) = await self._get([layout.share_hashes_range], fragments)
        file.share_tree.set_hashes(unpack_share_hashes(chain))
        root = file.share_tree.get_leaf(self.number) if 0 <= self.number < file.n else None
        if root is None:
            raise FormatError("share hash chain lacks the share's own hash")
        self._block_tree = IncompleteHashTree(file.segmentation.num_segments, root)
        self._fragments = fragments
        self._layout = layout

    def _first_ranges(self, segment: int | None) -> list[Range]:
        """Where things stand if the guess is right. It is, once the UEB is known from another share."""
        file, layout, total = self._file, self._file.layout, self._file.share_size
        if total <= WHOLE_SHARE_BYTES_MAX:
            return [(0, WHOLE_SHARE_BYTES_MAX)]
        tail = layout.crypttext_hashes if total - layout.crypttext_hashes <= TAIL_BYTES_MAX else layout.share_hashes
        ranges = [(0, HEADER_BYTES_MAX), (tail, total - tail)]
        if segment is not None and segment < file.segmentation.num_segments:
            ranges.append(layout.block_range(file.segmentation, segment))
        return ranges

    async def _read_ueb(self, layout: ShareLayout, fragments: _Fragments) -> bytes | memoryview:
        start = layout.ueb + layout.ueb_length_bytes
        field_ = fragments.get(layout.ueb, layout.ueb_length_bytes)
        if field_ is not None and (ueb := fragments.get(start, layout.parse_ueb_size(field_))) is not None:
            return ueb
        data = await self._read(layout.ueb, layout.ueb_length_bytes + UEB_BYTES_MAX)
        size = layout.parse_ueb_size(data)
        return data[layout.ueb_length_bytes : layout.ueb_length_bytes + size]

    async def _fetch(self, segment: int) -> Block:
        file, layout = self._file, self._layout
        assert layout is not None
        trees = [(file.crypttext_tree, layout.crypttext_hashes), (self._block_tree, layout.block_hashes)]
        runs = [_node_runs(tree, segment) for tree, _ in trees]
        ranges = [
            (start + HASH_BYTES * first, HASH_BYTES * count)
            for (_, start), tree_runs in zip(trees, runs, strict=True)
            for first, count in tree_runs
        ]
        *hashes, block = await self._get([*ranges, layout.block_range(file.segmentation, segment)], self._fragments)
        pieces = iter(hashes)
        for (tree, _), tree_runs in zip(trees, runs, strict=True):
            _take_nodes(tree, segment, [(first, next(pieces)) for first, _ in tree_runs])
        leaf = self._block_tree.get_leaf(segment)
        assert leaf is not None, "set_hashes() proved it or raised"
        if file.share_size > WHOLE_SHARE_BYTES_MAX or file.segmentation.num_segments == 1:
            self._fragments = _Fragments()  # served their purpose; a small share of many segments is kept
        return Block(self, block, leaf)

    async def _get(self, ranges: Sequence[Range], fragments: _Fragments) -> list[bytes | memoryview]:
        """All of these ranges, from `fragments` where they are there. Raises FormatError (too short)."""
        found: list[bytes | memoryview | None] = [fragments.get(*range_) for range_ in ranges]
        missing = [i for i, piece in enumerate(found) if piece is None]
        for i, data in zip(missing, await self._read_all([ranges[i] for i in missing]), strict=True):
            found[i] = data
        complete = [piece for piece in found if piece is not None]
        if [len(piece) for piece in complete] != [length for _, length in ranges]:
            raise FormatError("share is truncated")
        return complete

    async def _read_all(self, ranges: Sequence[Range]) -> list[bytes]:
        """All at once: one round trip."""
        if len(ranges) == 1:
            return [await self._read(*ranges[0])]
        pieces = [b""] * len(ranges)
        failures: list[Exception] = []

        async def read(i: int) -> None:
            try:
                pieces[i] = await self._read(*ranges[i])
            except (PeerError, FormatError) as error:
                failures.append(error)
                nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            for i in range(len(ranges)):
                nursery.start_soon(read, i)
        if failures:
            raise failures[0]
        return pieces

    async def _read(self, offset: int, length: int) -> bytes:
        data = await self.reader.read(offset, length)
        if len(data) > length:
            raise FormatError("server sent more than was asked for")
        return data


def _node_runs(tree: IncompleteHashTree, segment: int) -> list[tuple[int, int]]:
    """(first node, count) of the ranges to read so that the segment's leaf can be proven; empty when it is."""
    needed = sorted(tree.needed_hashes(segment, include_leaf=True))
    if not needed:
        return []
    if HASH_BYTES * len(tree) <= WHOLE_TREE_BYTES_MAX:
        return [(0, len(tree))]
    runs = [[needed[0], needed[0]]]
    for node in needed[1:]:
        if node - runs[-1][1] <= NODE_GAP_MAX:
            runs[-1][1] = node
        else:
            runs.append([node, node])
    return [(first, last - first + 1) for first, last in runs]


def _take_nodes(tree: IncompleteHashTree, segment: int, runs: Sequence[tuple[int, bytes | memoryview]]) -> None:
    """Prove the nodes just read. Raises FormatError."""
    if not runs:
        return
    nodes = {
        first + i: bytes(data[HASH_BYTES * i : HASH_BYTES * (i + 1)])
        for first, data in runs
        for i in range(len(data) // HASH_BYTES)
    }
    if len(nodes) < len(tree):  # of what was read in passing, siblings may be missing
        needed = tree.needed_hashes(segment, include_leaf=True)
        nodes = {node: nodes[node] for node in needed}
    tree.set_hashes(nodes)
