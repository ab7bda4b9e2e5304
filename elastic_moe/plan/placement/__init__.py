"""Placement of experts in the slots of ranks."""

from elastic_moe.plan.placement.copies import Copies, copies_of, expected_nodes, nodes_of
from elastic_moe.plan.placement.placement import default_slots, plan_placement
from elastic_moe.plan.placement.replicas import EMPTY
from elastic_moe.plan.values import LOST, Placement, Topology

__all__ = [
    "EMPTY", "LOST", "Copies", "Placement", "Topology", "copies_of", "default_slots", "expected_nodes", "nodes_of",
    "plan_placement",
]  # fmt: skip
