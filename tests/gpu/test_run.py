"""Whole runs of workers that share one GPU: deaths and a join, and the losses of one worker alone, bit for bit.

Over NCCL the workers pass for several hosts, so it moves what they exchange over sockets.
"""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from elastic_moe.config.schema import ClusterConfig, TrainConfig
from elastic_moe.data.prepare import Prepared
from scripts.benchmarks.gpu_world import ENVIRONMENT
from tests.dist.test_equality import deepseek, default_scale
from tests.dist.test_runtime import CORPUS, with_steps
from tests.local_run import LocalRun, _work, tiny_config

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.timeout(400),
]


def _sharing(config: TrainConfig, address: Any, prepared: Prepared, worker: str, node: str) -> None:
    """A worker that NCCL takes for one on a host of its own."""
    os.environ.update(ENVIRONMENT | {"NCCL_HOSTID": worker})
    _work(config, address, prepared, worker, node)


class SharedGpuRun(LocalRun):
    work = staticmethod(_sharing)


def _config(run_dir: Path, steps: int, family: str, collectives: str) -> TrainConfig:
    config = default_scale(with_steps(tiny_config(run_dir, CORPUS, reproducible=True, max_workers=5), steps))
    config = replace(config, device="cuda", cluster=ClusterConfig(collectives=collectives))
    if family == "v4":
        config = deepseek(config)
        config = replace(config, model=replace(config.model, fused="triton"))
    return config


@pytest.mark.parametrize(("family", "collectives"), [("gqa", "nccl"), ("v4", "nccl"), ("gqa", "gloo")])
def test_deaths_and_a_join_change_no_bit(tmp_path: Path, family: str, collectives: str) -> None:
    config = _config(tmp_path / "a" / "run", 100_000, family, collectives)
    config.faults.inject = ["1:7:reduce"]
    with SharedGpuRun(config, 4, nodes=4) as run:
        run.wait_step(2)
        run.add()
        run.wait("a death and a join", lambda s: s["generation"] > 2 and s["world_size"] == 4 and s["entered"])
        run.signal("w0", signal.SIGKILL)
        status = run.wait("another death", lambda s: s["world_size"] == 3 and s["entered"])
        run.wait_step(status["step"] + 3)
        run.coordinator.submit({"event": "stop", "reason": "enough"})
        run.wait_end()
        disturbed, events, sizes = run.losses(), run.events(), [record["world_size"] for record in run.records()]
    with SharedGpuRun(_config(tmp_path / "b" / "run", len(disturbed), family, collectives), 1) as run:
        run.wait_end()
        assert disturbed == run.losses()
    entered = [event for event in events if event["event"] == "entered"]
    assert [event["lost_steps"] for event in entered] == [0] * len(entered)
    assert sizes[0] == 4
    assert sizes[-1] == 3
    said = [event["reason"] for event in events if event["event"] == "collectives"]
    assert said == (["tensors on GPUs travel over NCCL"] if collectives == "nccl" else [])
