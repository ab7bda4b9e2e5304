"""The jobs of a sweep share one embedded cluster."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from elastic_moe.metrics.jsonl import read_jsonl

ROOT = Path(__file__).resolve().parents[2]

# The command line, with a count of the calls of ray.init.
DRIVER = """
import sys
from elastic_moe.cli.train import main
import ray
init, calls = ray.init, []
ray.init = lambda *args, **kwargs: (calls.append(kwargs), init(*args, **kwargs))[1]
code = main()
print("INIT", [call["num_cpus"] for call in calls], ray.is_initialized())
sys.exit(code)
"""


@pytest.mark.timeout(480)
def test_a_sweep_starts_ray_once(tiny: list[str], tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    env |= {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", DRIVER, "-m", *tiny, "seed=0,1", "cluster.workers=1", "elastic.max_workers=2"]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "INIT [2] False" in done.stdout
    losses = [read_jsonl(tmp_path / "run" / str(job) / "metrics.jsonl")[-1]["loss"] for job in (0, 1)]
    assert losses[0] != losses[1], "the seeds differ"
