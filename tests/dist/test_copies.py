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


@pytest.mark.parametrize(("copies", "nodes"), [("all", 4), ("auto", 4), ("2", 4), ("node", 2), ("node", 4)])
def test_a_disturbed_run_has_the_losses_of_one_whose_rows_travel(
    tmp_path: Path, undisturbed: list[float], copies: str, nodes: int
) -> None:
    """A kill of two, a join, and a planned leave, whose worker has no expert in its last steps.

    On two nodes these have two workers each, then two and one, one and one, two and one, one and one.
    """
    with LocalRun(config_of(tmp_path / "run", 100, copies, max_workers=5), 4, nodes=nodes) as run:
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
        if nodes == 2:
            first = placements(run.dir)[0]["moves"]
            assert len({tuple(move[:2]) for move in first if move[3] == 1}) * 2 <= sum(m[3] == 1 for m in first)
            assert all(len(experts) < 8 for experts in held(first).values()), "no worker has all of them"


def test_a_whole_node_dies(tmp_path: Path, undisturbed: list[float]) -> None:
    """Mirrors are on the other node. Its workers go on as one node, until others join on a second one."""
    with LocalRun(config_of(tmp_path / "run", 100, "node", max_workers=4), 4, nodes=2) as run:
        run.wait_step(10)
        for worker in ("w1", "w3"):
            run.signal(worker, signal.SIGKILL)
        run.wait("2 workers", lambda s: s["world_size"] == 2 and s["entered"] and s["step"] > 12)
        run.add("n2")
        run.wait_end()
        assert_same(run.losses(), undisturbed)
        assert all(e["lost_steps"] == 0 for e in run.events() if e["event"] == "entered")
        assert not any(record["cross_node_rows"] for record in run.records())
        assert run.records()[-1]["world_size"] == 3


def held(moves: list[list[int]]) -> dict[int, set[int]]:
    """Rank -> the experts that it has a copy of, by the first moves of a run with one MoE layer."""
    ranks: dict[int, set[int]] = {}
    for _, expert, rank, kind in moves:
        if kind == 1:
            ranks.setdefault(rank, set()).add(expert)
    return ranks


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
    for copies, workers in (("1", 2), ("all", 2), ("node", 4)):
        config = default_scale(config_of(tmp_path / copies / "run", 8, copies))
        config = deepseek(replace(config, elastic=replace(config.elastic, reproducible=True)))
        with LocalRun(config, workers, nodes=2) as run:
            run.wait_end()
            losses.append(run.losses())
            assert any(record["cross_node_rows"] for record in run.records()) == (copies != "node")
    assert losses[0] == losses[1] == losses[2], "exact sums are the same bits wherever the experts are"
