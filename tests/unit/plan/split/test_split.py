"""Token split: conserves every token and is optimal, against the cut bound by enumeration."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_moe.plan.placement import EMPTY, Placement, Topology, plan_placement
from elastic_moe.plan.split import split_for_rank, split_tokens, split_whole


@st.composite
def _cases(draw: st.DrawFn) -> tuple[np.ndarray, Placement, list[float] | None]:
    """Any assignment of copies (each expert at least one), empty slots and ranks without slots included."""
    num_ranks, num_experts = draw(st.integers(1, 5)), draw(st.integers(1, 7))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    resident_ER = rng.random((num_experts, num_ranks)) < draw(st.sampled_from([0.0, 0.3, 0.7]))
    resident_ER[np.arange(num_experts), rng.integers(0, num_ranks, num_experts)] = True
    ranks, experts = [], []
    for rank in range(num_ranks):
        here = [*rng.permutation(np.flatnonzero(resident_ER[:, rank])).tolist(), *[EMPTY] * int(rng.integers(0, 2))]
        experts += here
        ranks += [rank] * len(here)
    home = resident_ER.argmax(axis=1)[None].astype(np.int32)
    placement = Placement(np.array([experts], dtype=np.int32), np.array(ranks, dtype=np.int32), home)
    scale = draw(st.sampled_from([1, 5, 1000]))
    counts = rng.integers(0, scale + 1, (num_ranks, num_experts)) * rng.integers(0, 2, (num_ranks, num_experts))
    speeds = draw(
        st.one_of(st.none(), st.lists(st.sampled_from([0.5, 1.0, 1.7, 3.0]), min_size=num_ranks, max_size=num_ranks))
    )
    return counts, placement, speeds


def _fits(limit: float, total_E: np.ndarray, mask_E: list[int], speeds: list[float]) -> bool:
    """Hall's condition: whatever set of ranks, the experts confined to it fit in whole tokens at time `limit`."""
    cap = [int(np.floor(limit * speed + 1e-9)) for speed in speeds]
    for subset in range(1 << len(speeds)):
        confined = sum(int(w) for w, mask in zip(total_E, mask_E, strict=True) if mask & ~subset == 0)
        if confined > sum(c for rank, c in enumerate(cap) if subset >> rank & 1):
            return False
    return True


@settings(deadline=None)
@given(_cases())
def test_split_conserves_and_is_optimal(case: tuple[np.ndarray, Placement, list[float] | None]) -> None:
    counts, placement, speeds = case
    num_ranks, num_experts = counts.shape
    out = split_tokens(counts, placement, 0, speeds)
    expert_P = placement.expert_of_slot[0]
    assert out.dtype == np.int64
    assert out.shape == (num_ranks, len(expert_P))
    assert (out >= 0).all()
    assert (out[:, expert_P == EMPTY] == 0).all()
    for expert in range(num_experts):
        assert np.array_equal(out[:, expert_P == expert].sum(axis=1), counts[:, expert])
    assert np.array_equal(out, split_tokens(counts.copy(), placement, 0, speeds))
    rank_speed = speeds or [1.0] * num_ranks
    rank_load = np.bincount(placement.rank_of_slot, weights=out.sum(axis=0), minlength=num_ranks)
    slowest = float((rank_load / rank_speed).max())
    masks = [sum(1 << int(rank) for rank in placement.rank_of_slot[expert_P == e]) for e in range(num_experts)]
    assert _fits(slowest, counts.sum(axis=0), masks, rank_speed)
    if slowest > 0:
        assert not _fits(slowest * (1 - 1e-6) - 1e-6, counts.sum(axis=0), masks, rank_speed), "a faster split exists"


def test_tokens_stay_on_their_own_rank_when_that_is_optimal() -> None:
    placement = Placement(
        np.array([[0, 1, 0, 1]], np.int32), np.array([0, 0, 1, 1], np.int32), np.array([[0, 1]], np.int32)
    )
    counts = np.array([[30, 20], [10, 40]])
    out = split_tokens(counts, placement, 0)
    assert out.tolist() == [[30, 20, 0, 0], [0, 0, 10, 40]]


def test_a_rank_of_speed_zero_gets_only_what_no_other_can_take() -> None:
    placement = Placement(np.array([[0, 1, 0]], np.int32), np.array([0, 0, 1], np.int32), np.array([[0, 0]], np.int32))
    assert split_tokens(np.array([[8, 4], [0, 0]]), placement, 0, [0.0, 1.0]).tolist() == [[0, 4, 8], [0, 0, 0]]


def test_no_tokens_at_all() -> None:
    placement = plan_placement(np.ones((1, 4)), Topology(("a", "b"), (1.0, 1.0)), [3, 3])
    assert split_tokens(np.zeros((2, 4), np.int64), placement, 0).sum() == 0


@settings(deadline=None)
@given(_cases(), st.integers(0, 4), st.lists(st.integers(0, 2), min_size=5, max_size=5))
def test_one_ranks_part_is_that_of_the_matrix(
    case: tuple[np.ndarray, Placement, list[float] | None], rank: int, nodes: list[int]
) -> None:
    counts, placement, speeds = case
    rank %= len(counts)
    node_R = np.array(nodes[: len(counts)], dtype=np.int32)
    placement = replace(placement, node_of_rank=node_R)
    out = split_tokens(counts, placement, 0, speeds)
    part = split_for_rank(counts, placement, 0, rank, speeds)
    assert np.array_equal(part.sent_P, out[rank])
    assert np.array_equal(part.here_RS, out[:, placement.slots_of(rank)])
    assert np.array_equal(part.tokens_P, out.sum(axis=0))
    slot_node = node_R[placement.rank_of_slot]
    assert part.cross_node_tokens == out[node_R[:, None] != slot_node[None, :]].sum()


def _ways(total: int, places: int) -> list[tuple[int, ...]]:
    """All ways to put `total` tokens into `places`."""
    if places == 1:
        return [(total,)]
    return [(first, *rest) for first in range(total + 1) for rest in _ways(total - first, places - 1)]


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6))
def test_no_optimal_split_sends_fewer_tokens_to_other_nodes(seed: int) -> None:
    """Against all splits: first the slowest rank, then tokens between nodes, then tokens between ranks."""
    rng = np.random.default_rng(seed)
    num_ranks, num_experts = int(rng.integers(2, 5)), int(rng.integers(1, 4))
    node_R = rng.integers(0, 2, num_ranks)
    resident_ER = rng.random((num_experts, num_ranks)) < 0.6
    resident_ER[np.arange(num_experts), rng.integers(0, num_ranks, num_experts)] = True
    counts = rng.integers(0, 3, (num_ranks, num_experts))
    ranks, experts = np.nonzero(resident_ER.T)
    home = resident_ER.argmax(axis=1)[None].astype(np.int32)
    placement = Placement(experts[None].astype(np.int32), ranks.astype(np.int32), home, node_R.astype(np.int32))

    def costs(flow_ER: np.ndarray) -> tuple[int, int, int]:
        own = np.minimum(flow_ER, counts.T).sum()
        near = sum(
            np.minimum(flow_ER[:, node_R == n].sum(axis=1), counts.T[:, node_R == n].sum(axis=1)).sum() for n in (0, 1)
        )
        return int(flow_ER.sum(axis=0).max()), int(counts.sum() - near), int(counts.sum() - own)

    best = None
    choices = [_ways(int(counts[:, e].sum()), int(resident_ER[e].sum())) for e in range(num_experts)]
    for chosen in itertools.product(*choices):
        flow_ER = np.zeros(resident_ER.shape, np.int64)
        for e, tokens in enumerate(chosen):
            flow_ER[e, resident_ER[e]] = tokens
        best = costs(flow_ER) if best is None else min(best, costs(flow_ER))
    out = split_tokens(counts, placement, 0)
    rank_load = np.bincount(ranks, weights=out.sum(axis=0), minlength=num_ranks)
    far = out[node_R[:, None] != node_R[ranks][None, :]].sum()
    away = out[np.arange(num_ranks)[:, None] != ranks[None, :]].sum()
    assert (int(rank_load.max()), int(far), int(away)) == best


@settings(deadline=None)
@given(_cases())
def test_whole_split_sends_each_source_to_one_copy(case: tuple[np.ndarray, Placement, list[float] | None]) -> None:
    counts_RE, placement, speeds = case
    split_RP = split_whole(counts_RE, placement, 0, speeds)
    expert_P = placement.expert_of_slot[0]
    for expert in range(counts_RE.shape[1]):
        sent_RC = split_RP[:, expert_P == expert]
        assert (sent_RC.sum(axis=1) == counts_RE[:, expert]).all()
        assert ((sent_RC > 0).sum(axis=1) <= 1).all()
    assert not split_RP[:, expert_P < 0].any()
    assert (split_RP == split_whole(counts_RE.copy(), placement, 0, speeds)).all()
