"""The coordinator actor: its address, its records, and that it comes back after it was killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from elastic_moe.actors.driver import start_coordinator
from elastic_moe.actors.link import CoordinatorLink, Finder, actor_name, this_node
from elastic_moe.config.schema import ModelConfig, RunConfig, TrainConfig
from elastic_moe.runtime.coordinator_client import CoordinatorClient


@pytest.mark.timeout(400)
def test_comes_back_with_records_and_a_new_address(
    cluster: Cluster, tmp_path: Path, until: Callable[..., None]
) -> None:
    config = TrainConfig(
        run=RunConfig(dir=str(tmp_path), steps=5), model=ModelConfig(num_layers=2, num_experts=4, experts_per_token=2)
    )
    name = actor_name("back")
    actor = start_coordinator(config, name, "token")
    find = Finder(name)
    until(lambda: find() is not None, "the coordinator's address")
    address = find()
    assert address is not None

    line = CoordinatorClient(find, "token", "w1", "n1", os.getpid())
    line.start()
    try:
        record: dict[str, Any] = {"step": 1, "loss": 2.0, "generation": 1}
        line.record(record)
        until(lambda: len(ray.get(actor.records_since.remote(0))) == 1, "the record arrived")
        os.kill(ray.get(actor.pid.remote()), signal.SIGKILL)
        until(lambda: find() not in (None, address), "a new address")
        assert [r["step"] for r in ray.get(actor.records_since.remote(0))] == [1]
        line.record({"step": 2, "loss": 1.5, "generation": 1})
        until(lambda: len(ray.get(actor.records_since.remote(1))) == 1, "the line found the new coordinator")

        link = CoordinatorLink(name)
        link.submit({"event": "stop", "reason": "test"})
        until(lambda: "phase" in link.poll(), "status")
    finally:
        line.close()
        ray.get(actor.close.remote())
        ray.kill(actor)
    assert find() is None


class Somewhere:
    """An actor that takes no resources, as the coordinator."""

    def node(self) -> str:
        return ray.get_runtime_context().get_node_id()


@pytest.mark.timeout(400)
def test_an_actor_is_on_its_drivers_node_whoever_joins(cluster: Cluster) -> None:
    here = ray.get_runtime_context().get_node_id()
    for _ in range(3):  # a node that joined a moment ago knows no other one, and Ray asks any node to place an actor
        cluster.add_node(num_cpus=1, object_store_memory=80 * 1024 * 1024, include_dashboard=False)
        actors = [ray.remote(Somewhere).options(num_cpus=0, label_selector=this_node()).remote() for _ in range(6)]
        assert {ray.get(actor.node.remote()) for actor in actors} == {here}
