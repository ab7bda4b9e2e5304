"""How many copies of each expert there are: about one, some, one on each node, or one on every rank.

With a copy everywhere a rank computes its own rows, and what travels are the experts: gradients to their primaries, and
weights back to the ranks that do not mirror them. With few copies it is the rows, to their experts and back, in both
passes. With a copy on each node, rows travel in their node, and between nodes only the experts. `auto` takes what moves
fewer bytes. The more tokens a step has, and the smaller the experts are, the sooner many copies are the better choice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from elastic_moe.config.schema import TrainConfig
from elastic_moe.types import View

ROOM_BYTES = 2 << 30  # of a worker, for its experts and their gradients; `all` and `node` take more where there is more
JOURNEYS = 4  # of a routed row: to its expert and back, forward and backward
FP32, BF16 = 4, 2


class Copies(NamedTuple):
    """Copies of each expert.

    Attributes:
        number: of them; where `in_nodes` is true, on the ranks of one node.
        in_nodes: each node has copies of its own, and rows stay in their node.
    """

    number: int
    in_nodes: bool = False


def copies_of(config: TrainConfig, ranks_N: Sequence[int]) -> Copies:
    """Copies of each expert.

    Args:
        config: wishes, and sizes of what would travel.
        ranks_N: active ranks of each node that has any.
    """
    wanted, ranks = config.balance.copies, sum(ranks_N)
    nodes = len(ranks_N) > 1
    if wanted == "all" or ranks == 1 or (wanted == "node" and nodes and max(ranks_N) == 1):
        return Copies(ranks)
    if wanted == "node":
        return Copies(1, nodes and _nodes_hold_all(config, ranks_N))
    if wanted != "auto":
        return Copies(min(int(wanted), ranks))
    if config.elastic.reproducible:
        return Copies(1)  # exact sums are computed expert by expert anyway
    if _pays(config, ranks, ranks, 1):
        return Copies(ranks)
    per_node = min(ranks_N)
    in_nodes = nodes and max(ranks_N) > 1 and _nodes_hold_all(config, ranks_N)
    return Copies(1, in_nodes and _pays(config, ranks, len(ranks_N), per_node))


def nodes_of(view: View) -> list[int]:
    """Active ranks of each node of a view that has any."""
    return list(Counter(view.members[rank].node for rank in view.active_ranks).values())


def expected_nodes(config: TrainConfig, workers: int) -> list[int]:
    """Workers of each node before there is one, for an estimate.

    On a cluster that is there, each has a node of its own: that is where it needs the most memory.
    """
    cluster = config.cluster
    per_node = {"local": workers, "simulated": min(cluster.workers_per_node, workers)}.get(cluster.kind, 1)
    whole, rest = divmod(workers, per_node)
    return [per_node] * whole + ([rest] if rest else [])


def _nodes_hold_all(config: TrainConfig, ranks_N: Sequence[int]) -> bool:
    """Whether the run's limit of slots allows all experts on each node."""
    limit = config.elastic.slots_per_worker or config.model.num_experts
    return min(ranks_N) * limit >= config.model.num_experts


def _pays(config: TrainConfig, ranks: int, places: int, ranks_per_place: int) -> bool:
    """Whether copies in so many places, each on so many ranks, fit, and move fewer bytes from place to place than rows
    would.
    """
    model, data = config.model, config.data
    experts = model.num_experts * model.num_moe_layers * 3 * model.hidden_size * model.expert_hidden / ranks_per_place
    rows = data.global_batch * data.seq_len / ranks * model.experts_per_token * model.num_moe_layers
    without_mirror = max(0, places - 1 - config.elastic.redundancy) / (places - 1)  # of the places without the primary
    computed, gradient = (BF16 if kind == "bf16" else FP32 for kind in (config.precision, config.reduce_precision))
    fits = FP32 * 2 * experts <= ROOM_BYTES
    moved = (gradient + without_mirror * computed) * experts
    return fits and moved <= JOURNEYS * rows * model.hidden_size * computed
