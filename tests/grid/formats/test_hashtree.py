"""Merkle trees against Tahoe-LAFS 1.20's, and proofs that must and must not hold."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grid.formats.hashtree import (
    BadHashError,
    IncompleteHashTree,
    build_tree,
    needed_hashes,
    rehash,
    runs_of,
    split_by_change,
    tree_size,
)
from grid.formats.hashutil import tagged_hash
from tests.vectors import name_of, section

MERKLE = section("formats.json", "merkle")


def _leaves(count: int) -> list[bytes]:
    return [tagged_hash(b"leaf", b"%d" % i) for i in range(count)]


@pytest.mark.parametrize("vector", MERKLE, ids=name_of)
def test_trees_and_chains_are_tahoes(vector: dict[str, Any]) -> None:
    leaves = [bytes.fromhex(leaf) for leaf in vector["leaves"]]
    tree = build_tree(leaves)
    assert [node.hex() for node in tree] == vector["nodes"]
    assert tree[0].hex() == vector["root"]
    assert len(tree) == tree_size(len(leaves)) == 2 * vector["first_leaf"] + 1
    assert [needed_hashes(len(leaves), i) for i in range(len(leaves))] == vector["needed"]
    assert [needed_hashes(len(leaves), i, include_leaf=True) for i in range(len(leaves))] == vector["needed_with_leaf"]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 10, 33])
def test_each_leaf_is_proven_by_its_chain(count: int) -> None:
    leaves = _leaves(count)
    tree = build_tree(leaves)
    partial = IncompleteHashTree(count, tree[0])
    for leaf in random.Random(count).sample(range(count), count):
        missing = partial.needed_hashes(leaf)
        assert missing <= set(needed_hashes(count, leaf))
        assert partial.needed_hashes(leaf, include_leaf=True) - missing <= {tree_size(count) // 2 + leaf}
        partial.set_hashes({node: tree[node] for node in missing}, {leaf: leaves[leaf]})
        assert partial.get_leaf(leaf) == leaves[leaf]
        assert partial.needed_hashes(leaf, include_leaf=True) == set()
    assert partial.root == tree[0]


@given(st.integers(1, 40), st.data())
def test_one_wrong_bit_is_refused_and_leaves_no_trace(count: int, data: st.DataObject) -> None:
    leaves = _leaves(count)
    tree = build_tree(leaves)
    leaf = data.draw(st.integers(0, count - 1))
    first = data.draw(st.integers(0, count - 1))
    partial = IncompleteHashTree(count, tree[0])
    partial.set_hashes({node: tree[node] for node in partial.needed_hashes(first)}, {first: leaves[first]})
    before = list(partial._nodes)
    chain = {node: tree[node] for node in needed_hashes(count, leaf, include_leaf=True)}
    wrong = data.draw(st.sampled_from(sorted(chain)))
    bad = bytearray(chain[wrong])
    bad[data.draw(st.integers(0, 31))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(BadHashError):
        partial.set_hashes(chain | {wrong: bytes(bad)})
    assert partial._nodes == before
    partial.set_hashes(chain)
    assert partial.get_leaf(leaf) == leaves[leaf]


@given(st.integers(1, 20), st.data())
def test_any_set_is_taken_whole_or_not_at_all(count: int, data: st.DataObject) -> None:
    """Honest hashes are taken exactly when every one can be proven: the rest of its chain is known or given too."""
    tree = build_tree(_leaves(count))
    partial = IncompleteHashTree(count, tree[0])
    for _ in range(3):
        nodes = data.draw(st.sets(st.integers(0, len(tree) - 1)))
        before = {node for node, known in enumerate(partial._nodes) if known is not None}
        have = before | nodes
        for node in range(len(tree) - 1, 0, -2):  # pairs, from the last up: what can be computed
            if {node, node - 1} <= have:
                have.add((node - 1) // 2)
        provable = all((node + 1 if node % 2 else node - 1) in have for node in have - {0})
        try:
            partial.set_hashes({node: tree[node] for node in nodes})
        except BadHashError:
            assert not provable
            assert {node for node, known in enumerate(partial._nodes) if known is not None} == before
        else:
            assert provable
            assert {node for node, known in enumerate(partial._nodes) if known is not None} == have


def test_a_whole_array_and_padding_leaves() -> None:
    tree = build_tree(_leaves(5))
    partial = IncompleteHashTree(5, tree[0])
    partial.set_hashes(dict(enumerate(tree)))
    assert [partial.get_leaf(leaf) for leaf in range(5)] == _leaves(5)


def test_nothing_is_taken_without_a_root() -> None:
    tree = build_tree(_leaves(3))
    partial = IncompleteHashTree(3)
    with pytest.raises(BadHashError, match="root"):
        partial.set_hashes(dict(enumerate(tree)))
    partial.set_hashes()
    partial.set_root(tree[0])
    partial.set_root(tree[0])
    with pytest.raises(BadHashError):
        partial.set_root(bytes(32))
    partial.set_hashes(dict(enumerate(tree)))


@pytest.mark.parametrize(
    ("hashes", "leaves"),
    [({-1: bytes(32)}, {}), ({7: bytes(32)}, {}), ({}, {3: bytes(32)}), ({}, {-1: bytes(32)}), ({1: b"short"}, {})],
)
def test_nodes_outside_the_tree_and_what_is_no_hash(hashes: dict[int, bytes], leaves: dict[int, bytes]) -> None:
    with pytest.raises(BadHashError):
        IncompleteHashTree(3, build_tree(_leaves(3))[0]).set_hashes(hashes, leaves)


def test_a_node_and_a_leaf_must_agree() -> None:
    tree = build_tree(_leaves(2))
    with pytest.raises(BadHashError, match="two hashes"):
        IncompleteHashTree(2, tree[0]).set_hashes({1: tree[1], 2: tree[2]}, {0: tree[2]})


def test_no_such_leaf() -> None:
    for leaf in (-1, 3):
        with pytest.raises(ValueError, match="no leaf"):
            needed_hashes(3, leaf)


@given(st.integers(1, 40), st.data())
def test_changed_leaves_need_no_more_than_what_stays(count: int, data: st.DataObject) -> None:
    """The nodes named cover the tree, prove themselves against the old root, and give the new one."""
    old = build_tree(_leaves(count))
    width = (len(old) + 1) // 2
    changed = sorted(data.draw(st.sets(st.integers(0, width - 1), max_size=width)))
    kept, replaced = split_by_change(count, changed)
    partial = IncompleteHashTree(count, old[0])
    partial.set_hashes({node: old[node] for node in (*kept, *replaced)})
    new_leaves = {leaf: tagged_hash(b"new", b"%d" % leaf) for leaf in changed}
    array = [new_leaves.get(leaf, old[width - 1 + leaf]) for leaf in range(width)]
    expected = build_tree(array)
    fresh = rehash(count, new_leaves, {node: old[node] for node in kept})
    assert {node: expected[node] for node in fresh} == fresh
    assert {node for node in range(len(old)) if expected[node] != old[node]} <= set(fresh)
    assert len(kept) + len(replaced) <= max(1, 2 * len(changed)) * width.bit_length()


@given(st.sets(st.integers(0, 60)), st.integers(1, 5))
def test_runs_cover_the_nodes_and_little_else(nodes: set[int], near: int) -> None:
    runs = list(runs_of(sorted(nodes), near))
    covered = [node for first, count in runs for node in range(first, first + count)]
    assert set(covered) >= nodes and covered == sorted(set(covered))
    assert all({first, first + count - 1} <= nodes for first, count in runs)
    assert all(second - (first + count - 1) > near for (first, count), (second, _) in pairwise(runs))
