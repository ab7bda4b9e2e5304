"""How many copies of each expert a run has, and what a placement with a copy everywhere looks like."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from elastic_moe.config.build import build
from elastic_moe.config.schema import (
    BalanceConfig,
    ClusterConfig,
    DataConfig,
    ElasticConfig,
    ModelConfig,
    TrainConfig,
)
from elastic_moe.errors import UserError
from elastic_moe.plan.placement import (
    EMPTY,
    LOST,
    Placement,
    Topology,
    copies_of,
    default_slots,
    expected_nodes,
    plan_placement,
)
from elastic_moe.types import Member, View

SMALL = ModelConfig(hidden_size=32, num_layers=2, num_dense_layers=1, num_experts=16, expert_hidden=64)


def config_of(copies: str = "auto", sequences: int = 24, **elastic: Any) -> TrainConfig:
    data = DataConfig(global_batch=sequences, seq_len=64)
    return TrainConfig(model=SMALL, data=data, balance=BalanceConfig(copies=copies), elastic=ElasticConfig(**elastic))


@pytest.mark.parametrize("redundancy", [0, 1, 3])
def test_what_moves_fewer_bytes(redundancy: int) -> None:
    """Of 16 experts with 6,144 elements each, gradients to a primary, and weights to the ranks that neither own nor
    mirror an expert; of 384 routed rows a sequence, four journeys.
    """
    experts, rows = 16 * 3 * 32 * 64, 4 * 64 * SMALL.experts_per_token * 32
    for ranks in (2, 3, 5, 8):
        moved = experts * (1 + max(0, ranks - 1 - redundancy) / (ranks - 1))
        for sequences in (1, 12, 24, 48, 100):
            wanted = ranks if moved <= rows * sequences / ranks else 1
            assert copies_of(config_of(sequences=sequences, redundancy=redundancy), [1] * ranks) == (wanted, False)


def test_one_rank_and_what_is_asked_for() -> None:
    assert copies_of(config_of("1", 1), [1]) == copies_of(config_of("auto", 1), [1]) == (1, False)
    assert [copies_of(config_of("3"), [ranks]).number for ranks in (2, 3, 4)] == [2, 3, 3]
    assert copies_of(config_of("all", 1), [20, 20]) == (40, False)
    assert copies_of(config_of("auto", 10_000, reproducible=True), [1, 1]) == (1, False)


def test_bytes_of_what_travels_in_bf16() -> None:
    """Two ranks with a mirror are sent no weights, so only gradients and rows count."""
    experts, row = 16 * 3 * 32 * 64, 4 * 64 * SMALL.experts_per_token * 32
    least = -(-experts * 2 // row)  # sequences of a step from which copies pay
    for computed, reduced, times in (
        ("fp32", "fp32", 1),
        ("fp32", "bf16", 0.5),
        ("bf16", "bf16", 1),
        ("bf16", "fp32", 2),
    ):
        for sequences in range(1, 3 * least):
            config = replace(config_of(sequences=sequences), precision=computed, reduce_precision=reduced)
            assert (copies_of(config, [1, 1]).number == 2) == (times * experts <= row * sequences / 2)


def test_a_copy_on_each_node() -> None:
    config = config_of("node")
    assert copies_of(config, [4, 2]) == (1, True)
    assert copies_of(config, [6]) == (1, False), "one node"
    assert copies_of(config, [1, 1, 1]) == (3, False), "nodes of one rank: on every rank"
    assert copies_of(config_of("node", slots_per_worker=8), [2, 4]) == (1, True)
    assert copies_of(config_of("node", slots_per_worker=7), [2, 4]) == (1, False), "16 experts are too many for a node"


def test_auto_takes_nodes_where_that_moves_less_between_them() -> None:
    """Two nodes of four: a rank has a fourth of the experts then, and not all of them."""
    experts, rows = 16 * 3 * 32 * 64, 4 * 64 * SMALL.experts_per_token * 32
    chosen = [copies_of(config_of(sequences=n, redundancy=1), [4, 4]) for n in (1, 4, 8, 16, 32, 64, 128)]
    assert chosen[0] == (1, False)
    assert chosen[-1] == (8, False)
    for sequences, copies in zip((1, 4, 8, 16, 32, 64, 128), chosen, strict=True):
        everywhere = experts * (1 + 6 / 7) <= rows * sequences / 8
        assert copies == ((8, False) if everywhere else (1, experts / 4 <= rows * sequences / 8))
    assert (1, True) in chosen


def test_estimates_before_there_are_nodes() -> None:
    config = config_of()
    for kind, expected in (("local", [6]), ("simulated", [4, 2]), ("address", [1] * 6), ("auto", [1] * 6)):
        cluster = ClusterConfig(kind=kind, workers_per_node=4)
        assert expected_nodes(replace(config, cluster=cluster), 6) == expected
    assert expected_nodes(replace(config, cluster=ClusterConfig(kind="simulated", workers_per_node=4)), 2) == [2]


def test_large_experts_stay_apart() -> None:
    config = config_of(sequences=1_000_000)
    config = TrainConfig(model=ModelConfig(hidden_size=4096, expert_hidden=2048, num_experts=64), data=config.data)
    assert copies_of(config, [4]) == copies_of(config, [1] * 4) == (1, False)


@pytest.mark.parametrize("copies", ["0", "-1", "some", "", "1.5"])
def test_a_number_that_is_none(copies: str) -> None:
    with pytest.raises(UserError, match=r"balance\.copies must be auto, all, node or a number of at least 1"):
        build({"balance": {"copies": copies}})


def test_a_number_on_the_command_line_is_no_text() -> None:
    assert build({"balance": {"copies": 2}}).balance.copies == "2"


@pytest.mark.parametrize("previous", [False, True])
def test_a_copy_everywhere(previous: bool) -> None:
    """A draining rank has none, homes stay even, and those that were there stay where they were."""
    members = [Member(str(r), "ab"[r % 2], r, draining=r == 1) for r in range(4)]
    view = View(1, tuple(members))
    slots = default_slots(8, view, 1, 0, copies=3)
    assert slots == [8, 0, 8, 8]
    homes = np.array([[0, 0, 2, 2, 3, LOST, LOST, LOST]] * 2, np.int32)
    before = Placement(np.zeros((2, 0), np.int32), np.zeros(0, np.int32), homes) if previous else None
    placement = plan_placement(np.ones((2, 8)), Topology(("a", "b", "a", "b"), (1.0,) * 4), slots, before, home_moves=0)
    assert placement.everywhere
    assert sorted(np.bincount(placement.home[0], minlength=4).tolist()) == [0, 2, 3, 3]
    assert placement.time_L is not None
    assert placement.time_L.tolist() == [1.0, 1.0]
    if previous:
        assert (placement.home[homes != LOST] == homes[homes != LOST]).all()
    for rank in (0, 2, 3):
        experts = placement.expert_of_slot[0, placement.slots_of(rank)].tolist()
        own = [expert for expert in experts if placement.home[0, expert] == rank]
        assert sorted(experts) == list(range(8))
        assert experts[: len(own)] == own, "homes come first"


def test_everywhere_is_no_less() -> None:
    rank_of_slot, home = np.repeat(np.arange(2), 3).astype(np.int32), np.zeros((1, 2), np.int32)

    def placed(*experts: int) -> Placement:
        return Placement(np.array([experts], np.int32), rank_of_slot, home)

    assert placed(0, EMPTY, 1, 1, 0, EMPTY).everywhere
    assert not placed(0, EMPTY, EMPTY, 1, 0, EMPTY).everywhere
