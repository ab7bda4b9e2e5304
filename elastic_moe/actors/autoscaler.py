"""What Ray knows of an autoscaler: whether there is one, and what it answers to the demand for a worker.

Every head of Ray has a monitor. Without a cluster to scale, version 1 of it only reports: then each node has a type of
its own, with the node's id as its name. That is the one proof that nothing autoscales. Version 2 does not tell its node
types, and an autoscaler outside of Ray may be silent, so a run never takes those for absent.

The formats are those of Ray 2.60: ray/autoscaler/_private/monitor.py, ray/autoscaler/v2/autoscaler.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
from ray._private.state import state
from ray._raylet import GcsClient  # pyright: ignore[reportAttributeAccessIssue]
from ray.autoscaler._private.util import format_readonly_node_type
from ray.autoscaler.v2.utils import is_autoscaler_v2
from ray.core.generated import autoscaler_pb2
from ray.experimental.internal_kv import _internal_kv_get

Resources = Mapping[str, float]
ABSENT, THERE, UNKNOWN = "absent", "there", "unknown"
ANSWER_S = 5
MAX_REASON = 200  # characters of a reason that are told


@dataclass(frozen=True)
class Autoscaler:
    """An autoscaler as Ray tells of it.

    Attributes:
        presence: ABSENT, THERE or UNKNOWN.
        node_types: resources of each node type that may have nodes; None where Ray does not tell them.
        coming: nodes that it starts.
        failures: why nodes did not start.
        refused: resources of workers that it cannot bring a node for.
    """

    presence: str
    node_types: Sequence[Resources] | None = None
    coming: int = 0
    failures: Sequence[str] = ()
    refused: Sequence[Resources] = ()

    def never_brings(self, need: Resources) -> bool:
        """Whether it is sure that no node for a worker with these resources comes by itself."""
        if self.presence == ABSENT:
            return True
        return self.node_types is not None and not any(fits(need, kind) for kind in self.node_types)

    def sentence(self, need: Resources) -> str:
        """What it answers to the demand for such a worker."""
        if self.presence == ABSENT:
            return "no autoscaler is there"
        if self.presence == UNKNOWN:
            return "Ray does not tell whether an autoscaler is there"
        if self.never_brings(need):
            return "the autoscaler has no node type that is large enough"
        if any(same(need, refused) for refused in self.refused):
            return "the autoscaler cannot start a node for it now (its node types, or their limits)"
        if self.coming:
            return f"the autoscaler starts {self.coming} node{'' if self.coming == 1 else 's'}"
        if self.failures:
            return f"the autoscaler could not start a node: {self.failures[-1][:MAX_REASON]}"
        return "the autoscaler has started no node for it yet"


def fits(need: Resources, has: Resources) -> bool:
    """Whether a node with these resources can hold such a worker."""
    return all(has.get(name, 0) >= amount for name, amount in need.items())


def same(need: Resources, asked: Resources) -> bool:
    """Whether a request of Ray's is for such a worker; it has resources of Ray's own too, and none that are 0."""
    return all(asked.get(name, 0) == amount for name, amount in need.items())


def find_autoscaler(node_ids: Sequence[str]) -> Autoscaler:
    """Ask Ray. `node_ids` are those of all its nodes, dead ones too.

    Raises:
        Exception: Ray's head does not answer.
    """
    config = state.get_cluster_config()
    if config is not None and config.node_group_configs:
        kinds = [dict(group.resources) for group in config.node_group_configs if group.max_count]
        return Autoscaler(THERE, node_types=kinds)
    if is_autoscaler_v2(fetch_from_server=True):
        client: Any = GcsClient(ray.get_runtime_context().gcs_address)
        return of_version_2(client.get_cluster_status(timeout_s=ANSWER_S))
    return of_version_1(_internal_kv_get(DEBUG_AUTOSCALING_STATUS), node_ids)


def of_version_1(told: bytes | None, node_ids: Sequence[str]) -> Autoscaler:
    """The autoscaler behind a status that version 1 of Ray's monitor has left; None before its first one."""
    report: dict[str, Any] | None = json.loads(told).get("autoscaler_report") if told else None
    if report is None:
        return Autoscaler(UNKNOWN)
    types = {*report["active_nodes"], *report["pending_launches"], *(kind for _, kind, _ in report["pending_nodes"])}
    if types and types <= {format_readonly_node_type(node) for node in node_ids}:
        return Autoscaler(ABSENT)
    known = (report.get("node_availability_summary") or {}).get("node_availabilities") or {}
    reasons = [record["unavailable_node_information"] for record in known.values() if not record["is_available"]]
    return Autoscaler(
        THERE,
        coming=len(report["pending_nodes"]) + sum(report["pending_launches"].values()),
        failures=[f"{reason['category']}: {reason['description']}" for reason in reasons if reason]
        or [f"a node of type {kind} failed" for _, kind in report["failed_nodes"]],
    )


def of_version_2(told: bytes) -> Autoscaler:
    """The autoscaler behind the cluster status in which version 2 of Ray's monitor has reported."""
    reply: Any = autoscaler_pb2.GetClusterStatusReply.FromString(told)  # pyright: ignore[reportAttributeAccessIssue]
    report = reply.autoscaling_state
    refused = [request for gang in report.infeasible_gang_resource_requests for request in _bundles(gang)]
    return Autoscaler(
        THERE,
        coming=len(report.pending_instances) + sum(asked.count for asked in report.pending_instance_requests),
        failures=[f"{failed.ray_node_type_name}: {failed.reason}" for failed in report.failed_instance_requests],
        refused=[dict(request.resources_bundle) for request in refused],
    )


def _bundles(gang: Any) -> Sequence[Any]:
    """The requests of a placement group; Ray has two fields for them."""
    return gang.bundle_selectors[0].resource_requests if gang.bundle_selectors else gang.requests
