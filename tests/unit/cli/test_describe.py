"""Counts against the papers' figures and the runtime's own plans; the command line."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from elastic_moe.cli.compose import check, register_schema
from elastic_moe.cli.describe import count, main, memory, report, slots_per_layer, smallest, training_flops
from elastic_moe.config.schema import BalanceConfig, ClusterConfig, DataConfig, ElasticConfig, ModelConfig, TrainConfig
from elastic_moe.errors import UserError
from elastic_moe.plan.placement import copies_of, default_slots
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
@pytest.mark.parametrize("copies", ["auto", "1", "2", "all"])
def test_slots_are_the_planners(workers: int, limit: int, copies: str) -> None:
    balance = BalanceConfig(copies=copies)
    config = TrainConfig(elastic=ElasticConfig(spare_slots=2, slots_per_worker=limit), balance=balance)
    view = View(1, tuple(Member(str(i), "n", i) for i in range(workers)))
    try:
        planned = max(default_slots(config.model.num_experts, view, 2, limit, copies_of(config, workers)))
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
    assert narrow.exchange < wide.exchange
    assert (narrow.gradients, narrow.state) == (wide.gradients, wide.state)


def test_redundancy_costs_state() -> None:
    plain = TrainConfig(elastic=ElasticConfig(redundancy=0))
    twin = replace(plain, elastic=ElasticConfig(redundancy=1))
    assert memory(twin, 8).state == pytest.approx(2 * memory(plain, 8).state)
    assert memory(twin, 1).state == memory(plain, 1).state, "one worker has nobody to mirror it"


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
