"""Merkle hash trees: one root vouches for many leaves, and a few siblings prove each.

    array of 2P - 1 nodes, breadth first; P = leaves, rounded up to a power of two (at least 1)
    node 0 is the root; children of i are 2i+1 and 2i+2; leaf j is node P-1+j

Leaves beyond the last are padded with hashes of their own position, stored and sent like any other.
Source: Tahoe-LAFS 1.20's block, share and ciphertext hash trees. The number of leaves is the caller's to bound.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

from grid.errors import FormatError
from grid.formats.hashutil import HASH_BYTES, empty_leaf_hash, pair_hash

_NONE: Final[Mapping[int, bytes]] = {}


class BadHashError(FormatError):
    """Hashes do not lead up to the trusted root."""


def _width(leaf_count: int) -> int:
    """P: leaf positions, padding included."""
    return 1 << max(leaf_count - 1, 0).bit_length()


def tree_size(leaf_count: int) -> int:
    """Nodes in the array."""
    return 2 * _width(leaf_count) - 1


def build_tree(leaves: Sequence[bytes]) -> list[bytes]:
    """The whole array, root first, from leaves of 32 bytes."""
    level = [*leaves, *map(empty_leaf_hash, range(len(leaves), _width(len(leaves))))]
    levels = [level]
    while len(level) > 1:
        level = [pair_hash(level[i], level[i + 1]) for i in range(0, len(level), 2)]
        levels.append(level)
    return [node for level in reversed(levels) for node in level]


def _climb(node: int) -> Iterator[int]:
    """The node and its ancestors, without the root."""
    while node:
        yield node
        node = (node - 1) >> 1


def _sibling(node: int) -> int:
    return node + 1 if node & 1 else node - 1


def needed_hashes(leaf_count: int, leaf: int, include_leaf: bool = False) -> list[int]:
    """The chain that proves a leaf to one who knows the root: node numbers, ascending.

    With the leaf itself in CHK shares' share hash chains, without it in mutable ones. The root is never part of
    it, but for a tree of one leaf "with leaf".
    """
    own = _leaf_node(leaf_count, leaf)
    chain = [_sibling(node) for node in _climb(own)]
    return sorted([*chain, own] if include_leaf else chain)


def _leaf_node(leaf_count: int, leaf: int) -> int:
    if not 0 <= leaf < max(leaf_count, 1):
        raise ValueError(f"no leaf {leaf} of {leaf_count}")
    return _width(leaf_count) - 1 + leaf


def check_tree(nodes: bytes, root: bytes, leaves: bytes | None = None) -> None:
    """Prove a whole array, as a share holds it; `leaves`, joined, are what its first leaves must be. CPU-bound.

    Raises BadHashError, which names the first leaf that differs.
    """
    width = (len(nodes) // HASH_BYTES + 1) // 2
    if len(nodes) != HASH_BYTES * (2 * width - 1):
        raise BadHashError("not a whole hash tree")
    if nodes[:HASH_BYTES] != root:
        raise BadHashError("another root")
    for node in range(width - 1):
        left = HASH_BYTES * (2 * node + 1)
        middle, right = left + HASH_BYTES, left + 2 * HASH_BYTES
        if pair_hash(nodes[left:middle], nodes[middle:right]) != nodes[HASH_BYTES * node : HASH_BYTES * (node + 1)]:
            raise BadHashError(f"nodes {2 * node + 1} and {2 * node + 2} do not hash to their parent")
    first = HASH_BYTES * (width - 1)
    if leaves is not None and nodes[first : first + len(leaves)] != leaves:
        for at in range(0, len(leaves), HASH_BYTES):
            if nodes[first + at : first + at + HASH_BYTES] != leaves[at : at + HASH_BYTES]:
                raise BadHashError(f"block {at // HASH_BYTES} does not match its hash")


def split_by_change(leaf_count: int, changed: Sequence[int]) -> tuple[list[int], list[int]]:
    """(kept, replaced): the topmost nodes that stand over none, and over nothing but, leaves in `changed` (ascending).

    Together they cover the tree. Who knows `kept` can compute the new tree from the new leaves, see `rehash`; who has
    read both can prove them against the old root.
    """
    kept: list[int] = []
    replaced: list[int] = []
    unseen = [(0, 0, _width(leaf_count))]
    while unseen:
        node, start, stop = unseen.pop()
        count = bisect_left(changed, stop) - bisect_left(changed, start)
        if count in (0, stop - start):
            (replaced if count else kept).append(node)
            continue
        middle = (start + stop) // 2
        unseen += ((2 * node + 1, start, middle), (2 * node + 2, middle, stop))
    return sorted(kept), sorted(replaced)


def runs_of(nodes: Iterable[int], near: int = 1) -> Iterator[tuple[int, int]]:
    """(first, count) of neighbours among `nodes` (ascending); gaps of less than `near` nodes are run over."""
    first = last = -1
    for node in nodes:
        if last >= 0 and node - last > near:
            yield first, last - first + 1
            first = node
        elif last < 0:
            first = node
        last = node
    if last >= 0:
        yield first, last - first + 1


def rehash(leaf_count: int, leaves: Mapping[int, bytes], kept: Mapping[int, bytes]) -> dict[int, bytes]:
    """Every node over the new `leaves` {leaf: hash} and these themselves; `kept` as `split_by_change` names them."""
    first_leaf = _width(leaf_count) - 1
    fresh = {first_leaf + leaf: leaf_hash for leaf, leaf_hash in leaves.items()}
    level = set(fresh)
    while level and level != {0}:
        level = {(node - 1) >> 1 for node in level}
        for node in level:
            left, right = 2 * node + 1, 2 * node + 2
            fresh[node] = pair_hash(fresh.get(left) or kept[left], fresh.get(right) or kept[right])
    return fresh


class IncompleteHashTree:
    """A tree of which some nodes are known, each of them proven against the root.

    At all times a known node's sibling and parent are known too, so whatever is here can be believed.
    """

    __slots__ = ("_nodes", "leaf_count")

    def __init__(self, leaf_count: int, root: bytes | None = None) -> None:
        self.leaf_count = leaf_count
        self._nodes: list[bytes | None] = [None] * tree_size(leaf_count)
        if root is not None:
            self.set_root(root)

    def __len__(self) -> int:
        """Nodes in the array, known or not."""
        return len(self._nodes)

    @property
    def root(self) -> bytes | None:
        return self._nodes[0]

    def set_root(self, root: bytes) -> None:
        """Trust this root, which must have been proven in another way. Raises BadHashError if another one is known."""
        if len(root) != HASH_BYTES or self._nodes[0] not in (None, root):
            raise BadHashError("another root")
        self._nodes[0] = root

    def get_leaf(self, leaf: int) -> bytes | None:
        return self._nodes[_leaf_node(self.leaf_count, leaf)]

    def needed_hashes(self, leaf: int, include_leaf: bool = False) -> set[int]:
        """Which nodes, of those not known yet, it takes to prove this leaf."""
        own = _leaf_node(self.leaf_count, leaf)
        if self._nodes[own] is not None:
            return set()
        needed = {own} if include_leaf else set()
        for node in _climb(own):
            if self._nodes[node] is not None:
                break
            needed.add(_sibling(node))
        return needed

    def set_hashes(self, hashes: Mapping[int, bytes] = _NONE, leaves: Mapping[int, bytes] = _NONE) -> None:
        """Take nodes (by node number) and leaves (by leaf number) that can be proven, all of them or none.

        Needs the root. More than necessary is fine; what is known already must be the same. Raises BadHashError.
        """
        given = self._merge(hashes, leaves)
        known = self._nodes
        if given and known[0] is None:
            raise BadHashError("no root to check against")
        proven: dict[int, bytes] = {}
        # Level by level, leaves first: every pair is hashed once and its parent checked, or taken for the next level.
        by_level: dict[int, list[int]] = {}
        for node in given:
            by_level.setdefault((node + 1).bit_length(), []).append(node)
        for level in range(max(by_level, default=0), 1, -1):
            for node in by_level.get(level, ()):
                if node in proven:
                    continue  # came in with its sibling
                other = _sibling(node)
                other_hash = given.get(other) or known[other]
                if other_hash is None:
                    raise BadHashError(f"node {other} is missing to prove node {node}")
                own_hash = given[node]
                proven[node], proven[other] = own_hash, other_hash
                parent_hash = pair_hash(own_hash, other_hash) if node & 1 else pair_hash(other_hash, own_hash)
                parent = (node - 1) >> 1
                expected = known[parent] or given.get(parent)
                if expected is None:
                    given[parent] = parent_hash
                    by_level.setdefault(level - 1, []).append(parent)
                elif expected != parent_hash:
                    raise BadHashError(f"nodes {node} and {other} do not hash to their parent")
        for node, node_hash in proven.items():
            known[node] = node_hash

    def _merge(self, hashes: Mapping[int, bytes], leaves: Mapping[int, bytes]) -> dict[int, bytes]:
        """Both mappings by node number, without what is known already. Raises BadHashError."""
        first_leaf = len(self._nodes) >> 1
        if leaves and not all(0 <= leaf < self.leaf_count for leaf in leaves):
            raise BadHashError("a leaf outside the tree")
        given: dict[int, bytes] = {}
        for offset, mapping in ((0, hashes), (first_leaf, leaves)):
            for index, node_hash in mapping.items():
                node = offset + index
                if not 0 <= node < len(self._nodes) or len(node_hash) != HASH_BYTES:
                    raise BadHashError("not a hash, or a node outside the tree")
                if given.setdefault(node, node_hash) != node_hash:
                    raise BadHashError(f"two hashes for node {node}")
                if (known := self._nodes[node]) is not None:
                    if known != node_hash:
                        raise BadHashError(f"another hash for node {node} is proven")
                    del given[node]
        return given
