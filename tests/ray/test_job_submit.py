"""A run submitted with `ray job submit` to a cluster that exists already: it trains, and its driver may die."""

from __future__ import annotations

import json
import sys
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from elastic_moe.actors.driver_watcher import REASON
from elastic_moe.metrics.jsonl import read_jsonl
from tests.patience import until
from tests.ray.test_stop import ENDLESS, wait_steps

ROOT = Path(__file__).resolve().parents[2]
CONTROLLER = "ray::ElasticController"
LOOKS_SOON = {"RAY_TRAIN_STATE_ACTOR_RECONCILIATION_INTERVAL_S": "5"}  # Ray, for controllers that are dead


def drivers(run: Path) -> list[psutil.Process]:
    """The processes of the program itself that train in this directory."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            command = process.cmdline()
            if command[1:3] == ["-m", "elastic_moe.train"] and f"run.dir={run}" in command:
                found.append(process)
    return found


def processes(head: Any) -> list[psutil.Process]:
    """The processes of this cluster."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("RAY_TMPDIR") == head.env["RAY_TMPDIR"]:
                found.append(process)
    return found


def coordinators(head: Any) -> list[psutil.Process]:
    """The coordinators' processes on this cluster."""
    return [process for process in processes(head) if title(process) == "ray::Coordinator"]


def title(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return " ".join(process.cmdline()[:1])  # it has none while it ends
    return ""


def saved_steps(run: Path) -> list[int]:
    return [int(path.parent.name.removeprefix("step_")) for path in run.glob("checkpoints/step_*/manifest.json")]


def last_step(run: Path) -> int:
    return int(read_jsonl(run / "metrics.jsonl")[-1]["step"])


@pytest.mark.timeout(900)
def test_a_submitted_job_loses_no_step_although_its_driver_dies(head: Any, tiny: list[str], tmp_path: Path) -> None:
    """The second time, the coordinator dies with it, and the job is submitted again while the workers still save.

    Before all that, the Ray Train controller dies alone. To Ray these are four attempts of one run, and none of a dead
    controller goes on.
    """
    del head.env["PYTHONPATH"]  # the job's working directory is what brings the package to the driver and the workers
    head.start("--num-cpus=2", "--include-dashboard=true", PYTHONSAFEPATH="", **LOOKS_SOON)
    run, package = tmp_path / "run", tmp_path / "job"
    package.mkdir()
    for name in ("elastic_moe", "conf"):
        (package / name).symlink_to(ROOT / name)
    submit = ["ray", "job", "submit", f"--address={head.dashboard}", f"--working-dir={package}"]
    train = [sys.executable, "-m", "elastic_moe.train", "cluster=address", "cluster.workers=2", *tiny]
    train += ["checkpoint.every_steps=0", "run.resume=auto"]
    for again in (False, True):
        at = last_step(run) if again else 0
        begun = head.call(*submit, "--no-wait", "--", *train, ENDLESS, timeout_s=400)
        assert begun.returncode == 0, begun.stdout + begun.stderr
        wait_steps(run, at + 8)
        if not again:
            (controller,) = [process for process in processes(head) if title(process).startswith(CONTROLLER)]
            controller.kill()
            until(lambda: shown(head) == ("RUNNING", ["ABORTED", "RUNNING"]), "another controller", 200.0)
        killed = drivers(run) + (coordinators(head) if again else [])
        assert len(killed) == 1 + again
        for process in killed:
            process.kill()
        psutil.wait_procs(killed, timeout=60)
        if not again:
            until(lambda: not coordinators(head), "the end of what outlived the driver", 120.0)
            assert finished(run) == [REASON]
            until(lambda: shown(head) == ("ABORTED", ["ABORTED"] * 2), "Ray sees that nothing runs", 200.0)

    steps = last_step(run) + 100
    done = head.call(*submit, "--", *train, f"run.steps={steps}", timeout_s=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "succeeded" in done.stdout
    assert [record["step"] for record in read_jsonl(run / "metrics.jsonl")] == list(range(1, last_step(run) + 1))
    assert last_step(run) >= steps, "more where the workers trained on meanwhile"
    entered = [event for event in read_jsonl(run / "events.jsonl") if event["event"] == "entered"]
    resumed = [event["lost_steps"] for event in entered if event["source"] == "checkpoint"]
    assert resumed == [0, 0], "no death costs a step"
    until(lambda: shown(head) == ("FINISHED", ["ABORTED"] * 3 + ["FINISHED"]), "one run, with its attempts", 100.0)


def shown(head: Any) -> tuple[str, list[str]]:
    """The status of the only train run that Ray's dashboard knows, and those of its attempts, oldest first."""
    with urllib.request.urlopen(f"{head.dashboard}/api/train/v2/runs/v1", timeout=60) as answer:
        (run,) = json.load(answer)["train_runs"]
    assert run["name"].startswith("run-"), "its own name"
    attempts = sorted(run["attempts"], key=lambda attempt: attempt["start_time_ns"])
    return run["status"], [attempt["status"] for attempt in attempts]


def finished(run: Path) -> list[str]:
    return [event["reason"] for event in read_jsonl(run / "events.jsonl") if event["event"] == "finished"]


@pytest.mark.timeout(600)
def test_ray_job_stop_without_patience_still_saves_the_last_step(head: Any, tiny: list[str], tmp_path: Path) -> None:
    """Ray kills the driver at once after its SIGTERM. The workers save, and end."""
    run = tmp_path / "run"
    head.start("--num-cpus=2", "--include-dashboard=true")
    hasty = json.dumps({"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "0"}})
    address = f"--address={head.dashboard}"
    submit = ["ray", "job", "submit", address, f"--runtime-env-json={hasty}", "--submission-id=first", "--no-wait"]
    train = [sys.executable, "-m", "elastic_moe.train", "cluster.workers=2", *tiny]  # cluster=auto: the job's
    begun = head.call(*submit, "--", *train, "checkpoint.every_steps=0", ENDLESS)
    assert begun.returncode == 0, begun.stdout + begun.stderr
    wait_steps(run, 5)
    assert coordinators(head)
    stopped = head.call("ray", "job", "stop", address, "first")
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    until(lambda: not coordinators(head), "the end of the run", 120.0)
    (manifest,) = run.glob("checkpoints/step_*/manifest.json")
    assert json.loads(manifest.read_text())["step"] == last_step(run)
    assert finished(run) in (["SIGTERM"], [REASON])
