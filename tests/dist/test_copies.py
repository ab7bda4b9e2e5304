"""Runs whose ranks have a copy of each expert, disturbed and not: the losses of runs whose rows travel."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path

import pytest

from elastic_moe.config.schema import TrainConfig
from elastic_moe.metrics.jsonl import read_jsonl
from elastic_moe.run_dir import EXPERTS
from tests.dist.test_equality import deepseek, default_scale
from tests.dist.test_runtime import CORPUS, assert_same, with_steps
from tests.local_run import LocalRun, tiny_config

pytestmark = pytest.mark.timeout(600)


def config_of(run_dir: Path, steps: int, copies: str, **elastic: int) -> TrainConfig:
    config = with_steps(tiny_config(run_dir, CORPUS, **elastic), steps)
    return replace(config, balance=replace(config.balance, copies=copies))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of three workers, with rows that travel."""
    with LocalRun(config_of(tmp_path_factory.mktemp("base") / "run", 100, "1"), 3) as run:
        run.wait_end()
        assert any(record["cross_node_rows"] for record in run.records())
        return run.losses()


@pytest.mark.parametrize("copies", ["all", "auto", "2"])
def test_a_disturbed_run_has_the_losses_of_one_whose_rows_travel(
    tmp_path: Path, undisturbed: list[float], copies: str
) -> None:
    """A kill of two, a join, and a planned leave, whose worker has no expert in its last steps."""
    with LocalRun(config_of(tmp_path / "run", 100, copies, max_workers=5), 4, nodes=4) as run:
        run.wait_step(8)
        run.signal("w1", signal.SIGKILL)
        run.wait_step(12)
        run.signal("w0", signal.SIGKILL)
        run.add()
        run.wait("3 workers", lambda s: s["world_size"] == 3 and s["entered"] and s["step"] > 14)
        run.coordinator.submit({"event": "drain", "worker": "w2"})
        run.wait("2 workers", lambda s: s["world_size"] == 2 and s["entered"])
        run.wait_end()
        assert_same(run.losses(), undisturbed)
        assert all(e["lost_steps"] == 0 for e in run.events() if e["event"] == "entered")
        assert {e["worker"] for e in run.events() if e["event"] == "worker_lost"} == {"w0", "w1"}
        assert "w2" in {e["worker"] for e in run.events() if e["event"] == "worker_left"}
        travelled = any(record["cross_node_rows"] for record in run.records() if record["world_size"] > 2)
        assert travelled == (copies == "2")


def test_the_number_of_copies_follows_the_membership(tmp_path: Path) -> None:
    """A few sequences on many workers are better sent; on two workers each has enough of them for all experts."""
    config = config_of(tmp_path / "run", 60, "auto", max_workers=4)
    model = replace(config.model, num_experts=16, expert_hidden=64)
    config = replace(config, model=model, data=replace(config.data, global_batch=24, micro_batch=4))
    with LocalRun(config, 4, nodes=4) as run:
        run.wait_step(6)
        run.signal("w1", signal.SIGKILL)
        run.wait("3 workers", lambda s: s["world_size"] == 3 and s["entered"] and s["step"] > 10)
        run.signal("w2", signal.SIGKILL)
        run.wait("2 workers", lambda s: s["world_size"] == 2 and s["entered"])
        run.wait_end()
        rows = {record["world_size"]: record["cross_node_rows"] for record in run.records()}
        assert rows[4] > 0
        assert rows[2] == 0
        copies = [len(moves) for moves in ([m for m in e["moves"] if m[3] == 1] for e in placements(run.dir)) if moves]
        assert copies[-1] == 2 * 16


def placements(run_dir: Path) -> list[dict]:
    return [line for line in read_jsonl(run_dir / EXPERTS) if line.get("moves")]


def test_the_whole_model_family(tmp_path: Path) -> None:
    losses = []
    for copies in ("1", "all"):
        config = default_scale(config_of(tmp_path / copies / "run", 8, copies))
        with LocalRun(deepseek(replace(config, elastic=replace(config.elastic, reproducible=True))), 2) as run:
            run.wait_end()
            losses.append(run.losses())
    assert losses[0] == losses[1], "exact sums are the same bits wherever the experts are"
