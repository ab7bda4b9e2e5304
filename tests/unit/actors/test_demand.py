"""What a run lacks, what an autoscaler answers, and when waiting for the first worker can never end."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
from ray.autoscaler._private.autoscaler import AutoscalerSummary
from ray.autoscaler._private.node_provider_availability_tracker import (
    NodeAvailabilityRecord,
    NodeAvailabilitySummary,
    UnavailableNodeInformation,
)
from ray.core.generated import autoscaler_pb2

from elastic_moe.actors.autoscaler import ABSENT, THERE, UNKNOWN, Autoscaler, of_version_1, of_version_2
from elastic_moe.actors.demand import Demand, EndlessWait, never_placed, patience
from elastic_moe.config.schema import ClusterConfig

NEED = {"CPU": 1.0, "GPU": 2.0}
NODE = {"CPU": 8.0, "GPU": 1.0}
NOBODY, SOMEBODY = Autoscaler(ABSENT), Autoscaler(THERE)
WAITING = {"phase": "waiting", "workers": 0}


def test_what_is_missing() -> None:
    assert "controller starts" in Demand(0, 0, NEED, [NODE], NODE, NOBODY).sentence()
    assert Demand(2, 0, NEED, [NODE], NODE, NOBODY).sentence() == "Ray has room for all others, and they start"
    assert Demand(4, 3, NEED, [NODE, NODE], NODE, NOBODY).sentence() == (
        "3 more are asked of Ray, each with CPU 1, GPU 2: none of its 2 nodes is so large (at most CPU 8, GPU 1), "
        "only a new node helps, and no autoscaler is there"
    )
    assert Demand(1, 1, {"CPU": 1.0}, [NODE], {}, Autoscaler(THERE, coming=2)).sentence() == (
        "1 more are asked of Ray, each with CPU 1: its 1 nodes are large enough, but others use them (free: CPU 0); "
        "the autoscaler starts 2 nodes"
    )


def summary(**known: Any) -> bytes:
    """A status as version 1 of Ray's monitor writes it."""
    empty: dict[str, Any] = {"pending_nodes": [], "pending_launches": {}, "failed_nodes": []}
    summary = AutoscalerSummary(**({"active_nodes": {}, "idle_nodes": None} | empty | known))
    return json.dumps({"autoscaler_report": asdict(summary), "time": 1.0}).encode()


def test_a_cluster_of_which_ray_only_reports_has_no_autoscaler() -> None:
    alive = summary(active_nodes={"node_aa": 1, "node_bb": 1})
    assert of_version_1(alive, ["aa", "bb", "cc"]).presence == ABSENT
    assert of_version_1(alive, ["aa"]).presence == THERE, "a node type that only looks so"
    assert of_version_1(summary(active_nodes={"ray.head.default": 1}), ["aa"]).presence == THERE
    assert of_version_1(summary(), ["aa"]).presence == THERE, "nothing is known"
    for told in (None, b'{"time": 1.0}', b'{"autoscaler_report": null}'):
        assert of_version_1(told, ["aa"]).presence == UNKNOWN


def test_what_version_1_answers() -> None:
    coming = of_version_1(
        summary(active_nodes={"head": 1}, pending_launches={"gpu": 2}, pending_nodes=[("ip", "gpu", "setting-up")]),
        ["aa"],
    )
    assert coming.sentence(NEED) == "the autoscaler starts 3 nodes"
    reason = UnavailableNodeInformation("InsufficientInstanceCapacity", "none left")
    lacks = NodeAvailabilitySummary({"gpu": NodeAvailabilityRecord("gpu", False, 1.0, reason)})
    failed = of_version_1(summary(active_nodes={"head": 1}, node_availability_summary=lacks), ["aa"])
    assert failed.sentence(NEED) == ("the autoscaler could not start a node: InsufficientInstanceCapacity: none left")
    assert of_version_1(summary(failed_nodes=[("ip", "gpu")]), []).sentence(NEED).endswith("of type gpu failed")


def test_what_version_2_answers() -> None:
    reply: Any = autoscaler_pb2.GetClusterStatusReply()  # pyright: ignore[reportAttributeAccessIssue]
    assert of_version_2(reply.SerializeToString()).sentence(NEED) == "the autoscaler has started no node for it yet"
    gang = reply.autoscaling_state.infeasible_gang_resource_requests.add()
    gang.requests.add().resources_bundle.update({"CPU": 1.0, "GPU": 2.0})
    assert "cannot start a node for it now" in of_version_2(reply.SerializeToString()).sentence(NEED)
    small = {"CPU": 2.0}
    assert "no node for it yet" in of_version_2(reply.SerializeToString()).sentence(small)
    reply.autoscaling_state.pending_instance_requests.add(ray_node_type_name="gpu", count=1)
    told = of_version_2(reply.SerializeToString())
    assert told.sentence(small) == "the autoscaler starts 1 node"
    assert "cannot start a node for it now" in told.sentence(NEED)
    assert not told.never_brings(NEED), "limits may be raised, and other runs may end"


def test_node_types_that_are_all_too_small() -> None:
    small = Autoscaler(THERE, node_types=[{"CPU": 64.0}, {"CPU": 1.0, "GPU": 1.0}])
    assert small.never_brings(NEED)
    assert small.sentence(NEED) == "the autoscaler has no node type that is large enough"
    assert not Autoscaler(THERE, node_types=[NODE, NODE | {"GPU": 8.0}]).never_brings(NEED)
    assert not Autoscaler(UNKNOWN).never_brings(NEED)


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def ends_after(
    patience_s: float | None, ask: Callable[[float], Demand], status: Callable[[float], dict[str, Any]]
) -> float | None:
    """Seconds after which a run gives up, of the first thousand."""
    clock = Clock()
    waits = EndlessWait(lambda: ask(clock.now_s), patience_s, clock)
    for second in range(1000):
        clock.now_s = float(second)
        if waits.look(status(clock.now_s)) is not None:
            return clock.now_s
    return None


def too_small(_now_s: float) -> Demand:
    return Demand(4, 3, NEED, [NODE], NODE, NOBODY)


def test_a_run_gives_up_once_its_patience_is_over() -> None:
    assert ends_after(300.0, too_small, lambda _: WAITING) == 300.0
    assert ends_after(0.0, too_small, lambda _: WAITING) == 0.0
    assert ends_after(None, too_small, lambda _: WAITING) is None


@pytest.mark.parametrize("size", [NODE | {"GPU": 2.0}])
def test_a_run_goes_on_waiting_while_there_is_hope(size: dict[str, float]) -> None:
    others = {
        "a node is large enough": Demand(4, 3, NEED, [NODE, size], {}, NOBODY),
        "an autoscaler is there": Demand(4, 3, NEED, [NODE], {}, SOMEBODY),
        "nothing is known of one": Demand(4, 3, NEED, [NODE], {}, Autoscaler(UNKNOWN)),
        "nothing is asked yet": Demand(0, 0, NEED, [NODE], {}, NOBODY),
    }
    for case, demand in others.items():
        assert ends_after(10.0, lambda _, demand=demand: demand, lambda _: WAITING) is None, case
    had = {"phase": "waiting", "workers": 1}
    assert ends_after(10.0, too_small, lambda now_s: had if now_s == 5 else WAITING) is None, "it had a worker"
    assert ends_after(10.0, too_small, lambda _: {"phase": "running", "workers": 0}) is None

    def node_for_a_while(now_s: float) -> Demand:
        return others["a node is large enough"] if 8 <= now_s < 10 else too_small(now_s)

    assert ends_after(10.0, node_for_a_while, lambda _: WAITING) == 20.0, "it begins anew"


def test_a_head_that_does_not_answer_ends_nothing() -> None:
    def away(now_s: float) -> Demand:
        raise TimeoutError

    assert ends_after(10.0, away, lambda _: WAITING) is None


def test_the_sentence_names_what_is_too_small() -> None:
    assert never_placed(too_small(0.0)) == (
        "cluster.gpus_per_worker=2: no node can ever hold a worker; the 1 nodes of the cluster have at most CPU 8, "
        "GPU 1 each, and no autoscaler is there"
    )
    split = Demand(1, 1, NEED, [{"CPU": 8.0}, {"GPU": 8.0}], {}, NOBODY)
    assert never_placed(split).startswith("cluster.cpus_per_worker=1 and cluster.gpus_per_worker=2: no node")


def test_only_a_cluster_of_others_gets_nodes() -> None:
    assert patience(ClusterConfig(kind="local")) == 0.0
    assert patience(ClusterConfig(kind="address", nodes_timeout_s=60.0)) == 60.0
    assert patience(ClusterConfig(kind="address", nodes_timeout_s=0.0)) is None
