"""A run of real workers with its checkpoints on an S3 server that fails on the way: it resumes, and nothing is lost."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path

import pytest

from elastic_moe.checkpoint.reader import find_latest
from elastic_moe.checkpoint.storage import Storage
from elastic_moe.checkpoint.writer import list_steps
from elastic_moe.config.schema import CheckpointConfig, TrainConfig
from elastic_moe.coordination.start import check_start, look
from elastic_moe.errors import UserError
from tests.local_run import LocalRun, tiny_config
from tests.s3_server import READS, WRITES, Fault, Proxy

CORPUS = Path(__file__).resolve().parents[2] / "elastic_moe" / "plan" / "split" / "split.py"
STEPS = 24
pytestmark = pytest.mark.timeout(600)


def config_of(run_dir: Path, root: str, steps: int) -> TrainConfig:
    config = tiny_config(run_dir, CORPUS, reproducible=True)
    return replace(
        config,
        run=replace(config.run, steps=steps, resume="auto"),
        optim=replace(config.optim, schedule="constant"),
        checkpoint=CheckpointConfig(every_steps=5, dir=root, timeout_s=6.0),
    )


def saw(run: LocalRun, event: str) -> bool:
    return any(found["event"] == event for found in run.events())


def test_a_run_is_killed_and_resumed_while_the_storage_fails(tmp_path: Path, proxy: Proxy, root: str) -> None:
    with LocalRun(config_of(tmp_path / "undisturbed", "", STEPS), 2) as run:
        run.wait_end()
        expected = run.losses()

    config = config_of(tmp_path / "run", root, 1000)
    with LocalRun(config, 2) as run:
        run.wait("a checkpoint", lambda _: saw(run, "checkpoint"))
        proxy.fault = Fault("cut upload", WRITES, "safetensors")
        run.wait("a failed checkpoint", lambda _: saw(run, "checkpoint_failed"))
        saved = list_steps(Storage(root))
        proxy.fault = Fault()
        step = run.coordinator.status()["step"]
        run.wait_step(step + 5)
        for worker in list(run.processes):
            run.signal(worker, signal.SIGKILL)
    found = find_latest(root)
    assert found is not None

    proxy.fault = Fault("403", READS)
    with pytest.raises(UserError, match=r"cannot be read, and nothing was changed: .*ACCESS_DENIED"):
        check_start(config, look(config))
    with LocalRun(config_of(tmp_path / "run", root, found.step + STEPS), 2) as run:
        run.wait("the hold", lambda _: saw(run, "storage_unavailable"))
        proxy.fault = Fault("cut download", ("GET",), "safetensors")
        hits = proxy.hits
        run.wait("cut reads", lambda _: proxy.hits > hits)
        proxy.fault = Fault()
        assert set(saved) & set(list_steps(Storage(root))), "nothing is deleted"
        run.wait_end()
        losses = run.losses()
        entered = [event for event in run.events() if event["event"] == "entered"]
        assert [(event["source"], event["step"]) for event in entered] == [
            ("initialisation", 0),
            ("checkpoint", found.step),
        ]
    assert len(losses) == found.step + STEPS
    assert losses[:STEPS] == expected, "bit for bit"
    last = find_latest(root)
    assert last is not None
    assert last.step == found.step + STEPS
