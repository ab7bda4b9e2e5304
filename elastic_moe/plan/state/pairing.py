"""Greedy matching of ranks in pairs that mirror each other, for up to thousands of ranks.

The best pair is taken first. Criteria in order: the smaller of the fractions of their units that the two hold of each
other already; the elements that both hold of each other; the number of unpaired ranks on their nodes; the lower ranks.
The first two do not change while pairs are taken, so pairs that are equal in them form a *class*, and the classes are
taken one after another. Few ranks hold anything of each other: those pairs are listed. The others, which have nothing
in common, are as many as ranks squared; they are taken by node, without a list.

Legend: A active ranks, by index; N nodes; I listed pairs.
"""

from __future__ import annotations

import heapq
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Pair = tuple[int, int]
_NOBODY = 1 << 62


class _Unpaired:
    """The ranks that have no pair yet.

    Attributes:
        node_A: node of each rank, a list of numbers.
        free_A: the rank is unpaired.
        free_N: unpaired ranks on each node.
        pairs: the pairs taken so far, the lower rank first.
    """

    def __init__(self, node_A: NDArray[np.int64]) -> None:
        self.node_A: list[int] = node_A.tolist()
        self.free_A = [True] * len(node_A)
        self.free_N: list[int] = np.bincount(node_A).tolist()
        self.pairs: list[Pair] = []

    def take(self, p: int, q: int) -> None:
        self.pairs.append((p, q))
        for rank in (p, q):
            self.free_A[rank] = False
            self.free_N[self.node_A[rank]] -= 1

    def crowd(self, p: int, q: int) -> int:
        """Unpaired ranks on the nodes of two ranks."""
        return self.free_N[self.node_A[p]] + self.free_N[self.node_A[q]]


def match_pairs(node_A: NDArray[np.int64], overlap_AA: NDArray[np.int64], may_pair_AA: NDArray[np.bool_]) -> list[Pair]:
    """Match ranks in pairs until no two unpaired ranks may pair. Returns the pairs, in the order they were taken.

    Args:
        node_A: node of each rank, a number below the number of nodes.
        overlap_AA: [p][q], elements owned by p that q holds already; [p][p], all elements that p owns.
        may_pair_AA: the two ranks are on different nodes; if there is one node only, they are different ranks.
    """
    unpaired = _Unpaired(node_A)
    side_A = node_A if len(unpaired.free_N) > 1 else np.arange(len(node_A))
    owned_A = overlap_AA.diagonal()
    held_AA = np.divide(overlap_AA, owned_A[:, None], out=np.ones(overlap_AA.shape), where=owned_A[:, None] > 0)
    both_AA = overlap_AA + overlap_AA.T
    p_I, q_I = np.nonzero(np.triu((both_AA > 0) & may_pair_AA, 1))
    mutual_I, both_I = np.minimum(held_AA[p_I, q_I], held_AA[q_I, p_I]), both_AA[p_I, q_I]
    order = np.lexsort((q_I, p_I, -both_I, -mutual_I))
    p_I, q_I, mutual_I, both_I = p_I[order], q_I[order], mutual_I[order], both_I[order]
    complete = int(np.searchsorted(-mutual_I, -1.0, side="right"))  # pairs that hold all of each other
    ends = np.flatnonzero((np.diff(mutual_I) != 0) | (np.diff(both_I) != 0)) + 1
    cuts = [0, *ends.tolist(), len(order)]
    listed = list(zip(p_I.tolist(), q_I.tolist(), strict=True))
    without_state = owned_A == 0
    for begin, end in pairwise(cuts):
        if begin == complete:
            _pair_strangers(unpaired, side_A, without_state)
        _pair_listed(unpaired, listed[begin:end])
    _pair_strangers(unpaired, side_A, without_state)
    _pair_strangers(unpaired, side_A, np.ones(len(node_A), dtype=np.bool_))
    return unpaired.pairs


def _pair_listed(unpaired: _Unpaired, listed: list[Pair]) -> None:
    """Take pairs of one class, those on the nodes with the most unpaired ranks first.

    The number of unpaired ranks only falls. So the first pair of the heap whose number is up to date is the best one.
    """
    free_A = unpaired.free_A
    heap = [(-unpaired.crowd(p, q), p, q) for p, q in listed if free_A[p] and free_A[q]]
    heapq.heapify(heap)
    while heap:
        crowd, p, q = heapq.heappop(heap)
        if not (free_A[p] and free_A[q]):
            continue
        if -crowd == unpaired.crowd(p, q):
            unpaired.take(p, q)
        else:
            heapq.heappush(heap, (-unpaired.crowd(p, q), p, q))


def _pair_strangers(unpaired: _Unpaired, side_A: NDArray[np.int64], wanted_A: NDArray[np.bool_]) -> None:
    """Pair the wanted ranks of different sides, those on the nodes with the most unpaired ranks first.

    Args:
        unpaired: changed.
        side_A: ranks of one side may not pair: those of one node, or each rank for itself if there is one node only.
        wanted_A: the ranks that are to be paired.
    """
    num_sides = int(side_A.max()) + 1
    waiting: list[list[int]] = [[] for _ in range(num_sides)]  # per side, the lowest rank last
    for rank in np.flatnonzero(wanted_A)[::-1].tolist():
        if unpaired.free_A[rank]:
            waiting[side_A[rank]].append(rank)
    first_N = np.array([ranks[-1] if ranks else _NOBODY for ranks in waiting], dtype=np.int64)
    crowd_N = np.full(num_sides, -1, dtype=np.int64)
    for side, ranks in enumerate(waiting):
        if ranks:
            crowd_N[side] = unpaired.free_N[unpaired.node_A[ranks[-1]]]
    while (crowd_N >= 0).sum() > 1:
        most = crowd_N == crowd_N.max()
        one = int(np.where(most, first_N, _NOBODY).argmin())
        crowd_one, crowd_N[one] = int(crowd_N[one]), -1
        other = int(np.where(crowd_N == crowd_N.max(), first_N, _NOBODY).argmin())
        p, q = sorted((int(first_N[one]), int(first_N[other])))
        unpaired.take(p, q)
        crowd_N[one] = crowd_one
        for side in (one, other):
            waiting[side].pop()
            first_N[side] = waiting[side][-1] if waiting[side] else _NOBODY
            crowd_N[side] = crowd_N[side] - 1 if waiting[side] else -1
