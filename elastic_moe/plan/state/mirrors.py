"""Mirror partners of each rank: few and fixed (copysets), on another node wherever there is one.

Two ranks are paired mutually if possible (`pairing.py`). A rank that remains closes a ring of three with one pair, so
that no rank mirrors for two while another mirrors for none. Criteria in order: another node, state held already,
mutual, evenly used, lower rank. Source of the idea: Cidon et al., Copysets, USENIX ATC 2013
(https://www.usenix.org/conference/atc13/technical-sessions/presentation/cidon).

Legend: R ranks; A active ranks, by index; K partners of a rank, -1 for none.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from elastic_moe.plan.state.pairing import Pair, match_pairs

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


def choose_partners(
    active: Sequence[int], nodes: Sequence[str], overlap_RR: ArrayLike, redundancy: int
) -> dict[int, list[int]]:
    """Choose the mirror ranks of each active rank: at most `redundancy`, all different, never the rank itself.

    Args:
        active: ranks that own state, ascending.
        nodes: fault domain of every rank.
        overlap_RR: [p][q], elements owned by p that q holds already; [p][p], all elements that p owns.
        redundancy: partners wanted per rank.
    """
    wanted = min(redundancy, len(active) - 1)
    if wanted <= 0:
        return {rank: [] for rank in active}
    active_A = np.asarray(active, dtype=np.int64)
    node_A = np.unique(np.asarray(list(nodes))[active_A], return_inverse=True)[1].astype(np.int64)
    overlap_AA = np.asarray(overlap_RR, dtype=np.int64)[np.ix_(active_A, active_A)]
    allowed_AA = node_A[:, None] != node_A if node_A.any() else ~np.eye(len(active), dtype=np.bool_)
    partners_AK = _all_held(allowed_AA, overlap_AA, wanted)
    if partners_AK is None:
        partners_AK = np.full((len(active), wanted), -1, dtype=np.int64)
        partners_AK[:, 0] = _first_partners(node_A, allowed_AA, overlap_AA)
        distance_AA = (active_A - active_A[:, None]) % len(nodes)
        for k in range(1, wanted):
            _add_one_each(partners_AK, k, node_A, overlap_AA, distance_AA)
    return {rank: active_A[chosen].tolist() for rank, chosen in zip(active, partners_AK, strict=True)}


def _all_held(allowed_AA: Bools, overlap_AA: Ints, wanted: int) -> Ints | None:
    """Partners that hold all of a rank's units already, if each rank has enough of them; nothing must then be sent.
    Else None.
    """
    owned_A = overlap_AA.diagonal()
    full_AA = overlap_AA == owned_A[:, None]
    np.fill_diagonal(full_AA, False)
    if not owned_A.any() or (full_AA.sum(axis=1) < wanted).any() or not (full_AA & allowed_AA).any(axis=1).all():
        return None
    used_A = np.zeros(len(owned_A), dtype=np.int64)
    partners_AK = np.empty((len(owned_A), wanted), dtype=np.int64)
    for p, owned in enumerate(owned_A.tolist()):
        full = np.flatnonzero(full_AA[p])
        partners_AK[p] = full[np.lexsort((used_A[full], ~allowed_AA[p, full]))[:wanted]]
        if owned:
            used_A[partners_AK[p]] += 1
    return partners_AK


def _first_partners(node_A: Ints, allowed_AA: Bools, overlap_AA: Ints) -> Ints:
    """One partner of each rank: the other one of its pair, or its neighbour in a ring."""
    pairs = match_pairs(node_A, overlap_AA, allowed_AA)
    partner_A = np.full(len(node_A), -1, dtype=np.int64)
    for p, q in pairs:
        partner_A[p], partner_A[q] = q, p
    for p in np.flatnonzero(partner_A < 0).tolist():
        pair = _best_ring(p, pairs, allowed_AA, overlap_AA)
        if pair is not None:
            a, b = pair
            partner_A[a], partner_A[b], partner_A[p] = b, p, a
            pairs.remove((min(pair), max(pair)))
        else:  # the nodes forbid a ring
            used_A = np.bincount(partner_A[partner_A >= 0], minlength=len(node_A))
            partner_A[p] = _least(np.flatnonzero(allowed_AA[p]), -overlap_AA[p], used_A)
    return partner_A


def _best_ring(p: int, pairs: Sequence[Pair], allowed_AA: Bools, overlap_AA: Ints) -> Pair | None:
    """The pair (a, b) for a ring a -> b -> p -> a in which most state is held already; None if nodes forbid all."""
    ordered = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    a, b = np.concatenate([ordered, ordered[:, ::-1]]).T
    fits = np.flatnonzero(allowed_AA[b, p] & allowed_AA[p, a])
    if not fits.size:
        return None
    a, b = a[fits], b[fits]
    held = overlap_AA[a, b] + overlap_AA[b, p] + overlap_AA[p, a]
    best = np.lexsort((b, a, -held))[0]
    return int(a[best]), int(b[best])


def _add_one_each(partners_AK: Ints, k: int, node_A: Ints, overlap_AA: Ints, distance_AA: Ints) -> None:
    """Add partner k to each rank. Criteria in order: a third node, unused, state held already, evenly used, nearest
    rank.
    """
    used_A = np.zeros(len(node_A), dtype=np.int64)
    for p in range(len(node_A)):
        near = [p, *partners_AK[p, :k].tolist()]
        is_candidate = np.ones(len(node_A), dtype=np.bool_)
        is_candidate[near] = False
        taken_A = np.isin(node_A, node_A[near])
        chosen = _least(np.flatnonzero(is_candidate), taken_A, used_A > 0, -overlap_AA[p], used_A, distance_AA[p])
        partners_AK[p, k] = chosen
        used_A[chosen] += 1


def _least(candidates: Ints, *keys_A: NDArray[np.generic]) -> int:
    """The first candidate with the smallest tuple of keys."""
    for key_A in keys_A:
        key = key_A[candidates]
        candidates = candidates[key == key.min()]
    return int(candidates[0])
