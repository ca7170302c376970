"""How well shares are spread, and where to put the missing ones. Pure functions; no I/O.

Happiness is the size of a maximum matching between servers and shares: the number of servers that each hold
a share of their own. Placement keeps what is already there wherever that serves, and otherwise follows the
order in which servers are given (the permuted order), share i to server i, as the mutable publisher does.

Source: servers of happiness, as Tahoe-LAFS means it. Its 1.20 client lets every writeable server match every
existing share and so uploads duplicates; here a server matches only shares it holds.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import TypeVar

Server = TypeVar("Server", bound=str)
Edges = Mapping[int, AbstractSet[Server]]  # {share number: servers that hold (or take) it}


def maximum_matching(edges: Edges[Server], servers: Sequence[Server] | None = None) -> dict[int, Server]:
    """A largest {share: server} in which no server occurs twice. The same input gives the same answer.

    Only `servers`, if given, take part, earlier ones preferred.
    """
    order = {server: place for place, server in enumerate(servers)} if servers is not None else None
    choices: dict[int, list[Server]] = {}
    for share in sorted(edges):
        if order is None:
            choices[share] = sorted(edges[share])
        else:
            choices[share] = sorted((s for s in edges[share] if s in order), key=order.__getitem__)
    share_of: dict[Server, int] = {}

    def augment(share: int, tried: set[Server]) -> bool:
        # Depth is bounded by the number of shares in the matching, at most 256.
        for server in choices[share]:
            if server in tried:
                continue
            tried.add(server)
            if server not in share_of or augment(share_of[server], tried):
                share_of[server] = share
                return True
        return False

    for share in choices:
        augment(share, set())
    return {share: server for server, share in share_of.items()}


def happiness(sharemap: Edges[Server]) -> int:
    """On how many servers a share of their own can be counted, of {share number: servers}."""
    return len(maximum_matching(sharemap))


def invert(holdings: Mapping[Server, Iterable[int]]) -> dict[int, set[Server]]:
    """{server: shares} as {share: servers}."""
    sharemap: dict[int, set[Server]] = {}
    for server, shares in holdings.items():
        for share in shares:
            sharemap.setdefault(share, set()).add(server)
    return sharemap


def place_shares(
    writeable: Sequence[Server],
    readonly: Sequence[Server],
    total_shares: int,
    existing: Mapping[Server, Collection[int]],
) -> dict[int, Server]:
    """Say for every share number below `total_shares` which server is to hold it.

    `existing` tells who holds what. A share placed where it already is needs no upload. Without any writeable
    server the answer is empty. With w writeable servers that hold nothing, happiness becomes min(w, total).
    """
    if not writeable:
        return {}
    numbers = range(total_shares)
    held = {s: {n for n in existing.get(s, ()) if n < total_shares} for s in (*readonly, *writeable)}

    placed = maximum_matching(invert({s: held[s] for s in readonly}), readonly)
    left_over = {s: held[s] - placed.keys() for s in writeable}
    placed |= maximum_matching(invert(left_over), writeable)

    used = set(placed.values())
    unused = [server for server in writeable if server not in used]
    remaining = [number for number in numbers if number not in placed]
    placed |= dict(zip(remaining, unused, strict=False))  # a complete graph: any pairing is a largest one
    _spread_rest([number for number in numbers if number not in placed], writeable, held, placed)
    return placed


def place_missing(
    writeable: Sequence[Server],
    missing: Iterable[int],
    existing: Mapping[Server, Collection[int]],
    barred: Collection[tuple[Server, int]],
) -> dict[int, Server]:
    """For shares that nobody has: where to put them, on servers that have none of their own first. For a repair.

    `existing` tells who holds which good shares; they stay. A share goes nowhere it is `barred` from (a corrupt copy
    may be in its place); one that is barred everywhere is left out.
    """
    used = set(maximum_matching(invert(existing)).values())
    load = {server: len(existing.get(server, ())) for server in writeable}
    placed: dict[int, Server] = {}
    for number in missing:
        free = [server for server in writeable if (server, number) not in barred]
        if not free:
            continue
        server = min(free, key=lambda server: (server in used, load[server]))  # of equals, the first: permuted order
        placed[number] = server
        used.add(server)
        load[server] += 1
    return placed


def _spread_rest(
    shares: Sequence[int], writeable: Sequence[Server], held: Mapping[Server, set[int]], placed: dict[int, Server]
) -> None:
    """Shares beyond one a server: they stay where they are, else go to the least loaded server."""
    load = dict.fromkeys(writeable, 0)
    for server in placed.values():
        if server in load:
            load[server] += 1
    for share in shares:
        holder = next((server for server in writeable if share in held[server]), None)
        server = holder if holder is not None else min(writeable, key=load.__getitem__)
        placed[share] = server
        load[server] += 1
