"""The rule of a router's balancing bias: a fixed move against the sign of the expert's excess load.

Source: Wang et al., auxiliary-loss-free load balancing (https://arxiv.org/abs/2408.15664).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from elastic_moe.optim.committed import CommittedStep
from elastic_moe.optim.unit_state import UnitState
from elastic_moe.types import Unit


def apply(units: Sequence[Unit], state: UnitState, grad: torch.Tensor | None, step: CommittedStep) -> None:
    """Move the bias of one MoE layer by `model.bias_update_speed`."""
    (unit,) = units
    assert unit.moe_layer is not None, f"{unit.name} belongs to no MoE layer"
    apply_bias(state, torch.from_numpy(step.load_LE[unit.moe_layer]), step.model.bias_update_speed)


@torch.no_grad()
def apply_bias(state: UnitState, load_E: torch.Tensor, speed: float) -> None:
    """Move a router bias against the load: up by `speed` for experts below the mean, down for those above.

    Args:
        state: the bias is `weight` [E].
        load_E: tokens that each expert received in this step, over the whole global batch.
        speed: size of one move.
    """
    load = load_E.to(device=state.weight.device, dtype=torch.float64)
    direction = torch.sign(load.sum() - load * load.numel())  # sign(mean - load), exact for whole numbers
    state.weight.add_(direction.to(state.weight.dtype) * speed)
