"""How many copies of each expert there are: about one, some, or one on every rank, where rows need not travel at all.

With a copy everywhere a rank computes its own rows, and what travels are the experts: gradients to their primaries, and
weights back to the ranks that do not mirror them. With few copies it is the rows, to their experts and back, in both
passes. `auto` takes what moves fewer bytes. The more tokens a step has, and the smaller the experts are, the sooner
copies everywhere are the better choice.
"""

from __future__ import annotations

from elastic_moe.config.schema import TrainConfig

ROOM_BYTES = 2 << 30  # of a worker, for all experts and their gradients; `all` takes more where there is more
JOURNEYS = 4  # of a routed row: to its expert and back, forward and backward
FP32 = 4


def copies_of(config: TrainConfig, ranks: int) -> int:
    """Copies of each expert on so many ranks; `ranks` where every rank has one."""
    wanted = config.balance.copies
    if wanted not in ("auto", "all"):
        return min(int(wanted), ranks)
    return ranks if wanted == "all" or ranks == 1 or _everywhere_pays(config, ranks) else 1


def _everywhere_pays(config: TrainConfig, ranks: int) -> bool:
    """Whether copies on every rank fit, and move fewer bytes than rows would."""
    model, data = config.model, config.data
    experts = model.num_experts * model.num_moe_layers * 3 * model.hidden_size * model.expert_hidden
    if config.elastic.reproducible or FP32 * 2 * experts > ROOM_BYTES:
        return False  # exact sums are computed expert by expert anyway
    rows = data.global_batch * data.seq_len / ranks * model.experts_per_token * model.num_moe_layers
    without_mirror = max(0, ranks - 1 - config.elastic.redundancy) / (ranks - 1)  # of the ranks that are no primary
    return (1 + without_mirror) * experts <= JOURNEYS * rows * model.hidden_size
