"""A run submitted with `ray job submit` to a cluster that exists already: it trains, and its driver may die."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from elastic_moe.metrics.jsonl import read_jsonl
from tests.patience import until
from tests.ray.test_stop import ENDLESS, wait_steps

ROOT = Path(__file__).resolve().parents[2]


def drivers(run: Path) -> list[psutil.Process]:
    """The processes of the program itself that train in this directory."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            command = process.cmdline()
            if command[1:3] == ["-m", "elastic_moe.train"] and f"run.dir={run}" in command:
                found.append(process)
    return found


@pytest.mark.timeout(900)
def test_a_submitted_job_goes_on_after_its_driver_has_died(head: Any, tiny: list[str], tmp_path: Path) -> None:
    del head.env["PYTHONPATH"]  # the job's working directory is what brings the package to the driver and the workers
    head.start("--num-cpus=2", "--include-dashboard=true", PYTHONSAFEPATH="")
    run, package = tmp_path / "run", tmp_path / "job"
    package.mkdir()
    for name in ("elastic_moe", "conf"):
        (package / name).symlink_to(ROOT / name)
    submit = ["ray", "job", "submit", f"--address={head.dashboard}", f"--working-dir={package}"]
    train = [sys.executable, "-m", "elastic_moe.train", "cluster=address", "cluster.workers=2", *tiny]
    train += ["checkpoint.every_steps=3"]
    begun = head.call(*submit, "--no-wait", "--", *train, ENDLESS, timeout_s=400)
    assert begun.returncode == 0, begun.stdout + begun.stderr
    wait_steps(run, 8)
    (driver,) = drivers(run)
    os.kill(driver.pid, signal.SIGKILL)
    until(lambda: not drivers(run), "the driver's end", 60.0)

    saved = max(int(path.parent.name.removeprefix("step_")) for path in run.glob("checkpoints/step_*/manifest.json"))
    assert saved >= 6
    done = head.call(*submit, "--", *train, "run.resume=auto", f"run.steps={saved + 20}", timeout_s=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "succeeded" in done.stdout
    assert [record["step"] for record in read_jsonl(run / "metrics.jsonl")] == list(range(1, saved + 21))
    entered = [event for event in read_jsonl(run / "events.jsonl") if event["event"] == "entered"]
    (resumed,) = [event for event in entered if event["source"] == "checkpoint"]
    assert resumed["step"] >= saved, "the workers may have saved once more before Ray ended them"
    assert resumed["lost_steps"] <= 3, "no more than since the newest checkpoint"
