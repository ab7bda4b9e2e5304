"""The main job through real kills, stops and drains: uneven nodes, hung worker, lost coordinator, drained node."""

from __future__ import annotations

import os
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from elastic_moe.actors.driver import start_coordinator
from elastic_moe.actors.driver_watcher import end_run
from elastic_moe.actors.fit import fit, make_trainer
from elastic_moe.actors.kept import end_all, new_name, placements, worker_names
from elastic_moe.actors.link import NAMESPACE, OVER, CoordinatorLink, actor_name, coordinators
from elastic_moe.actors.take_over import take_over
from elastic_moe.actors.worker import ElasticWorker
from elastic_moe.config.schema import ClusterConfig, TrainConfig
from elastic_moe.coordination.identity import IdentityFiles
from elastic_moe.coordination.start import look
from elastic_moe.data.prepare import prepare
from elastic_moe.metrics.jsonl import Tail
from elastic_moe.run_dir import checkpoint_root
from tests.local_run import tiny_config
from tests.ray.test_drain import drain_node

CORPUS = Path(__file__).resolve().parents[2] / "elastic_moe" / "plan" / "split" / "split.py"
WORKERS = 3
CONTROLLER = "ray::ElasticController"
Until = Callable[..., None]


class FullRun:
    """A run of the real train function on the test's cluster, and what its coordinator and its files say."""

    def __init__(self, config: TrainConfig) -> None:
        prepared = prepare(config.data, Path(config.run.dir).parent / "cache")
        config = replace(config, model=replace(config.model, vocab_size=prepared.vocab_size))
        root = Path(config.run.dir)
        root.mkdir()
        self._metrics, self._events = Tail(root / "metrics.jsonl"), Tail(root / "events.jsonl")
        identity = IdentityFiles.open(root, checkpoint_root(config)).identity
        name, token = actor_name(identity.run, str(root), "1"), secrets.token_hex(16)
        self.run, self.name, self.coordinator = identity.run, name, start_coordinator(config, name, token)
        self.link = CoordinatorLink(name)
        self.error: BaseException | None = None

        def train() -> None:
            try:
                fit(lambda: make_trainer(config, prepared, name), CoordinatorLink(name))
            except BaseException as error:  # noqa: BLE001 - handed to the test
                self.error = error

        self.thread = threading.Thread(target=train, daemon=True)
        self.thread.start()

    def steps(self) -> int:
        lines = self._metrics.lines()
        return int(lines[-1]["step"]) if lines else 0

    def world(self) -> int:
        lines = self._metrics.lines()
        return int(lines[-1]["world_size"]) if lines else 0

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self._events.lines() if event["event"] == kind]

    def members(self) -> list[tuple[str, str, int]]:
        """(worker, node, pid) by rank."""
        return [(worker, node, pid) for worker, node, pid, _ in self.status()["members"]]

    def status(self) -> dict[str, Any]:
        return ray.get(self.coordinator.status.remote(), timeout=60)

    def finish(self) -> None:
        """Stop the run and check its records: every step once, none lost."""
        self.link.submit({"event": "stop", "reason": "enough"})
        self.thread.join(120)
        assert not self.thread.is_alive()
        assert self.error is None
        assert [line["step"] for line in self._metrics.lines()] == list(range(1, self.steps() + 1))
        assert all(event["lost_steps"] == 0 for event in self.events("entered"))


def endless(tmp_path: Path, **elastic: Any) -> TrainConfig:
    config = tiny_config(tmp_path / "run", CORPUS, **elastic)
    return replace(config, run=replace(config.run, steps=1_000_000), cluster=ClusterConfig(workers=WORKERS))


@contextmanager
def full_run(tmp_path: Path, **elastic: Any) -> Iterator[FullRun]:
    run = FullRun(endless(tmp_path, **elastic))
    try:
        yield run
        ray.get(run.coordinator.close.remote(), timeout=60)
    finally:
        ray.kill(run.coordinator)


def add_node(cluster: Cluster, cpus: int) -> Any:
    return cluster.add_node(num_cpus=cpus, object_store_memory=80 * 1024 * 1024, include_dashboard=False)


@pytest.mark.timeout(900)
def test_uneven_nodes_a_hung_worker_and_a_lost_coordinator(cluster: Cluster, tmp_path: Path, until: Until) -> None:
    add_node(cluster, 2), add_node(cluster, 1)
    with full_run(tmp_path, heartbeat_timeout_s=3.0) as run:
        until(lambda: run.steps() >= 5 and run.world() == WORKERS, "three workers on two nodes train", 240.0)
        first = run.members()
        assert sorted([node for _, node, _ in first].count(n) for n in {node for _, node, _ in first}) == [1, 2]

        worker, _, pid = first[1]
        os.kill(pid, signal.SIGSTOP)
        until(lambda: bool(run.events("worker_evicted")), "the hung worker is evicted")
        evicted = run.events("worker_evicted")[0]
        assert evicted["worker"] == worker
        at = run.steps()
        until(lambda: run.steps() >= at + 3, "the others train on")
        os.kill(pid, signal.SIGCONT)
        until(lambda: run.world() == WORKERS and run.steps() >= at + 10, "it is back and trains", 240.0)
        assert (worker, pid) in [(member, pid) for member, _, pid in run.members()]
        assert [event["worker"] for event in run.events("worker_readmitted")] == [worker]

        old = ray.get(run.coordinator.pid.remote())
        os.kill(old, signal.SIGKILL)
        at = run.steps()
        until(
            lambda: run.status()["phase"] == "running" and run.status()["step"] >= at + 10,
            "another coordinator serves",
            240.0,
        )
        assert ray.get(run.coordinator.pid.remote()) != old
        assert {first[0][2], first[2][2]} <= {pid for _, _, pid in run.members()}, "survivors keep their processes"
        run.finish()


@pytest.mark.timeout(900)
def test_a_drained_node_is_left_before_it_dies(cluster: Cluster, tmp_path: Path, until: Until) -> None:
    nodes = [add_node(cluster, 1) for _ in range(WORKERS)]
    with full_run(tmp_path) as run:
        until(lambda: run.steps() >= 5 and run.world() == WORKERS, "three workers train", 240.0)
        leaving, coordinator = nodes[0], ray.get(run.coordinator.pid.remote())
        worker, _, _ = next(m for m in run.members() if m[1] == leaving.node_id)
        assert drain_node(cluster.address, leaving.node_id, 30.0)
        until(lambda: run.world() == WORKERS - 1, "two workers train on")
        assert worker not in [member for member, _, _ in run.members()]
        assert not run.events("worker_lost"), "the worker left by a planned view"
        cluster.remove_node(leaving, allow_graceful=False)
        at = run.steps()
        until(lambda: run.steps() >= at + 5, "the node's end disturbs nobody")
        assert run.world() == WORKERS - 1
        assert ray.get(run.coordinator.pid.remote()) == coordinator, "it was on the driver's node"
        run.finish()


@pytest.mark.timeout(900)
def controllers() -> list[psutil.Process]:
    return [p for p in psutil.Process().children(recursive=True) if CONTROLLER in " ".join(p.cmdline())]


@pytest.mark.timeout(900)
def test_workers_outlive_their_controller_and_another_one_replaces_who_dies_meanwhile(
    cluster: Cluster, tmp_path: Path, until: Until
) -> None:
    add_node(cluster, WORKERS)
    with full_run(tmp_path) as run:
        until(lambda: run.steps() >= 5 and run.world() == WORKERS, "three workers train", 240.0)
        first = run.members()
        (controller,) = controllers()
        controller.kill()
        os.kill(first[1][2], signal.SIGKILL)
        at = run.steps()
        until(lambda: run.steps() >= at + 5, "two workers train on", 240.0)
        until(lambda: run.world() == WORKERS, "another controller starts a third one", 240.0)
        assert [p.pid for p in controllers()] != [controller.pid]
        pids = {pid for _, _, pid in run.members()}
        assert {first[0][2], first[2][2]} < pids
        assert first[1][2] not in pids
        assert len(placements(run.name)) == WORKERS, "the dead worker's was returned"
        run.finish()
        until(lambda: not worker_names(run.name) and not placements(run.name), "nothing is left behind")


@pytest.mark.timeout(900)
def test_a_new_start_takes_the_run_over_from_one_that_lives(cluster: Cluster, tmp_path: Path, until: Until) -> None:
    """As where a driver stood still until its lease had lapsed: what it left saves its state, and ends."""
    add_node(cluster, WORKERS)
    config = endless(tmp_path)
    assert not take_over(look(config)), "there is no run yet"
    run = FullRun(config)
    until(lambda: run.steps() >= 5 and run.world() == WORKERS, "three workers train", 240.0)
    copied = replace(look(config), run_dir=tmp_path / "copy")
    assert not take_over(copied), "a copy of the run directory is another run"
    assert take_over(look(config))
    assert not worker_names(run.name)
    assert not placements(run.name)
    with pytest.raises(ValueError, match="Failed to look up actor"):
        ray.get_actor(run.name, namespace=NAMESPACE)
    found = look(config)
    assert found.newest is not None
    assert found.newest.step == run.steps()
    assert not take_over(found)
    run.thread.join(120)
    assert not run.thread.is_alive()
    successor = actor_name(run.run, config.run.dir, "2")
    coordinator = start_coordinator(config, successor, secrets.token_hex(16))
    ray.get(coordinator.address.remote(), timeout=120)
    end_run(run.name)  # as the driver does that wakes up
    assert coordinators(config.run.dir) == coordinators(config.run.dir, run.run) == [successor]
    assert ray.get(coordinator.status.remote(), timeout=60)["phase"] not in OVER
    ray.kill(coordinator)


class Hasty(ElasticWorker):
    """A worker without patience."""

    uncollected_s = 1.0


@pytest.mark.timeout(300)
def test_a_worker_that_nobody_asks_for_ends_itself_and_returns_its_room(cluster: Cluster, until: Until) -> None:
    add_node(cluster, 1)
    name = new_name("nobody")
    room = placement_group([{"CPU": 1}], name=name, lifetime="detached")
    assert room.wait(60)
    actor: Any = ray.remote(num_cpus=1)(Hasty)
    options = {"name": name, "namespace": NAMESPACE, "lifetime": "detached"}
    where = PlacementGroupSchedulingStrategy(room)
    worker = actor.options(**options, scheduling_strategy=where).remote(placed_s=time.time())
    ray.get(worker.get_metadata.remote())
    assert worker_names("nobody") == [name]
    until(lambda: not worker_names("nobody") and not placements("nobody"), "its end")


@pytest.mark.timeout(300)
def test_what_is_left_of_a_run_can_be_ended_by_its_name(cluster: Cluster, until: Until) -> None:
    other = placement_group([{"CPU": 1}], name=new_name("other"), lifetime="detached")
    placement_group([{"CPU": 1}], name=new_name("mine"), lifetime="detached")  # pending: there is no room
    assert len(placements("mine")) == 1
    end_all("mine")
    until(lambda: not placements("mine"), "its end")
    assert [room.id for room in placements("other").values()] == [other.id]
    end_all("other")


@pytest.mark.timeout(900)
def test_a_coordinator_that_finds_its_files_unreadable_is_started_until_it_can_read_them(
    cluster: Cluster, tmp_path: Path, until: Until
) -> None:
    """Ray gives an actor up for good whose making raises, so its process has to end instead."""
    add_node(cluster, WORKERS)
    with full_run(tmp_path) as run:
        until(lambda: run.steps() >= 5 and run.world() == WORKERS, "three workers train", 240.0)
        coordinator, pids = ray.get(run.coordinator.pid.remote()), {pid for _, _, pid in run.members()}
        metrics, away = tmp_path / "run" / "metrics.jsonl", tmp_path / "run" / "away"
        metrics.rename(away)
        metrics.mkdir()
        os.kill(coordinator, signal.SIGKILL)
        time.sleep(10.0)  # it fails a few times meanwhile
        with pytest.raises(ray.exceptions.GetTimeoutError):
            ray.get(run.coordinator.pid.remote(), timeout=1)
        metrics.rmdir()
        away.rename(metrics)
        at = run.steps()
        until(
            lambda: run.status()["phase"] == "running" and run.status()["step"] >= at + 10,
            "another coordinator serves",
            240.0,
        )
        assert pids == {pid for _, _, pid in run.members()}, "workers keep their processes"
        run.finish()
