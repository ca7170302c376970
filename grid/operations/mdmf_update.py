"""A version of an MDMF file that differs from the last one in a few segments: only these are moved.

    touched segments   what the changes leave of them is read, then coded with a fresh salt
    block hash trees   of each share: the nodes beside the changed leaves are read and proven, those above made anew
    share tree         over all shares' new roots ── root hash ── signature

Each share is then changed where it is, by one call: its head, the new blocks, the changed tree nodes. Of a share nobody
holds nothing is known, so nothing is put in its place in the share tree but a constant: repair makes it anew with all.

The tree stands after the data. When the file outgrows that place, or its tree gets another depth, the whole tree is
written at a new one: that takes its leaves to be read, 32 bytes for each segment. So that appending does not take that
every time, a file of some size gets room to grow with it.

Tahoe-LAFS 1.20 reads and writes whole trees, always right after the data; it does not check what it reads of them.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Final

import trio
from attrs import field, frozen

from grid.errors import CorruptShareError, FormatError, NotEnoughSharesError, PeerError, ShareError
from grid.formats.chk_share import pack_hashes, unpack_share_hashes
from grid.formats.hashtree import (
    IncompleteHashTree,
    build_tree,
    needed_hashes,
    rehash,
    runs_of,
    split_by_change,
    tree_size,
)
from grid.formats.hashutil import HASH_BYTES, empty_leaf_hash
from grid.formats.mdmf_share import MDMF_DATA_OFFSET, mdmf_data_end, mdmf_signed_prefix, pack_mdmf_head
from grid.formats.mutable_share import MutableHeader, parse_header
from grid.formats.segments import Segmentation, div_ceil
from grid.operations.changes import Changes, Step
from grid.operations.keys import MutableKeys
from grid.operations.lanes import in_lanes
from grid.operations.mutable_encode import CodedSegment, RandomBytes, Writes, code_segments
from grid.operations.retrieve import MutableVersion, tree_nodes, tree_ranges
from grid.operations.servermap import BadShare, report_corrupt
from grid.operations.slot_share import FoundShare
from grid.operations.worker import run_cpu_work

log = logging.getLogger(__name__)

TREE_TIMEOUT_S: Final = 15.0  # for one share's tree nodes
TREE_STRAGGLER_S: Final = 3.0  # for the next one, once those of k shares are here
GROWTH_PARTS: Final = 8  # a file that grows gets room for an eighth of its segments before its trees


@frozen
class PatchedVersion:
    """NewVersion, made of changes to the shares of `base`."""

    header: MutableHeader
    base: MutableHeader
    patches: Mapping[int, Writes] = field(repr=False)

    @property
    def numbers(self) -> Collection[int]:
        return self.patches.keys()

    def writes(self, number: int) -> Writes:
        return self.patches[number]


def can_update(header: MutableHeader) -> bool:
    """Whether shares of this version are laid out so that they can be changed in place: data begins where all writers
    have it begin.
    """
    return header.format == "mdmf" and header.offsets.share_data[0] == MDMF_DATA_OFFSET


async def prepare_update(
    version: MutableVersion,
    changes: Changes,
    step: Step,
    keys: MutableKeys,
    *,
    seqnum: int,
    final_size: int,
    random_bytes: RandomBytes,
    signature: bytes | None = None,
) -> PatchedVersion:
    """One step of a plan, made from `version`, whose layout `can_update` accepted.

    `final_size`: where the steps lead, so that trees get a place that lasts. Shares found corrupt are marked so in the
    version's map, and left out as those whose server is slow. `signature` takes the place of ours.
    Raises NotEnoughSharesError, and what `changes.read` raises.
    """
    old = version.header
    file = Segmentation(step.size, old.k, old.segment_size)
    layout = _Layout.of(old, file, final_size)
    changed = layout.changed_leaves(step.segments)
    coded: dict[int, CodedSegment] = {}
    trees: dict[int, dict[int, bytes]] = {}

    async def plaintext_of(segment: int) -> bytes:
        return await _plaintext(version, changes, file, segment)

    async def code() -> None:
        k, n = old.k, old.n
        coded.update(
            await code_segments(step.segments, plaintext_of, keys.readkey, k=k, n=n, random_bytes=random_bytes)
        )

    async def read_trees() -> None:
        trees.update(await _read_trees(version, layout, changed))

    await in_lanes(2, (code, read_trees), lambda work: work())

    def assemble() -> PatchedVersion:
        return _assemble(layout, changed, coded, trees, keys, seqnum=seqnum, signature=signature)

    return await run_cpu_work(assemble, len(trees) * (len(coded) * file.block_size + HASH_BYTES * len(changed)))


async def _plaintext(version: MutableVersion, changes: Changes, file: Segmentation, segment: int) -> bytes:
    """A segment of the new version: changes over what was there over zeros."""
    start = file.segment_start(segment)
    stop = start + file.segment_bytes(segment)
    spans = changes.within(start, stop)
    if spans == [(start, stop)]:
        return await changes.read(start, stop - start)
    data = bytearray(stop - start)
    was_stop = min(stop, version.size)
    if sum(min(b, was_stop) - a for a, b in spans if a < was_stop) < was_stop - start:  # some of it shows through
        before = await version.read_segment(segment)
        data[: was_stop - start] = before[: was_stop - start]
    for a, b in spans:
        data[a - start : b - start] = await changes.read(a, b - a)
    return bytes(data)


# --- where the trees stand, and what of them changes


@frozen
class _Layout:
    """The old version's shares and the new one's."""

    old: MutableHeader
    file: Segmentation  # the new one's
    tree_at: int  # the new one's

    @classmethod
    def of(cls, old: MutableHeader, file: Segmentation, final_size: int) -> _Layout:
        old_at = old.offsets.block_hash_tree[0]
        same_depth = tree_size(file.num_segments) == tree_size(old.num_segments)

        def data_end(size: int) -> int:
            return mdmf_data_end(size, old.k, old.segment_size)

        growing = file.size > old.data_size
        if data_end(file.size) <= old_at and (same_depth or (growing and data_end(final_size) <= old_at)):
            return cls(old, file, old_at)
        size = max(file.size, final_size)
        if growing and size == file.size:  # the last step
            size += div_ceil(size, old.segment_size) // GROWTH_PARTS * old.segment_size
        return cls(old, file, data_end(size))

    @property
    def in_place(self) -> bool:
        """Whether most nodes of a tree stay what and where they are."""
        return self.tree_at == self.old.offsets.block_hash_tree[0] and tree_size(self.file.num_segments) == tree_size(
            self.old.num_segments
        )

    def changed_leaves(self, segments: Sequence[int]) -> list[int]:
        """Of the new tree, ascending: those of new blocks, and where there was a block and is none now."""
        width = (tree_size(self.file.num_segments) + 1) // 2
        return [*segments, *range(self.file.num_segments, min(self.old.num_segments, width))]

    def nodes_to_read(self, changed: Sequence[int]) -> list[int]:
        """Of the old trees, ascending; with them the new ones can be made."""
        if self.in_place:
            kept, replaced = split_by_change(self.file.num_segments, changed)
            return sorted({0, *kept, *replaced}) if kept else []
        count = self.old.num_segments
        if set(range(min(count, self.file.num_segments))) <= set(changed):
            return []
        first_leaf = tree_size(count) // 2
        return [0, *range(first_leaf, first_leaf + count)] if count > 1 else [0]

    def constant_nodes(self) -> dict[int, bytes]:
        """Of the old trees, what it takes to prove all their leaves and need not be read."""
        if self.in_place:
            return {}
        count, first_leaf = self.old.num_segments, tree_size(self.old.num_segments) // 2
        return {first_leaf + leaf: empty_leaf_hash(leaf) for leaf in range(count, first_leaf + 1)}

    def new_nodes(self, changed: Mapping[int, bytes], known: Mapping[int, bytes]) -> dict[int, bytes]:
        """{node: hash} of one share's new tree, the root and those that have to be written."""
        if self.in_place:
            return rehash(self.file.num_segments, changed, known) or {0: known[0]}
        first_leaf = tree_size(self.old.num_segments) // 2
        leaves = [changed.get(leaf) or known[first_leaf + leaf] for leaf in range(self.file.num_segments)]
        return dict(enumerate(build_tree(leaves)))


def _assemble(
    layout: _Layout,
    changed: Sequence[int],
    coded: dict[int, CodedSegment],
    trees: Mapping[int, Mapping[int, bytes]],
    keys: MutableKeys,
    *,
    seqnum: int,
    signature: bytes | None,
) -> PatchedVersion:
    """CPU-bound. `coded` is used up, so that its blocks are not in memory twice."""
    old, file, tree_at = layout.old, layout.file, layout.tree_at
    new_trees = {
        number: layout.new_nodes(
            {leaf: coded[leaf].leaves[number] if leaf in coded else empty_leaf_hash(leaf) for leaf in changed}, known
        )
        for number, known in trees.items()
    }
    share_tree = build_tree(
        [new_trees[number][0] if number in new_trees else empty_leaf_hash(number) for number in range(old.n)]
    )
    prefix = mdmf_signed_prefix(
        seqnum=seqnum, root_hash=share_tree[0], k=old.k, n=old.n, segment_size=old.segment_size, data_size=file.size
    )
    signature = signature or keys.private.sign_pss(prefix)
    patches: dict[int, list[tuple[int, bytes]]] = {}
    for number in new_trees:
        head = pack_mdmf_head(
            prefix,
            public_key=keys.public_der,
            signature=signature,
            share_hash_chain={node: share_tree[node] for node in needed_hashes(old.n, number)},
            encrypted_private_key=keys.encrypted_private_key,
            tree_at=tree_at,
            eof=tree_at + HASH_BYTES * tree_size(file.num_segments),
        )
        patches[number] = [(0, head)]
        header = parse_header(head)
    for segment in sorted(coded):
        made = coded.pop(segment)
        offset, _ = header.salt_and_block_range(segment)
        for number in new_trees:
            patches[number].append((offset, b"".join((made.salt, made.blocks[number]))))
    for number, nodes in new_trees.items():
        for first, count in runs_of(sorted(nodes)):
            run = pack_hashes([nodes[node] for node in range(first, first + count)])
            patches[number].append((tree_at + HASH_BYTES * first, run))
    return PatchedVersion(header, old, patches)


# --- reading what is to be known of the trees


async def _read_trees(version: MutableVersion, layout: _Layout, changed: Sequence[int]) -> dict[int, dict[int, bytes]]:
    """{share number: {node: hash}}, proven, as `nodes_to_read` says; of every share whose server answers in time.

    Raises NotEnoughSharesError when these are fewer than k.
    """
    header = version.header
    copies: dict[int, list[FoundShare]] = {}
    for share in version.servermap.shares_of(header):
        copies.setdefault(share.number, []).append(share)
    nodes, constant = layout.nodes_to_read(changed), layout.constant_nodes()
    if not nodes:
        return {number: {} for number in copies}
    found: dict[int, dict[int, bytes]] = {}
    failures: list[Exception] = []
    bad: list[BadShare] = []
    share_tree = IncompleteHashTree(header.n, header.root_hash)
    send, receive = trio.open_memory_channel[int](len(copies) or 1)

    async def read_one(number: int) -> None:
        for share in copies[number]:
            try:
                with trio.fail_after(TREE_TIMEOUT_S):
                    found[number] = await _read_tree(share, nodes, constant, share_tree)
                break
            except CorruptShareError as error:
                version.servermap.mark_bad(share, error)
                bad.append(BadShare(share.server, share.number, b"", error))
                failures.append(error)
            except (PeerError, ShareError, trio.TooSlowError) as error:
                failures.append(error)
        send.send_nowait(number)

    async with trio.open_nursery() as nursery:
        for number in copies:
            nursery.start_soon(read_one, number)
        for _ in copies:
            with trio.move_on_after(TREE_STRAGGLER_S if len(found) >= header.k else float("inf")) as scope:
                await receive.receive()
            if scope.cancelled_caught:
                break
        nursery.cancel_scope.cancel()
    await report_corrupt(version.servermap.reports, version.storage_index, bad)
    if len(found) < header.k:
        raise NotEnoughSharesError(header.k, len(found), tuple(failures))
    if len(found) < len(copies):
        log.info("an update goes to %d of %d shares: the trees of the others did not come", len(found), len(copies))
    return found


async def _read_tree(
    share: FoundShare, nodes: Sequence[int], constant: Mapping[int, bytes], share_tree: IncompleteHashTree
) -> dict[int, bytes]:
    """Raises CorruptShareError, PeerError."""
    header = share.header
    ranges = tree_ranges(header, nodes)
    chain, *found = await share.read([header.offsets.share_hash_chain, *ranges])
    known = tree_nodes(header, nodes, ranges, found)

    def prove() -> None:
        if len(known) > 1:
            IncompleteHashTree(header.num_segments, known[0]).set_hashes({**constant, **known})

    try:
        share_tree.set_hashes(unpack_share_hashes(chain), leaves={share.number: known[0]})
        await run_cpu_work(prove, 4 * HASH_BYTES * len(known))
    except FormatError as error:
        raise share.corrupt(str(error)) from None
    return known
