"""Happiness and placement: golden vectors made by Tahoe-LAFS 1.20, and properties the real client lacks."""

from __future__ import annotations

from itertools import combinations, permutations
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grid.operations.happiness import happiness, invert, maximum_matching, place_shares
from tests.vectors import section

SERVERS = ["a", "b", "c", "d"]
sharemaps = st.dictionaries(st.integers(0, 5), st.sets(st.sampled_from(SERVERS)), max_size=5)


@pytest.mark.parametrize(
    "vector", section("formats.json", "happiness.servers_of_happiness"), ids=lambda vector: vector["name"]
)
def test_happiness_matches_tahoe(vector: dict[str, Any]) -> None:
    sharemap = {int(share): set(servers) for share, servers in vector["sharemap"].items()}
    assert happiness(sharemap) == vector["happiness"]


@pytest.mark.parametrize("vector", section("formats.json", "happiness.placement"), ids=lambda vector: vector["name"])
def test_placement_is_as_happy_as_tahoes(vector: dict[str, Any]) -> None:
    existing = {server: set(shares) for server, shares in vector["existing"].items()}
    placed = place_shares(vector["writeable"], vector["readonly"], vector["total_shares"], existing)
    assert sorted(placed) == vector["placed_shares"]
    mapping = {share: {server} for share, server in placed.items()}
    assert happiness(mapping) == vector["happiness_of_mapping"]
    everything = {share: servers | invert(existing).get(share, set()) for share, servers in mapping.items()}
    assert happiness(everything) == vector["happiness_with_existing"]


@given(sharemaps)
def test_matching_is_a_largest_one(sharemap: dict[int, set[str]]) -> None:
    matching = maximum_matching(sharemap)
    assert len(set(matching.values())) == len(matching)
    assert all(server in sharemap[share] for share, server in matching.items())
    assert len(matching) == _brute_force(sharemap)


def _brute_force(sharemap: dict[int, set[str]]) -> int:
    for size in range(min(len(sharemap), len(SERVERS)), 0, -1):
        for shares in combinations(sharemap, size):
            for servers in permutations(SERVERS, size):
                if all(server in sharemap[share] for share, server in zip(shares, servers, strict=True)):
                    return size
    return 0


def test_fresh_shares_go_in_the_order_of_servers() -> None:
    order = [f"s{i}" for i in range(5)]
    assert place_shares(order, [], 5, {}) == dict(enumerate(order))
    wrapped = place_shares(order[:2], [], 5, {})
    assert sorted(wrapped.values()) == ["s0", "s0", "s0", "s1", "s1"]


def test_one_missing_share_moves_one_share() -> None:
    """The real client would send all of them again."""
    order = [f"s{i}" for i in range(10)]
    existing = {server: {number} for number, server in enumerate(order) if number != 4}
    placed = place_shares(order, [], 10, existing)
    assert {share: server for share, server in placed.items() if share not in existing.get(server, ())} == {4: "s4"}


@settings(max_examples=100)
@given(st.dictionaries(st.sampled_from(SERVERS), st.sets(st.integers(0, 6))), st.integers(1, 7), st.integers(0, 4))
def test_placement_places_all_and_is_as_happy_as_can_be(
    existing: dict[str, set[int]], total: int, readonly_count: int
) -> None:
    readonly, writeable = SERVERS[:readonly_count], SERVERS[readonly_count:]
    placed = place_shares(writeable, readonly, total, existing)
    if not writeable:
        assert placed == {}
        return
    assert sorted(placed) == list(range(total))
    assert all(server in writeable or share in existing.get(server, ()) for share, server in placed.items())
    readonly_part = maximum_matching(invert({s: {n for n in existing.get(s, ()) if n < total} for s in readonly}))
    assert happiness({share: {server} for share, server in placed.items()}) >= min(
        total, len(writeable) + len(readonly_part)
    )
