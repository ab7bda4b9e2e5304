"""A run submitted with `ray job submit` to a cluster that exists already."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from elastic_moe.metrics.jsonl import read_jsonl

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.timeout(480)
def test_a_submitted_job_trains_on_the_cluster(head: Any, tiny: list[str], tmp_path: Path) -> None:
    del head.env["PYTHONPATH"]  # the job's working directory is what brings the package to the driver and the workers
    head.start("--num-cpus=2", "--include-dashboard=true", PYTHONSAFEPATH="")
    package = tmp_path / "job"
    package.mkdir()
    for name in ("elastic_moe", "conf"):
        (package / name).symlink_to(ROOT / name)
    submit = ["ray", "job", "submit", f"--address={head.dashboard}", f"--working-dir={package}", "--"]
    train = [sys.executable, "-m", "elastic_moe.train", "cluster=address", "cluster.workers=2", *tiny]
    done = head.call(*submit, *train, timeout_s=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "succeeded" in done.stdout
    assert [record["step"] for record in read_jsonl(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4]
