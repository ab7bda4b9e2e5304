"""The expert backend of a generation: with a dispatch between ranks, or without one where each has every expert."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from elastic_moe.config.schema import ModelConfig
from elastic_moe.model.backend import TrainableExperts
from elastic_moe.parallel.collectives.group import Group
from elastic_moe.parallel.everywhere import ExpertsEverywhere
from elastic_moe.parallel.expert_parallel import ExpertParallel
from elastic_moe.parallel.reproducible import Grid
from elastic_moe.plan.placement import Placement


def experts_of(
    group: Group,
    placement: Placement,
    cfg: ModelConfig,
    device: torch.device,
    speeds: Sequence[float] | None = None,
    grid: Grid | None = None,
    memory_limit: int = 0,
    by_node: bool = False,
) -> TrainableExperts:
    """The backend for this group. Arguments as in `ExpertParallel`.

    With exact sums, the computation is the same at every world size.
    """
    if placement.everywhere and grid is None:
        return ExpertsEverywhere(group, placement, cfg, device, memory_limit)
    return ExpertParallel(group, placement, cfg, device, speeds, grid, memory_limit, by_node)
