"""Mirror partners by trying all pairs anew for each pair: the slow, obvious twin of `plan/state/mirrors.py`."""

from __future__ import annotations

from collections.abc import Sequence


def choose_partners(
    active: Sequence[int], nodes: Sequence[str], overlap_RR: Sequence[Sequence[int]], redundancy: int
) -> dict[int, list[int]]:
    """Choose the mirror ranks of each active rank: at most `redundancy`, all different, never the rank itself.

    Args:
        active: ranks that own state.
        nodes: fault domain of every rank.
        overlap_RR: [p][q], elements owned by p that q holds already; [p][p], all elements that p owns.
        redundancy: partners wanted per rank.
    """
    partners: dict[int, list[int]] = {rank: [] for rank in active}
    if redundancy <= 0 or len(active) < 2:
        return partners
    allowed = {p: _other_node(p, active, nodes) for p in active}
    kept = _all_held_fraction(active, allowed, overlap_RR, min(redundancy, len(active) - 1))
    if kept is not None:
        return kept
    pairs = _mutual_pairs(active, nodes, allowed, overlap_RR)
    for a, b in pairs:
        partners[a], partners[b] = [b], [a]
    for p in active:
        if not partners[p]:
            _join_unpaired(p, pairs, partners, allowed, overlap_RR)
    for _ in range(1, min(redundancy, len(active) - 1)):
        _add_one_each(active, nodes, partners, overlap_RR)
    return partners


def _other_node(p: int, active: Sequence[int], nodes: Sequence[str]) -> list[int]:
    """Ranks that may mirror p: those of other nodes, or of p's own node if there is no other."""
    elsewhere = [q for q in active if nodes[q] != nodes[p]]
    return elsewhere or [q for q in active if q != p]


def _all_held_fraction(
    active: Sequence[int], allowed: dict[int, list[int]], overlap_RR: Sequence[Sequence[int]], wanted: int
) -> dict[int, list[int]] | None:
    """Partners that hold all of a rank's units already, if each rank has enough of them; nothing must then be sent.
    Else None.
    """
    used = dict.fromkeys(active, 0)
    kept: dict[int, list[int]] = {}
    for p in active:
        full = [q for q in active if q != p and overlap_RR[p][q] == overlap_RR[p][p]]
        full.sort(key=lambda q: (q not in allowed[p], used[q], q))
        if len(full) < wanted or full[0] not in allowed[p]:
            return None
        kept[p] = full[:wanted]
        if overlap_RR[p][p]:
            for q in kept[p]:
                used[q] += 1
    return kept if any(overlap_RR[p][p] for p in active) else None


def _mutual_pairs(
    active: Sequence[int],
    nodes: Sequence[str],
    allowed: dict[int, list[int]],
    overlap_RR: Sequence[Sequence[int]],
) -> list[tuple[int, int]]:
    """Match ranks in pairs, greedily. Returns the pairs.

    First pairs that hold each other's units already, then ranks of the nodes with the most free ranks, so that few
    stay unmatched.
    """
    free = list(active)
    pairs: list[tuple[int, int]] = []
    while True:
        crowd = {node: sum(nodes[rank] == node for rank in free) for node in {nodes[rank] for rank in free}}
        best: tuple[float, int, int, int, int] | None = None
        for p in free:
            for q in allowed[p]:
                if p < q and q in free and p in allowed[q]:
                    mutual = min(_held_fraction(p, q, overlap_RR), _held_fraction(q, p, overlap_RR))
                    overlap = overlap_RR[p][q] + overlap_RR[q][p]
                    key = (mutual, overlap, crowd[nodes[p]] + crowd[nodes[q]], -p, -q)
                    best = key if best is None else max(best, key)
        if best is None:
            return pairs
        pair = (-best[3], -best[4])
        pairs.append(pair)
        free = [rank for rank in free if rank not in pair]


def _held_fraction(p: int, q: int, overlap_RR: Sequence[Sequence[int]]) -> float:
    """Fraction of the elements owned by p that q holds already."""
    return overlap_RR[p][q] / overlap_RR[p][p] if overlap_RR[p][p] else 1.0


def _join_unpaired(
    p: int,
    pairs: list[tuple[int, int]],
    partners: dict[int, list[int]],
    allowed: dict[int, list[int]],
    overlap_RR: Sequence[Sequence[int]],
) -> None:
    """Close a ring a -> b -> p -> a with one pair (a, b). If nodes forbid it, take the least used allowed partner."""
    best: tuple[int, int, int] | None = None
    for pair in pairs:
        for a, b in (pair, pair[::-1]):
            if p in allowed[b] and a in allowed[p]:
                key = (overlap_RR[a][b] + overlap_RR[b][p] + overlap_RR[p][a], -a, -b)
                best = key if best is None else max(best, key)
    if best is not None:
        a, b = -best[1], -best[2]
        partners[a], partners[b], partners[p] = [b], [p], [a]
        pairs[:] = [pair for pair in pairs if set(pair) != {a, b}]
        return
    used = {q: sum(q in chosen for chosen in partners.values()) for q in allowed[p]}
    partners[p] = [min(allowed[p], key=lambda q: (-overlap_RR[p][q], used[q], q))]


def _add_one_each(
    active: Sequence[int],
    nodes: Sequence[str],
    partners: dict[int, list[int]],
    overlap_RR: Sequence[Sequence[int]],
) -> None:
    """Add one partner to each rank. Criteria in order: a third node, unused, state held already, evenly used, nearest
    rank.
    """
    used = dict.fromkeys(active, 0)
    for p in active:
        taken = {nodes[p]} | {nodes[q] for q in partners[p]}
        candidates = [q for q in active if q != p and q not in partners[p]]
        chosen = min(
            candidates,
            key=lambda q: (nodes[q] in taken, used[q] > 0, -overlap_RR[p][q], used[q], (q - p) % len(nodes)),
        )
        partners[p].append(chosen)
        used[chosen] += 1
