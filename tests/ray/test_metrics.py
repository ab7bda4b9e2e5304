"""A run on a cluster that is watched: what a real Prometheus and Ray's dashboard know of it, with a worker killed."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from elastic_moe.actors.link import actor_name, train_names
from elastic_moe.checkpoint.identity import RunIdentity
from elastic_moe.metrics.exported import EXPORTED, RUN_ID, RUN_NAME
from elastic_moe.metrics.jsonl import read_jsonl
from scripts.grafana import PATH
from tests import patience
from tests.prometheus import Prometheus, program, prometheus
from tests.ray.conftest import free_ports
from tests.ray.test_job_submit import coordinators, last_step
from tests.ray.test_operate import Operator
from tests.ray.test_stop import ENDLESS, wait_steps

PATIENCE_S = 240.0
FETCH = """
import ray
from elastic_moe.actors.link import NAMESPACE, coordinators, fetch_token
ray.init(address={!r}, namespace=NAMESPACE, log_to_driver=False)
print(fetch_token(coordinators({!r})[-1]))
"""


def until(condition: Callable[[], Any], what: str, patience_s: float = PATIENCE_S) -> Any:
    """Wait for a condition that asks servers, with a rest between two questions."""
    return patience.until(lambda: condition() or time.sleep(0.3), what, patience_s)


class Watched:
    """A run in a subprocess on a cluster of its own, and the ways to look at it."""

    def __init__(self, head: Any, run: Path, training: subprocess.Popen[bytes]) -> None:
        self.head, self.run, self.training = head, run, training
        wait_steps(run, 5, lambda: training.poll() is None)
        identity = RunIdentity.from_bytes((run / "run.json").read_bytes())
        self.names = train_names(actor_name(identity.run, str(run)), str(run))

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in read_jsonl(self.run / "events.jsonl") if event["event"] == kind]

    def shown(self) -> tuple[dict[str, Any], str]:
        """The only run that the dashboard's API of Ray Train knows, and its whole answer."""
        with urllib.request.urlopen(f"{self.head.dashboard}/api/train/v2/runs/v1", timeout=60) as answer:
            text = answer.read().decode()
        (run,) = json.loads(text)["train_runs"]
        return run, text

    def workers(self) -> dict[int, str]:
        """Status of the workers that the newest attempt shows, by process."""
        attempts = self.shown()[0]["attempts"]
        return {worker["pid"]: worker["status"] for worker in attempts[-1]["workers"]} if attempts else {}

    def token(self) -> str:
        done = self.head.call("python", "-c", FETCH.format(self.head.address, str(self.run)))
        assert done.returncode == 0, done.stderr
        return done.stdout.split()[-1]


@pytest.fixture
def watched(head: Any, tiny: list[str], tmp_path: Path) -> Iterator[Watched]:
    run = tmp_path / "a run"
    head.start("--num-cpus=2", "--include-dashboard=true", RAY_metrics_report_interval_ms="1000")
    command = [sys.executable, "-m", "elastic_moe.train", *tiny, "cluster=address", "cluster.workers=2", ENDLESS]
    command += ["run.log_format=json", "run.log_every_s=1", "cluster.price_per_hour.default=2.5"]
    command += [f"run.dir={run}", "checkpoint.every_steps=20", "run.eval_every_steps=20", "balance.log_every_steps=5"]
    with (tmp_path / "training.log").open("wb") as log:
        training = subprocess.Popen(
            command, env=head.env | {"RAY_ADDRESS": head.address}, cwd=head.root, stdout=log, stderr=log
        )
        try:
            yield Watched(head, run, training)
        finally:
            training.kill()
            training.wait()


def queries(rate: str = "1m") -> list[str]:
    """Every query of the Grafana dashboard, as Grafana would ask it for all runs."""
    panels = json.loads(PATH.read_text())["panels"]
    asked = [target["expr"] for panel in panels for target in panel.get("targets", ())]
    return [query.replace("$run", ".*").replace("$__rate_interval", rate) for query in asked]


def unanswered(server: Prometheus) -> list[str]:
    """Queries without a value."""
    return [query for query in queries() if not any(math.isfinite(value) for _, value in server.ask(query))]


@pytest.mark.skipif(program() is None, reason="no Prometheus: .ci/run unpacks one where apt has it")
@pytest.mark.timeout(900)
def test_prometheus_and_the_dashboard_know_the_run(watched: Watched, tmp_path: Path) -> None:
    head, run = watched.head, watched.run
    targets = Path(head.env["RAY_TMPDIR"]) / "ray" / "prom_metrics_service_discovery.json"
    (server_root := tmp_path / "prometheus").mkdir()
    with prometheus(server_root, targets, free_ports(1)[0]) as server:
        first = {event["pid"] for event in watched.events("worker_ready")}
        killed = min(first)
        os.kill(killed, signal.SIGKILL)
        until(lambda: any(event["world_size"] == 2 for event in watched.events("entered")[2:]), "a joiner")
        until(lambda: not unanswered(server), "an answer to every query of Grafana")
        check_ray_shows_the_workers(watched, first, killed)
        check_a_pause(watched, server)
        check_another_coordinator_counts_nothing_twice(watched, server)
    assert Operator(head, run).ask("stop").startswith("the run has ended after step")
    until(lambda: watched.training.poll() is not None, "the end of the run")
    assert watched.training.returncode == 0
    check_the_log(watched, (tmp_path / "training.log").read_text())
    until(lambda: watched.shown()[0]["status"] == "FINISHED", "Ray says that it is finished")
    assert set(watched.workers().values()) == {"DEAD"}


def check_ray_shows_the_workers(watched: Watched, first: set[int], killed: int) -> None:
    """Ray's own name of the run is the run's; those that joined and died are there; the token is nowhere."""
    (joined,) = {event["pid"] for event in watched.events("worker_ready")} - first
    expected = dict.fromkeys(first, "ALIVE") | {killed: "DEAD", joined: "ALIVE"}
    until(lambda: watched.workers() == expected, f"Ray shows {expected}")
    shown, text = watched.shown()
    assert (shown["name"], shown["id"], shown["status"]) == (watched.names.name, watched.names.id, "RUNNING")
    assert shown["name"].startswith("a-run-")
    assert len(shown["attempts"]) == 1
    token = watched.token()
    assert len(token) == 32
    assert token not in text
    assert watched.names.id in text


def check_the_log(watched: Watched, text: str) -> None:
    """Every line of the run is an object; Ray's own, and what is said when the run is over, are none."""
    others = [line for line in text.splitlines() if not line.startswith("{")]
    assert all("(raylet)" in line or line.startswith("elastic_moe: ") for line in others), others
    lines = [json.loads(line) for line in text.splitlines() if line not in others]
    for line in lines:
        assert {"time", "level", "run", "generation", "step", "message"} <= line.keys()
        assert line["run"] == watched.names.name
    kinds = {line.get("event"): line for line in lines}
    assert {"progress", "worker_lost", "entered", "evaluated", "pause"} <= kinds.keys()
    assert (kinds["worker_lost"]["level"], kinds["progress"]["level"]) == ("warning", "info")
    assert kinds["progress"]["step"] > 0 < kinds["progress"]["generation"]
    assert kinds["progress"]["tokens_per_s"] > 0


def check_a_pause(watched: Watched, server: Prometheus) -> None:
    """Counters equal the records, and what stands goes on to be right while nothing happens."""
    of_run = f'{{{RUN_NAME}="{watched.names.name}", {RUN_ID}="{watched.names.id}"}}'

    def value(metric: str) -> float | None:
        return server.value(f"sum(ray_elastic_moe_{metric}{of_run})")

    assert Operator(watched.head, watched.run).ask("pause").startswith("paused after step")
    until(lambda: value("world_size") == 0 and value("phase") == 1, "a pause is seen")
    step = last_step(watched.run)
    until(lambda: value("steps_total") == step, f"{step} steps are counted")
    records = read_jsonl(watched.run / "metrics.jsonl")
    assert value("tokens_total") == sum(record["tokens"] for record in records)
    assert value("step") == step
    until(lambda: value("checkpoint_step") == step, "the checkpoint of the pause is there")
    assert value("checkpoint_lag_steps") == 0 == value("tokens_per_s")
    assert (value("wanted_workers"), value("missing_workers"), value("workers")) == (2, 0, 2)
    causes = {labels["cause"]: count for labels, count in server.ask(f"ray_elastic_moe_recoveries_total{of_run}")}
    assert {cause: count for cause, count in causes.items() if count} == {"death": 1, "join": 1}
    assert value("lost_steps_total") == 0
    age = value("checkpoint_age_s")
    assert age is not None
    until(lambda: (value("checkpoint_age_s") or 0) > age + 3, "the age of the checkpoint grows")
    for labels, _ in server.ask(f'{{__name__=~"ray_elastic_moe_.*", {RUN_ID}="{watched.names.id}"}}'):
        assert labels[RUN_NAME] == watched.names.name
    controller = server.ask(f"ray_train_controller_state{of_run} == 1")
    assert [labels["ray_train_controller_state"] for labels, _ in controller] == ["RUNNING"], "Ray's tags are ours"


def check_another_coordinator_counts_nothing_twice(watched: Watched, server: Prometheus) -> None:
    """The coordinator is killed in the pause, in which nothing waits to be exported, so nothing is missing either."""
    of_run = f'{{{RUN_ID}="{watched.names.id}"}}'
    counters = [metric.series for metric in EXPORTED if metric.kind == "counter" and not metric.tag]
    before = {name: server.value(f"sum({name}{of_run})") for name in counters}
    (old,) = coordinators(watched.head)
    old.kill()
    until(lambda: [c for c in coordinators(watched.head) if c.pid != old.pid] != [], "another coordinator")
    fresh = f"count(ray_elastic_moe_steps_total{of_run})"
    until(lambda: (server.value(fresh) or 0) == 2, "it exports too")
    assert {name: server.value(f"sum({name}{of_run})") for name in counters} == before
    Operator(watched.head, watched.run).ask("resume")
    at = last_step(watched.run)
    wait_steps(watched.run, at + 20)
    assert Operator(watched.head, watched.run).ask("pause").startswith("paused after step")
    step = last_step(watched.run)
    until(lambda: server.value(f"sum(ray_elastic_moe_steps_total{of_run})") == step, f"{step} steps")
    Operator(watched.head, watched.run).ask("resume")
