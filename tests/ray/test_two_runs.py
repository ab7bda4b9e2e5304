"""Two runs at once on one cluster, each between its minimum and its maximum of workers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from elastic_moe.metrics.jsonl import read_jsonl
from tests.patience import until
from tests.ray.test_operate import Operator
from tests.ray.test_stop import ENDLESS, PATIENCE_S, wait_steps

ROOT = Path(__file__).resolve().parents[2]
Start = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def start(head: Any, tiny: list[str], tmp_path: Path) -> Iterator[Start]:
    """Starts a run in its own directory, on the cluster; its log is `NAME.log`."""
    started: list[subprocess.Popen[bytes]] = []

    def begin(name: str, *more: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "elastic_moe.train", "cluster=address", f"cluster.address={head.address}"]
        command += [*tiny, f"run.dir={tmp_path / name}", "run.log_every_s=1", ENDLESS, *more]
        env = head.env | {"OMP_NUM_THREADS": "1"}
        with (tmp_path / f"{name}.log").open("w") as log:
            started.append(subprocess.Popen(command, env=env, cwd=ROOT, stdout=log, stderr=log))
        return started[-1]

    yield begin
    for driver in started:
        driver.kill()
        driver.wait()


def world(run: Path) -> int:
    records = read_jsonl(run / "metrics.jsonl")
    return int(records[-1]["world_size"]) if records else 0


@pytest.mark.timeout(900)
def test_two_runs_share_a_cluster_and_take_what_the_other_lets_go(head: Any, tmp_path: Path, start: Start) -> None:
    """The first one takes all room, so the second one waits, says what is missing, and disturbs nobody."""
    head.start("--num-cpus=4")
    first, second = tmp_path / "first", tmp_path / "second"
    drivers = [start("first", "cluster.workers=2", "elastic.max_workers=4")]
    until(lambda: world(first) == 4, "all room taken", PATIENCE_S)
    drivers.append(start("second", "cluster.workers=2", "elastic.max_workers=3"))
    log = tmp_path / "second.log"
    until(lambda: "waiting for" in log.read_text(), "the word that it waits", PATIENCE_S)
    assert not read_jsonl(second / "metrics.jsonl")
    assert Operator(head, first).ask("scale", "2") == "2 workers train\n"
    until(lambda: world(second) == 2, "a second run with the room that is left", PATIENCE_S)
    at = len(read_jsonl(first / "metrics.jsonl"))
    wait_steps(first, at + 5)
    wait_steps(second, 5)
    assert Operator(head, first).ask("stop").startswith("the run has ended")
    assert drivers[0].wait(PATIENCE_S) == 0
    until(lambda: world(second) == 3, "the second run at its maximum", PATIENCE_S)
    os.kill(drivers[1].pid, signal.SIGTERM)
    assert drivers[1].wait(PATIENCE_S) == 128 + signal.SIGTERM
    for run in (first, second):
        steps = [record["step"] for record in read_jsonl(run / "metrics.jsonl")]
        assert steps == list(range(1, len(steps) + 1)), "no step is lost, and none is done twice"
        events = read_jsonl(run / "events.jsonl")
        assert max(e["step"] for e in events if e["event"] == "checkpoint") == steps[-1]
        assert not [e for e in events if e["event"] in ("worker_lost", "worker_evicted")]
