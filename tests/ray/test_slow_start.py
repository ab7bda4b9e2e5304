"""A machine so busy that Ray does not start a node in its own 30 s: the run starts it once more."""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from elastic_moe.metrics.jsonl import read_jsonl

ROOT = Path(__file__).resolve().parents[2]
STOPPED_S = 40.0


def raylets(pid: int) -> list[psutil.Process]:
    """The node processes below a process, the oldest first."""
    found: list[psutil.Process] = []
    with suppress(psutil.Error):
        for process in psutil.Process(pid).children(recursive=True):
            with suppress(psutil.Error):
                found += [process] if process.name() == "raylet" else []
    return sorted(found, key=lambda process: process.create_time())


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("nodes", [1, 2])
def test_a_node_that_does_not_start_in_time_is_started_again(tmp_path: Path, tiny: list[str], nodes: int) -> None:
    """One node: an embedded Ray. Two: a simulated cluster, whose second process of this kind is its first node."""
    kind = ["cluster=simulated", "cluster.nodes=2", "cluster.workers_per_node=1"] if nodes == 2 else ["cluster=local"]
    with (tmp_path / "log").open("w") as log:
        command = [sys.executable, "-m", "elastic_moe.train", *tiny, *kind]
        run = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        try:
            while len(found := raylets(run.pid)) < nodes:
                assert run.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.02)
            found[nodes - 1].suspend()
            time.sleep(STOPPED_S)
            with suppress(psutil.NoSuchProcess):  # the run has ended it
                found[nodes - 1].resume()
            assert run.wait(600) == 0, (tmp_path / "log").read_text()
        finally:
            run.kill()
            run.wait()
    assert "Ray did not start; once more" in (tmp_path / "log").read_text()
    assert len(read_jsonl(tmp_path / "run" / "metrics.jsonl")) == 4
