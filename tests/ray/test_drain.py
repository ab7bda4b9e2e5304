"""Nodes that drain or die become events once; and Ray's real drain call is last."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from elastic_moe.actors.node_watcher import NodeSnapshot, NodeWatcher, node_events


def test_node_events() -> None:
    events, last = node_events(NodeSnapshot(), {}, ["a", "b"], 100.0, 30.0)
    assert events == []
    events, last = node_events(last, {"a": 110_000, "b": 0, "other": 1}, ["a", "b"], 100.0, 30.0)
    assert events == [
        {"event": "drain", "node": "a", "deadline_s": 10.0},
        {"event": "drain", "node": "b", "deadline_s": 30.0},
    ]
    events, last = node_events(last, {"a": 110_000, "b": 0}, ["a", "b"], 101.0, 30.0)
    assert events == []
    events, last = node_events(last, {"a": 105_000}, ["a"], 106.0, 30.0)
    assert events == [{"event": "node_lost", "node": "b"}, {"event": "drain", "node": "a", "deadline_s": 0.0}]


class Busy:
    """Occupies a node."""

    def ping(self) -> None:
        pass


def drain_node(address: str, node_id: str, seconds: float) -> bool:
    """What a cloud's spot notice does."""
    from ray.core.generated import autoscaler_pb2

    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    client = ray._raylet.GcsClient(address=address)
    accepted, _ = client.drain_node(node_id, reason, "", int((time.time() + seconds) * 1000))
    return accepted


@pytest.mark.timeout(400)
def test_real_drain_and_loss(cluster: Cluster, until: Callable[..., None]) -> None:
    node = cluster.add_node(num_cpus=1, object_store_memory=80 * 1024 * 1024)
    other = cluster.add_node(num_cpus=1, object_store_memory=80 * 1024 * 1024)
    busy = [ray.remote(Busy).options(num_cpus=1).remote() for _ in range(2)]  # an idle node that drains is gone at once
    ray.get([actor.ping.remote() for actor in busy])
    events: list[dict[str, Any]] = []
    watcher = NodeWatcher(events.append, default_deadline_s=30.0, interval_s=0.1)
    watcher.start()
    assert drain_node(cluster.address, node.node_id, 20.0)
    until(lambda: bool(events), "the drain is last")
    assert events[0]["event"] == "drain"
    assert events[0]["node"] == node.node_id
    assert 10.0 < events[0]["deadline_s"] <= 20.0
    cluster.remove_node(other, allow_graceful=True)
    del busy
    until(lambda: {"event": "node_lost", "node": other.node_id} in events, "the loss is last")
    watcher.close()
