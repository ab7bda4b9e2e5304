"""A submitted job that is watched and steered from the command line: workers, a pause, a drain, a stop."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from elastic_moe.metrics.jsonl import read_jsonl
from tests.patience import until
from tests.ray.test_job_submit import coordinators, drivers, last_step, processes, saved_steps
from tests.ray.test_stop import ENDLESS, wait_steps

ROOT = Path(__file__).resolve().parents[2]


class Operator:
    """Runs the program's own commands on one run, from another directory than the job's."""

    def __init__(self, head: Any, run: Path) -> None:
        self._head, self._run = head, run

    def call(self, command: str, *rest: str) -> subprocess.CompletedProcess[str]:
        program = [sys.executable, "-m", "elastic_moe.cli.main", command, str(self._run), *rest]
        return subprocess.run(
            program, env=self._head.env, cwd=self._head.root, capture_output=True, text=True, timeout=400
        )

    def ask(self, *rest: str) -> str:
        done = self.call("ctl", "--wait", "200", *rest)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def status(self) -> dict[str, Any]:
        done = self.call("status", "--json")
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout)


@pytest.mark.timeout(1200)
def test_a_job_is_scaled_paused_drained_stopped_and_resumed_and_no_step_is_done_twice(
    head: Any, tiny: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    head.start("--num-cpus=4", "--include-dashboard=true")
    operator = Operator(head, run)
    submit = ["ray", "job", "submit", f"--address={head.dashboard}"]
    train = [sys.executable, "-m", "elastic_moe.train", "cluster=address", "cluster.workers=2", *tiny]
    train += ["elastic.max_workers=4", "checkpoint.every_steps=0", "run.resume=auto", "run.log_every_s=1"]
    begun = head.call(*submit, "--submission-id=first", "--no-wait", "--", *train, ENDLESS, timeout_s=400)
    assert begun.returncode == 0, begun.stdout + begun.stderr
    wait_steps(run, 5)
    assert operator.ask("scale", "4") == "4 workers train\n"
    assert operator.ask("scale", "2") == "2 workers train\n"
    assert operator.status()["workers"] == 2, "those that were let go have ended"
    refused = operator.call("ctl", "scale", "9")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "this run was started for 1 to 4 workers" in refused.stderr

    before = last_step(run)
    assert "is complete" in operator.ask("checkpoint")
    assert max(saved_steps(run)) >= before
    assert operator.ask("pause").startswith("paused after step")
    paused = last_step(run)
    shown = operator.call("status")
    assert "paused" in shown.stdout
    assert paused == last_step(run) == max(saved_steps(run))
    assert operator.ask("resume").startswith("goes on after step")
    wait_steps(run, paused + 5)

    member = operator.status()["members"][0]
    assert "have handed over" in operator.ask("drain", member[0][:12])
    until(lambda: operator.status()["world_size"] == 2, "another worker in its place", 200.0)
    assert member[0] not in [worker for worker, *_ in operator.status()["members"]]
    shown = operator.call("status")
    assert shown.returncode == 0, shown.stderr
    assert "2 workers, at most 2 workers" in shown.stdout

    assert "the run has ended" in operator.ask("stop")
    until(lambda: not drivers(run) and not coordinators(head), "the end of the job", 200.0)
    logs = head.call("ray", "job", "logs", f"--address={head.dashboard}", "first").stdout
    stopped = last_step(run)
    assert f"stopped after step {stopped} of 1000000: asked for by elastic-moe ctl" in logs
    assert re.search(r"step [\d,]+ of 1,000,000: loss \d+\.\d{4}, [\d,]+ tokens/s, 4 workers, .* left", logs)
    told = head.call("ray", "job", "status", f"--address={head.dashboard}", "first")
    assert "succeeded" in told.stdout, "a stopped run is no failed one"
    shown = operator.call("status")
    assert "finished: asked for by elastic-moe ctl" in shown.stdout
    assert operator.call("ctl", "pause").returncode == 2, "there is nothing to steer"

    again = head.call(*submit, "--", *train, f"run.steps={stopped + 3}", timeout_s=400)
    assert again.returncode == 0, again.stdout + again.stderr
    assert [record["step"] for record in read_jsonl(run / "metrics.jsonl")] == list(range(1, stopped + 4))
    entered = [event for event in read_jsonl(run / "events.jsonl") if event["event"] == "entered"]
    assert all(event["lost_steps"] == 0 for event in entered)


@pytest.mark.timeout(600)
def test_the_state_is_saved_before_a_dead_head_ends_everything(head: Any, tiny: list[str], tmp_path: Path) -> None:
    """Ray ends every process of a cluster whose GCS is away for a minute."""
    run = tmp_path / "run"
    head.start("--num-cpus=2")
    command = [sys.executable, "-m", "elastic_moe.train", f"cluster.address={head.address}", *tiny, ENDLESS]
    command += ["cluster.workers=2", "checkpoint.every_steps=0"]
    with (tmp_path / "log").open("w") as log:
        driver = subprocess.Popen(command, env=head.env, cwd=head.root, stdout=log, stderr=log)
    try:
        wait_steps(run, 5)
        (gcs,) = [process for process in processes(head) if process.name() == "gcs_server"]
        gcs.kill()
        at = last_step(run)
        until(lambda: any(step >= at for step in saved_steps(run)), "a checkpoint", 60.0)
        assert driver.wait(400) != 0
        until(lambda: not coordinators(head), "the end of everything", 100.0)
    finally:
        driver.kill()
        driver.wait()
    asked = [event for event in read_jsonl(run / "events.jsonl") if event["event"] == "checkpoint_asked"]
    assert len(asked) >= 2, "again and again"
    assert max(saved_steps(run)) >= asked[1]["step"], "not only the first one was written"


@pytest.mark.timeout(400)
def test_a_run_ends_whose_workers_no_node_can_ever_hold(head: Any, tiny: list[str], tmp_path: Path) -> None:
    """It is told at once, and nodes that are started by hand have some time to come."""
    head.start("--num-cpus=2")
    command = [sys.executable, "-m", "elastic_moe.train", "cluster=address", f"cluster.address={head.address}", *tiny]
    command += ["cluster.workers=2", "cluster.cpus_per_worker=64", "cluster.nodes_timeout_s=20"]
    done = subprocess.run(command, env=head.env, cwd=head.root, capture_output=True, text=True, timeout=350)
    assert done.returncode == 2, done.stderr
    assert "waiting for workers; 0 workers are here; 2 more are asked of Ray, each with CPU 64" in done.stderr
    assert "none of its 1 nodes is so large (at most CPU 2), only a new node helps, and no autoscaler is there" in (
        done.stderr
    )
    ended = "cluster.cpus_per_worker=64: no node can ever hold a worker; the 1 nodes of the cluster have at most CPU 2"
    assert f"error: {ended} each, and no autoscaler is there\n" in done.stderr
    assert done.stderr.count(ended) == 1, "one sentence"
    assert not coordinators(head)
    (failed,) = [event for event in read_jsonl(tmp_path / "run" / "events.jsonl") if event["event"] == "failed"]
    assert failed["reason"].startswith(ended)
