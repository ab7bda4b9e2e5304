"""The vote's layout: each record survives packing, and the sum of packed ballots is the sum of each field."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np
import pytest

from elastic_moe.control.vote import (
    Ballot,
    Measures,
    Spent,
    VoteResult,
    VoteShape,
    pack,
    packed_size,
    result_of,
    unpack,
)
from elastic_moe.plan.shares import Speeds
from elastic_moe.types import Member, ModelStats, View

LAYERS, EXPERTS, RANKS, NODES = 2, 3, 4, 2
SHAPE = VoteShape(LAYERS, EXPERTS, RANKS, NODES)
VIEW = View(7, tuple(Member(f"w{r}", "n", r, draining=r == 3) for r in range(RANKS)))


def _ballot(seed: int) -> Ballot:
    """A ballot in which no two numbers are equal."""
    numbers = iter(np.random.default_rng(seed).permutation(200).tolist())

    def flat(kind: type[Any]) -> dict[str, float]:
        return {item.name: float(next(numbers)) for item in fields(kind)}

    def array(*shape: int) -> np.ndarray:
        return np.array([float(next(numbers)) for _ in range(int(np.prod(shape)))]).reshape(shape)

    return Ballot(
        ce_sum=next(numbers),
        tokens=next(numbers) + 1,
        grad_square=next(numbers),
        nonfinite=0.0,
        reconfigure=1.0,
        stop=0.0,
        save=next(numbers),
        stats=ModelStats(**flat(ModelStats)),
        measures=Measures(**flat(Measures)),
        load_LE=array(LAYERS, EXPERTS),
        nonfinite_R=array(RANKS),
        expert_rows_R=array(RANKS),
        slowest_LN=array(LAYERS, NODES),
        spent=Spent(**{item.name: array(RANKS) for item in fields(Spent)}),
    )


def _equal(one: Any, other: Any) -> None:
    for item in fields(one):
        mine, theirs = getattr(one, item.name), getattr(other, item.name)
        if is_dataclass(mine):
            _equal(mine, theirs)
        else:
            assert np.array_equal(mine, theirs), item.name


def _result(ballots: list[Ballot]) -> VoteResult:
    total = unpack(Ballot, sum(pack(b) for b in ballots), SHAPE)
    return result_of(total, 5, VIEW, spike=False)


def test_ballot_survives_packing() -> None:
    ballot = _ballot(0)
    vector = pack(ballot)
    assert len(vector) == packed_size(Ballot, SHAPE)
    _equal(unpack(Ballot, vector, SHAPE), ballot)


def test_result_survives_packing_without_the_ranks_of_its_view() -> None:
    """The next view has other ranks, so the broadcast to them must not depend on the number of ranks that voted."""
    result = _result([_ballot(r) for r in range(RANKS)])
    shape = VoteShape(LAYERS, EXPERTS)
    assert len(pack(result)) == packed_size(VoteResult, shape)
    again = unpack(VoteResult, pack(result), shape)
    _equal(again, result)
    assert (type(again.step), type(again.generation), again.grad_norm) == (int, int, result.grad_norm)


def test_sum_of_vectors_is_the_sum_of_fields() -> None:
    ballots = [_ballot(r) for r in range(RANKS)]
    result = _result(ballots)
    assert result.ce_sum == sum(b.ce_sum for b in ballots)
    assert result.stats.index_sum == sum(b.stats.index_sum for b in ballots)
    assert result.measures.switch_s == sum(b.measures.switch_s for b in ballots)
    assert np.array_equal(result.load_LE, sum(b.load_LE for b in ballots))
    assert (result.step, result.generation, result.world_size) == (5, 7, 3)
    assert result.loss == pytest.approx(result.ce_sum / result.tokens)
    assert result.grad_norm == pytest.approx(np.sqrt(result.grad_square) / result.tokens, rel=1e-6)


def test_arrays_of_an_unpacked_record_are_copies() -> None:
    vector = pack(_ballot(0))
    ballot = unpack(Ballot, vector, SHAPE)
    before = ballot.load_LE.copy()
    vector[:] = -1
    assert np.array_equal(ballot.load_LE, before)


def test_a_vector_of_another_shape_is_refused() -> None:
    with pytest.raises(AssertionError, match="another shape"):
        unpack(Ballot, pack(_ballot(0)), VoteShape(LAYERS, EXPERTS, RANKS - 1, NODES))


def test_the_slowest_rank_of_any_node_makes_a_layers_time() -> None:
    """Three active ranks with speeds 1, 1 and 1/2, and 100 rows in each layer: the mean is 40 rows of the fastest."""
    ballots = [replace(_ballot(r), load_LE=np.full((LAYERS, EXPERTS), 100 / 12)) for r in range(RANKS)]
    zero = np.zeros((LAYERS, NODES))
    slowest = [np.array([[50.0, 0.0], [0.0, 0.0]]), zero, np.array([[0.0, 44.0], [0.0, 0.0]]), zero]
    ballots = [replace(b, slowest_LN=own) for b, own in zip(ballots, slowest, strict=True)]
    total = unpack(Ballot, sum(pack(b) for b in ballots), SHAPE)
    assert total.layer_times([1.0, 1.0, 0.5, 0.0]).tolist() == pytest.approx([1.25, 1.0])
    assert total.layer_times([2.0, 2.0, 1.0, 0.0]).tolist() == pytest.approx([1.25, 1.0])


def test_view_is_left_only_when_every_rank_knows_of_a_newer_one() -> None:
    for known in range(RANKS + 1):
        ballots = [replace(_ballot(r), reconfigure=float(r < known)) for r in range(RANKS)]
        total = unpack(Ballot, sum(pack(b) for b in ballots), SHAPE)
        assert total.all_reconfigure == (known == RANKS)


def test_one_rank_with_gradients_that_are_not_finite_is_enough() -> None:
    ballots = [replace(_ballot(r), nonfinite=float(r == 2)) for r in range(RANKS)]
    assert not _result(ballots).finite


def test_the_sum_of_the_ballots_names_the_ranks_that_were_not_finite() -> None:
    rows = np.eye(RANKS)
    ballots = [replace(_ballot(r), nonfinite_R=rows[r] * (r in (1, 3))) for r in range(RANKS)]
    total = unpack(Ballot, np.sum([pack(ballot) for ballot in ballots], axis=0), SHAPE)
    assert total.nonfinite_ranks == (1, 3)
    assert _result([replace(b, nonfinite=0.0) for b in ballots]).finite


def test_balance_counts_the_active_ranks() -> None:
    ballot = replace(_ballot(0), expert_rows_R=np.array([30.0, 60.0, 30.0, 0.0]))
    equal = Speeds.equal(VIEW).rows
    assert ballot.balance(equal) == pytest.approx(40 / 60)
    assert ballot.balance((1.0, 2.0, 1.0, 0.0)) == 1.0
    assert replace(ballot, expert_rows_R=np.zeros(RANKS)).balance(equal) == 1.0
