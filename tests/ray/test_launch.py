"""Whole runs through `launch` on simulated nodes: to the end, with a killed worker, and with bad input."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from elastic_moe.actors.driver import launch
from elastic_moe.config.schema import (
    CheckpointConfig,
    ClusterConfig,
    DataConfig,
    ElasticConfig,
    FaultConfig,
    ModelConfig,
    RunConfig,
    TrackingConfig,
    TrainConfig,
)
from elastic_moe.metrics.jsonl import read_jsonl
from tests.declared import assert_declared

STEPS = 12


def _config(root: Path, **changes: Any) -> TrainConfig:
    corpus = root / "corpus.txt"
    corpus.write_text("the quick brown fox jumps over the lazy dog\n" * 400)
    parts: dict[str, Any] = {
        "device": "cpu",
        "run": RunConfig(dir=str(root / "run"), steps=STEPS, eval_every_steps=0, eval_sequences=4, sample_tokens=4),
        "model": ModelConfig(
            hidden_size=32,
            num_layers=2,
            num_heads=2,
            num_kv_heads=1,
            head_dim=16,
            dense_hidden=32,
            num_experts=4,
            experts_per_token=2,
            expert_hidden=16,
        ),
        "data": DataConfig(
            corpus=str(corpus), tokenizer="bytes", seq_len=16, global_batch=8, micro_batch=4, val_fraction=0.2
        ),
        "elastic": ElasticConfig(),
        "checkpoint": CheckpointConfig(every_steps=5),
        "cluster": ClusterConfig(kind="simulated", nodes=2, workers_per_node=1, object_store_gib=0.08),
        "tracking": TrackingConfig(wandb="off"),
    }
    return TrainConfig(**(parts | changes))


@pytest.mark.timeout(480)
def test_a_killed_worker_is_replaced_and_the_run_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """For Ray every worker has a GPU of its own: the nodes claim to have some, and the workers compute on CPUs."""
    cluster = ClusterConfig(kind="simulated", nodes=2, workers_per_node=1, object_store_gib=0.08, gpus_per_worker=1)
    config = _config(tmp_path, cluster=cluster, faults=FaultConfig(kill_worker_at_step=4, kill_rank=1))
    assert launch(config, "seed: 0\n") == 0
    run = tmp_path / "run"
    assert_declared(run)
    records = read_jsonl(run / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert len({record["generation"] for record in records}) > 1, "the kill did not happen"
    events = {event["event"] for event in read_jsonl(run / "events.jsonl")}
    assert {"worker_lost", "entered", "checkpoint", "sample"} <= events
    assert (run / "checkpoints" / f"step_{STEPS:08d}" / "manifest.json").exists()
    assert (run / "config.yaml").read_text() == "seed: 0\n"
    told = capsys.readouterr()
    assert f"{STEPS} steps, loss" in told.out
    assert "A worker died" not in told.out, "Ray's notice of a thousand characters"
    assert re.search(r"^Ray: process \d+ on \S+ died \(SYSTEM_ERROR: ", told.err, re.MULTILINE)


def test_a_run_directory_with_a_run_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n')
    assert launch(_config(tmp_path), "") == 2
    assert "run.resume=auto" in capsys.readouterr().err


def test_unknown_cluster_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch(_config(tmp_path, cluster=ClusterConfig(kind="kubernetes")), "") == 2
    assert "cluster.kind" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch(_config(tmp_path, device="cuda"), "") == 2
    assert "device is cuda" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
