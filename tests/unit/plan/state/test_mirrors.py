"""Mirror partners: another node, mutual pairs, one ring of three, and no change where all state is in place."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_moe.plan.state.mirrors import choose_partners
from tests.unit.plan.state import slow_partners


def _empty(num_ranks: int) -> list[list[int]]:
    return [[10 if p == q else 0 for q in range(num_ranks)] for p in range(num_ranks)]


@pytest.mark.parametrize("nodes", ["ab", "aabb", "abab", "aaabbb", "abcd"])
def test_even_numbers_make_mutual_pairs_across_nodes(nodes: str) -> None:
    partners = choose_partners(range(len(nodes)), nodes, _empty(len(nodes)), 1)
    for rank, (mirror,) in partners.items():
        assert partners[mirror] == [rank]
        assert nodes[mirror] != nodes[rank]


def test_an_odd_rank_closes_a_ring() -> None:
    partners = choose_partners(range(3), "abc", _empty(3), 1)
    assert sorted(mirror for (mirror,) in partners.values()) == [0, 1, 2], "each rank mirrors for exactly one"


def test_the_second_partner_is_on_a_third_node() -> None:
    partners = choose_partners(range(3), "abc", _empty(3), 2)
    assert all(set(mirrors) == {0, 1, 2} - {rank} for rank, mirrors in partners.items())


def test_partners_that_hold_all_state_stay() -> None:
    overlap = _empty(4)
    for rank in range(4):
        overlap[rank][(rank + 1) % 4] = 10
    partners = choose_partners(range(4), "abab", overlap, 1)
    assert partners == {rank: [(rank + 1) % 4] for rank in range(4)}


@pytest.mark.parametrize(("active", "redundancy"), [([0], 1), ([0, 1], 0)])
def test_no_partners_where_none_are_possible_or_wanted(active: list[int], redundancy: int) -> None:
    assert choose_partners(active, "ab", _empty(2), redundancy) == {rank: [] for rank in active}


@settings(deadline=None, max_examples=300)
@given(st.integers(1, 12), st.integers(1, 5), st.integers(0, 3), st.sampled_from([0.0, 0.1, 0.4, 1.0]), st.integers(0))
def test_partners_are_those_of_the_slow_twin(
    num_ranks: int, num_nodes: int, redundancy: int, density: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    nodes = [f"n{node}" for node in rng.integers(0, num_nodes, num_ranks)]
    active = sorted(rng.choice(num_ranks, int(rng.integers(1, num_ranks + 1)), replace=False).tolist())
    owned_R = rng.integers(0, 4, num_ranks) * 10
    parts_RR = rng.choice([0.0, 0.5, 1.0], (num_ranks, num_ranks)) * (rng.random((num_ranks, num_ranks)) < density)
    overlap_RR = (owned_R[:, None] * parts_RR).astype(np.int64)
    np.fill_diagonal(overlap_RR, owned_R)
    expected = slow_partners.choose_partners(active, nodes, overlap_RR.tolist(), redundancy)
    assert choose_partners(active, nodes, overlap_RR, redundancy) == expected
