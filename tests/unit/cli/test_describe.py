"""Counts against the papers' figures and the runtime's own plans; the command line."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from elastic_moe.cli.compose import check, register_schema
from elastic_moe.cli.describe import at_change, count, main, memory, report, slots_per_layer, smallest, training_flops
from elastic_moe.config.schema import BalanceConfig, ClusterConfig, DataConfig, ElasticConfig, ModelConfig, TrainConfig
from elastic_moe.errors import UserError
from elastic_moe.model.params import param_specs
from elastic_moe.plan.placement import Placement, Topology, copies_of, default_slots, nodes_of, plan_placement
from elastic_moe.plan.state.buckets import bucket_elements, vector_bytes
from elastic_moe.plan.state.ownership import NONE, homes_from_roles, plan_ownership
from elastic_moe.plan.state.units import build_units
from elastic_moe.types import Member, View


def preset(name: str) -> ModelConfig:
    register_schema()
    (config,) = check([f"model={name}"])
    return config.model


@pytest.mark.parametrize(("name", "total", "active"), [
    ("mhc_3b", 2.97e9, 612e6), ("mhc_9b", 9.18e9, 1.66e9), ("mhc_27b", 27.0e9, 4.14e9),  # mHC paper, Table 5
    ("deepseek_v3", 671e9, 37e9), ("deepseek_v4_flash", 284e9, 13e9), ("qwen3_30b_a3b", 30.5e9, 3.3e9),
    ("deepseek_v2_lite", 15.7e9, 2.4e9),
])  # fmt: skip
def test_presets_have_the_published_sizes(name: str, total: float, active: float) -> None:
    """Total without multi-token prediction; papers count the input embedding as active or do not."""
    counts = count(preset(name))
    assert counts.total - counts.mtp == pytest.approx(total, rel=0.005)
    assert any(a == pytest.approx(active, rel=0.03) for a in (counts.active, counts.active + counts.embedding))


def test_flops_by_hand() -> None:
    cfg = ModelConfig(mtp_depth=0)
    counts = count(cfg)
    attention = cfg.num_layers * 2 * cfg.num_heads * 2 * cfg.head_dim * 64 / 2
    assert training_flops(cfg, 64) == pytest.approx(6 * counts.active + 3 * attention)


@pytest.mark.parametrize("workers", [1, 2, 3, 7, 16, 40])
@pytest.mark.parametrize("limit", [0, 6])
@pytest.mark.parametrize("copies", ["auto", "1", "2", "all", "node"])
def test_slots_are_the_planners(workers: int, limit: int, copies: str) -> None:
    """On nodes of three workers, the last of which may have fewer."""
    balance, cluster = BalanceConfig(copies=copies), ClusterConfig(kind="simulated", workers_per_node=3)
    elastic = ElasticConfig(spare_slots=2, slots_per_worker=limit)
    config = TrainConfig(elastic=elastic, balance=balance, cluster=cluster)
    view = View(1, tuple(Member(str(i), f"n{i // 3}", i) for i in range(workers)))
    try:
        planned = max(default_slots(config.model.num_experts, view, 2, limit, *copies_of(config, nodes_of(view))))
    except UserError:
        return
    assert slots_per_layer(config, workers) == planned


def test_smallest_number_of_workers_is_the_smallest() -> None:
    config = TrainConfig(model=preset("mhc_9b"), data=DataConfig(seq_len=4096, micro_batch=1), precision="bf16")
    limit = memory(config, 13).total
    found = smallest(config, limit)
    assert found is not None
    assert found <= 13
    assert memory(config, found).total <= limit
    assert found == 1 or memory(config, found - 1).total > limit
    assert smallest(config, memory(config, 1).total) == 1
    assert smallest(config, memory(config, 1 << 19).weights) is None


def test_weights_in_bf16_take_half_the_room() -> None:
    wide = memory(TrainConfig(model=preset("mhc_9b")), 8)
    narrow = memory(TrainConfig(model=preset("mhc_9b"), precision="bf16"), 8)
    assert 0.5 < narrow.weights / wide.weights < 0.6, "all but the embedding, norms, routers and maps of streams"
    assert narrow.exchange <= wide.exchange
    assert (narrow.gradients, narrow.state) == (wide.gradients, wide.state)


def test_redundancy_costs_state() -> None:
    plain = TrainConfig(elastic=ElasticConfig(redundancy=0))
    twin = replace(plain, elastic=ElasticConfig(redundancy=1))
    assert memory(twin, 8).state == pytest.approx(2 * memory(plain, 8).state)
    assert memory(twin, 1).state == memory(plain, 1).state, "one worker has nobody to mirror it"


def _held_after_a_death(config: TrainConfig, workers: int) -> tuple[int, int]:
    """Bytes of state of the fullest worker once one of so many has died, and of what arrives at one, as planned."""
    specs = param_specs(config.model, config.optim.name)
    units = build_units(specs, config.model.max_unit_elements)
    shape = (config.model.num_moe_layers, config.model.num_experts)
    numel_U = np.array([unit.numel * (len(unit.rule.fields) + unit.rule.has_gradient) for unit in units])
    roles_RU = np.full((workers, len(units)), NONE, dtype=np.uint8)
    for alive in (range(workers), range(1, workers)):
        view = View(1, tuple(Member(str(i), f"n{i}", i) for i in alive))
        ranks = len(view.members)
        copies = copies_of(config, [1] * ranks)
        slots = default_slots(shape[1], view, config.elastic.spare_slots, 0, *copies)
        before = roles_RU[-ranks:]
        homes = homes_from_roles(units, before, view.active_ranks, shape)
        unplaced = Placement(np.zeros((shape[0], 0), np.int32), np.zeros(0, np.int32), homes)
        topology = Topology(tuple(m.node for m in view.members), (1.0,) * ranks)
        placement = plan_placement(np.ones(shape), topology, slots, unplaced, home_moves=0)
        ownership = plan_ownership(units, view, before, config.elastic.redundancy, placement.home)
        roles_RU = ownership.roles(ranks)
    arrives_RU = (roles_RU != NONE) & (before == NONE)
    return int(4 * ((roles_RU != NONE) @ numel_U).max()), int(4 * (arrives_RU @ numel_U).max())


@pytest.mark.parametrize(("name", "workers", "rel"), [("mhc_9b", 4, 0.1), ("qwen3_30b_a3b", 32, 0.15)])
def test_state_after_a_death_is_the_planners(name: str, workers: int, rel: float) -> None:
    """Nothing is allocated. What a change needs is far from a second copy of the state.

    With many workers the fullest one has more than an even share: a dead one's experts fall to its mirror.
    """
    config = TrainConfig(model=preset(name), data=DataConfig(seq_len=4096, micro_batch=1), precision="bf16")
    held, arrives = _held_after_a_death(config, workers)
    assert memory(config, workers - 1).state == pytest.approx(held, rel=rel)
    moved_at_once = 2 * 4 * bucket_elements(workers) + vector_bytes(held)
    assert moved_at_once < 0.1 * held
    peak = at_change(config, workers)
    assert peak >= memory(config, workers - 1).total >= memory(config, workers).total
    assert held + moved_at_once < 1.1 * peak
    assert arrives < held


def test_a_copy_on_each_node_is_a_part_of_the_experts_on_each_worker() -> None:
    config = TrainConfig(balance=BalanceConfig(copies="node"), elastic=ElasticConfig(spare_slots=0))
    experts = config.model.num_experts
    for cluster, slots in (
        (ClusterConfig(kind="simulated", nodes=4, workers_per_node=2), experts // 2),
        (ClusterConfig(kind="simulated", nodes=2, workers_per_node=4), experts // 4),
        (ClusterConfig(kind="local"), experts // 8),
        (ClusterConfig(kind="address"), experts),
    ):
        assert slots_per_layer(replace(config, cluster=cluster), 8) == slots


def test_an_exchange_needs_room_for_a_bucket() -> None:
    for workers in (2, 8, 64, 1024):
        for config in (TrainConfig(model=preset("deepseek_v3")), TrainConfig(model=preset("mhc_27b"))):
            moved = memory(config, workers).exchange
            assert 0.2 * 2**20 * 32 < moved < 1.6 * 2 * 4 * bucket_elements(workers)
    small = TrainConfig()
    assert memory(small, 2).exchange < 4 * 4 * count(small.model).total


def test_report_says_when_nothing_fits() -> None:
    config = TrainConfig(model=preset("deepseek_v3"), cluster=ClusterConfig(worker_memory_gib=10.0))
    assert "no number of workers" in report(config)
    assert math.isfinite(memory(config, 1000).total)


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model=mhc_27b", "cluster.workers=32", "cluster.worker_memory_gib=192"]) == 0
    assert "27B" in capsys.readouterr().out
    assert main(["model=mhc_28b"]) == 2
    assert "mhc_27b" in capsys.readouterr().err
    assert main(["model.hidden_siz=3"]) == 2
    assert "did you mean model.hidden_size" in capsys.readouterr().err
