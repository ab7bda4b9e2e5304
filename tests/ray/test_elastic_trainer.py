"""The elastic trainer on a real cluster with a trivial train function: workers die and join, the others never stop."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.train import RunConfig, ScalingConfig
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback, WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.worker_group.poll import WorkerStatus

from elastic_moe.actors.controller import ElasticTrainer
from elastic_moe.actors.link import NAMESPACE, TrainNames, actor_name
from elastic_moe.actors.worker_group import classify_exit
from elastic_moe.errors import UserError


class StubCoordinator:
    """What the controller needs of a coordinator."""

    def __init__(self) -> None:
        self._status: dict[str, Any] = {"phase": "running", "step": 0}
        self._events: list[dict[str, Any]] = []

    def status(self) -> dict[str, Any]:
        return self._status

    def set(self, **changes: Any) -> None:
        self._status.update(changes)

    def submit(self, event: dict[str, Any]) -> None:
        self._events.append(event)

    def events(self) -> list[dict[str, Any]]:
        return self._events


def _train(config: dict[str, Any]) -> dict[str, str]:
    """Says that it lives; ends as the files in its directory say."""
    import os
    import time
    from pathlib import Path

    import ray

    root = Path(config["dir"])
    (root / f"alive-{os.getpid()}").write_text(ray.get_runtime_context().get_actor_id())
    while not (root / "end").exists():
        if (root / f"raise-{os.getpid()}").exists():
            raise UserError("data.corpus: no such file")
        if (root / f"crash-{os.getpid()}").exists():
            raise KeyError("a bug")
        time.sleep(0.05)
    return {"ended": "finished"}


@dataclass
class Run:
    """A run in a thread."""

    root: Path
    coordinator: Any
    last_save_s: float = 600.0
    thread: threading.Thread = field(init=False)
    result: Any = None
    error: BaseException | None = None

    def start(self, max_workers: int) -> None:
        trainer = ElasticTrainer(
            _train,
            train_loop_config={"dir": str(self.root)},
            coordinator=actor_name("stub"),
            names=TrainNames("stub", "stub"),
            last_save_s=self.last_save_s,
            scaling_config=ScalingConfig(num_workers=max_workers, resources_per_worker={"CPU": 1}),
            run_config=RunConfig(name="stub", storage_path=str(self.root / "storage")),
        )

        def fit() -> None:
            try:
                self.result = trainer.fit()
            except BaseException as error:  # noqa: BLE001 - handed to the test
                self.error = error

        self.thread = threading.Thread(target=fit, daemon=True)
        self.thread.start()

    def pids(self) -> set[int]:
        return {int(path.name.split("-")[1]) for path in self.root.glob("alive-*") if path.read_text()}

    def finish(self) -> None:
        ray.get(self.coordinator.set.remote(phase="finished"))
        (self.root / "end").touch()
        self.thread.join(120)
        assert not self.thread.is_alive()


@pytest.fixture
def run(cluster: Cluster, tmp_path: Path) -> Run:
    coordinator = ray.remote(num_cpus=0)(StubCoordinator).options(name=actor_name("stub"), namespace=NAMESPACE).remote()
    ray.get(coordinator.status.remote())
    return Run(tmp_path, coordinator)


@pytest.mark.timeout(600)
def test_workers_die_and_join_while_others_live(run: Run, cluster: Cluster, until: Callable[..., None]) -> None:
    cluster.add_node(num_cpus=2, object_store_memory=80 * 1024 * 1024)
    run.start(max_workers=3)
    until(lambda: len(run.pids()) == 2, "two of three workers run although the third has no room")
    first, second = sorted(run.pids())

    os.kill(second, signal.SIGKILL)
    until(lambda: len(run.pids()) == 3, "a replacement runs")
    until(lambda: ray.get(run.coordinator.events.remote()), "the report of the loss")
    lost = ray.get(run.coordinator.events.remote())
    assert [(event["event"], event["pid"]) for event in lost] == [("worker_lost", second)]
    assert lost[0]["worker"] == (run.root / f"alive-{second}").read_text()
    os.kill(first, 0)

    node = cluster.add_node(num_cpus=1, object_store_memory=80 * 1024 * 1024)
    until(lambda: len(run.pids()) == 4, "the third worker runs once there is room")
    cluster.remove_node(node, allow_graceful=False)
    until(lambda: len(ray.get(run.coordinator.events.remote())) == 2, "the lost node's worker is reported")
    os.kill(first, 0)
    assert run.thread.is_alive()

    run.finish()
    assert run.error is None
    assert run.result.return_value == {"ended": "finished"}


@pytest.mark.timeout(400)
def test_user_error_ends_the_run_and_a_bug_does_not(run: Run, cluster: Cluster, until: Callable[..., None]) -> None:
    cluster.add_node(num_cpus=2, object_store_memory=80 * 1024 * 1024)
    run.start(max_workers=2)
    until(lambda: len(run.pids()) == 2, "two workers")
    first, second = sorted(run.pids())
    (run.root / f"crash-{second}").touch()
    until(lambda: len(run.pids()) == 3, "the crashed worker is replaced")
    os.kill(first, 0)

    third = next(iter(run.pids() - {first, second}))
    (run.root / f"raise-{first}").touch()
    until(lambda: "fail" in [event["event"] for event in ray.get(run.coordinator.events.remote())], "it is given up")
    events = ray.get(run.coordinator.events.remote())
    assert "data.corpus: no such file" in next(event["reason"] for event in events if event["event"] == "fail")
    os.kill(third, 0)
    assert run.thread.is_alive(), "the other worker saves its state"
    ray.get(run.coordinator.set.remote(phase="failed"))
    run.thread.join(120)
    assert not run.thread.is_alive()
    assert "data.corpus: no such file" in str(run.error)
    assert isinstance(run.error.worker_failures[0], UserError)  # type: ignore[union-attr]


@pytest.mark.timeout(400)
def test_the_last_save_is_waited_for_with_a_bound(run: Run, cluster: Cluster, until: Callable[..., None]) -> None:
    cluster.add_node(num_cpus=1, object_store_memory=80 * 1024 * 1024)
    run.last_save_s = 2.0
    run.start(max_workers=1)
    until(lambda: len(run.pids()) == 1, "a worker")
    (run.root / f"raise-{next(iter(run.pids()))}").touch()
    run.thread.join(120)
    assert "data.corpus: no such file" in str(run.error)


@pytest.mark.timeout(400)
def test_coordinator_gives_up(run: Run, cluster: Cluster, until: Callable[..., None]) -> None:
    run.start(max_workers=2)  # no node at all: the run waits
    ray.get(run.coordinator.set.remote(phase="failed", reason="too few workers for 3600 s"))
    run.thread.join(120)
    assert "too few workers" in str(run.error)


def test_judge() -> None:
    assert classify_exit("w", "n", 1, WorkerStatus(running=True)) is None
    returned = classify_exit("w", "n", 1, WorkerStatus(running=False, return_value=3))
    assert returned is not None
    assert returned.value == 3
    assert returned.error is None
    raised = classify_exit(
        "w", "n", 1, WorkerStatus(running=False, error=UserExceptionWithTraceback(KeyError("k"), ""))
    )
    assert raised is not None
    assert isinstance(raised.error, KeyError)
    assert not raised.died
    dead = classify_exit(
        "w", "n", 1, WorkerStatus(running=False, error=WorkerHealthCheckFailedError("m", OSError("gone")))
    )
    assert dead is not None
    assert isinstance(dead.error, OSError)
    assert dead.died
