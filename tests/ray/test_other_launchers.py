"""Launchers of others: each job has a cluster of its own, and the exit code tells whether one has failed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from elastic_moe.metrics.jsonl import read_jsonl

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.long


def sweep(launcher: str, tiny: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    path = os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "elastic_moe.train", *tiny, "-m", f"hydra/launcher={launcher}", "seed=0,1"]
    command += ["cluster=local", "cluster.workers=1", "elastic.redundancy=0"]
    return subprocess.run(command, env=env | {"PYTHONPATH": path}, cwd=cwd, capture_output=True, text=True, timeout=500)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("launcher", "package"), [("joblib", "hydra_joblib_launcher"), ("submitit_local", "hydra_submitit_launcher")]
)
def test_the_exit_code_tells_of_a_trial_that_failed(
    launcher: str, package: str, tiny: list[str], tmp_path: Path
) -> None:
    pytest.importorskip(f"hydra_plugins.{package}")
    done = sweep(launcher, tiny, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    losses = [read_jsonl(tmp_path / "run" / str(job) / "metrics.jsonl")[-1]["loss"] for job in (0, 1)]
    assert losses[0] != losses[1], "the seeds differ"
    shutil.rmtree(tmp_path / "run" / "0")
    again = sweep(launcher, tiny, tmp_path)
    assert again.returncode == 2, again.stdout + again.stderr
    assert "run/1 ended with exit code 2" in again.stderr
    assert "Traceback" not in again.stderr
    assert read_jsonl(tmp_path / "run" / "0" / "metrics.jsonl")[-1]["loss"] == losses[0], "the other one went on"
