"""A run whose driver is sent SIGTERM: the committed state is saved, and a resume goes on at the next step."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from elastic_moe.metrics.jsonl import Tail, read_jsonl
from tests.patience import until

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 240.0
ENDLESS = "run.steps=1000000"


def trained(run: Path) -> Tail:
    """The run's records."""
    return Tail(run / "metrics.jsonl")


def wait_steps(run: Path, steps: int, alive: Any = lambda: True) -> None:
    records = trained(run)
    until(lambda: len(records.lines()) >= steps or not alive(), f"{steps} steps", PATIENCE_S)
    assert alive(), "the run ended by itself"


def assert_saved_and_stopped(run: Path) -> int:
    """No committed step is lost: the only checkpoint is of the last step. Returns this step."""
    steps = [record["step"] for record in read_jsonl(run / "metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1))
    events = read_jsonl(run / "events.jsonl")
    assert [(e["event"], e["reason"]) for e in events if e["event"] in ("finished", "failed")] == [
        ("finished", "SIGTERM")
    ]
    assert [event["step"] for event in events if event["event"] == "checkpoint"] == [steps[-1]]
    manifest = json.loads((run / "checkpoints" / f"step_{steps[-1]:08d}" / "manifest.json").read_text())
    assert manifest["step"] == steps[-1]
    return steps[-1]


def assert_resumed_at_the_next_step(run: Path, stopped_at: int) -> None:
    steps = [record["step"] for record in read_jsonl(run / "metrics.jsonl")]
    assert steps == list(range(1, stopped_at + 4)), "no step is lost, and none is done twice"
    entered = [event for event in read_jsonl(run / "events.jsonl") if event["event"] == "entered"]
    (resumed,) = [event for event in entered if event["source"] == "checkpoint"]
    assert (resumed["step"], resumed["lost_steps"]) == (stopped_at, 0)


@pytest.mark.timeout(600)
def test_sigterm_to_the_driver_saves_the_last_step(tiny: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "elastic_moe.train", *tiny, "checkpoint.every_steps=0", "cluster=simulated"]
    command += ["cluster.nodes=2", "cluster.workers_per_node=1", "cluster.object_store_gib=0.08"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    driver = subprocess.Popen([*command, ENDLESS], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        wait_steps(run, 5, lambda: driver.poll() is None)
        driver.send_signal(signal.SIGTERM)
        out, err = driver.communicate(timeout=PATIENCE_S)
    finally:
        driver.kill()
        driver.communicate()
    assert driver.returncode == 128 + signal.SIGTERM, out + err
    step = assert_saved_and_stopped(run)
    assert f"stopped after step {step} of 1000000; go on with run.resume=auto" in out

    again = subprocess.run(
        [*command, f"run.steps={step + 3}", "run.resume=auto"],
        env=env, capture_output=True, text=True, timeout=PATIENCE_S,
    )  # fmt: skip
    assert again.returncode == 0, again.stdout + again.stderr
    assert_resumed_at_the_next_step(run, step)


@pytest.mark.timeout(900)
def test_ray_job_stop_saves_the_last_step(head: Any, tiny: list[str], tmp_path: Path) -> None:
    """The driver gets SIGTERM twice: from Ray, and from the program around it, which Ray signals too."""
    run = tmp_path / "run"
    head.start("--num-cpus=2", "--include-dashboard=true")
    patience = json.dumps({"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "600"}})
    address = f"--address={head.dashboard}"
    submit = ["ray", "job", "submit", address, f"--runtime-env-json={patience}"]
    train = [sys.executable, "-m", "elastic_moe.train", "cluster=address", "cluster.workers=2", *tiny]
    train += ["checkpoint.every_steps=0"]

    begun = head.call(*submit, "--submission-id=first", "--no-wait", "--", "timeout", "3600", *train, ENDLESS)
    assert begun.returncode == 0, begun.stdout + begun.stderr
    wait_steps(run, 5)
    stopped = head.call("ray", "job", "stop", address, "first", timeout_s=PATIENCE_S)
    logs = head.call("ray", "job", "logs", address, "first")
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr + logs.stdout
    step = assert_saved_and_stopped(run)
    assert f"stopped after step {step} of 1000000; go on with run.resume=auto" in logs.stdout

    again = head.call(*submit, "--", *train, f"run.steps={step + 3}", "run.resume=auto", timeout_s=PATIENCE_S)
    assert again.returncode == 0, again.stdout + again.stderr
    assert_resumed_at_the_next_step(run, step)
