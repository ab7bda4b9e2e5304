"""Token split: conserves every token and is optimal, against the cut bound by enumeration."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_moe.plan.placement import EMPTY, Placement, Topology, plan_placement
from elastic_moe.plan.split import split_tokens, split_whole


@st.composite
def _cases(draw: st.DrawFn) -> tuple[np.ndarray, Placement, list[float] | None]:
    """Any assignment of copies (each expert at least one), empty slots and ranks without slots included."""
    num_ranks, num_experts = draw(st.integers(1, 5)), draw(st.integers(1, 7))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    has_ER = rng.random((num_experts, num_ranks)) < draw(st.sampled_from([0.0, 0.3, 0.7]))
    has_ER[np.arange(num_experts), rng.integers(0, num_ranks, num_experts)] = True
    ranks, experts = [], []
    for rank in range(num_ranks):
        here = [*rng.permutation(np.flatnonzero(has_ER[:, rank])).tolist(), *[EMPTY] * int(rng.integers(0, 2))]
        experts += here
        ranks += [rank] * len(here)
    home = has_ER.argmax(axis=1)[None].astype(np.int32)
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


@given(_cases())
def test_split_conserves_and_is_optimal(case: tuple[np.ndarray, Placement, list[float] | None]) -> None:
    counts, placement, speeds = case
    num_ranks, num_experts = counts.shape
    out = split_tokens(counts, placement, 0, speeds)
    expert_P = placement.expert_of_slot[0]
    assert out.dtype == np.int64 and out.shape == (num_ranks, len(expert_P)) and (out >= 0).all()
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


@pytest.mark.parametrize("spare", [1, 2, 8])
def test_fast_enough_for_every_layer(spare: int) -> None:
    rng = np.random.default_rng(0)
    load = rng.permutation(1 / np.arange(1, 65))[None]
    placement = plan_placement(load, Topology(tuple("aaaabbbb"), (1.0,) * 8), [8 + spare] * 8)
    counts = rng.multinomial(4096, load[0] / load.sum(), size=8)
    best_s = np.inf
    for _ in range(20):
        begin_s = time.perf_counter()
        split_tokens(counts, placement, 0)
        best_s = min(best_s, time.perf_counter() - begin_s)
    assert best_s < 2e-3, "typically 0.2 ms; the margin is for a busy machine"


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
