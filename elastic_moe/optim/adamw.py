"""AdamW on flat fp32 vectors, in place, the same bits on every machine.

Twins apply the same update to the same numbers and must stay equal bit for bit, though their vectors lie differently in
memory and their CPUs may have different vector widths. So every operation here rounds once (IEEE add, multiply, divide,
square root): fused kernels (lerp, addcmul, addcdiv) may contract to FMA in the vector body and not in the tail.
Source: Loshchilov and Hutter (arXiv 1711.05101), as torch.optim.AdamW; the bias rule is arXiv 2408.15664.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from elastic_moe.config.schema import OptimConfig

CHUNK = 32768  # elements per pass: five fp32 vectors of this length stay in the second-level cache


@dataclass(slots=True)
class UnitState:
    """State of one unit, or of several that lie one after another.

    Attributes:
        weight: fp32 [n] master weight.
        m, v: fp32 [n] first and second moment; empty for a router bias.
    """

    weight: torch.Tensor
    m: torch.Tensor
    v: torch.Tensor


@torch.no_grad()
def apply_adamw(state: UnitState, grad: torch.Tensor, step: int, lr: float, cfg: OptimConfig, decay: bool) -> None:
    """One AdamW update in place.

    Args:
        state: weight and moments, all as long as `grad`.
        grad: fp32 [n] gradient, already averaged and clipped; left as it is.
        step: number of this update, from 1.
        lr: learning rate of this step.
        cfg: betas, eps, weight decay.
        decay: whether weight decay applies.
    """
    assert step >= 1, "steps count from 1"
    keep = 1.0 - lr * cfg.weight_decay if decay else 1.0
    step_size = lr / (1.0 - cfg.beta1**step)
    root_correction = math.sqrt(1.0 - cfg.beta2**step)
    chunks = zip(*(tensor.split(CHUNK) for tensor in (state.weight, state.m, state.v, grad)), strict=True)
    for weight, m, v, g in chunks:
        if keep != 1.0:
            weight.mul_(keep)
        m.mul_(cfg.beta1).add_(g * (1.0 - cfg.beta1))
        v.mul_(cfg.beta2).add_((g * g).mul_(1.0 - cfg.beta2))
        denominator = v.sqrt().div_(root_correction).add_(cfg.eps)
        weight.sub_((m * step_size).div_(denominator))


@torch.no_grad()
def apply_bias(state: UnitState, load_E: torch.Tensor, speed: float) -> None:
    """Move a router bias against the load: up by `speed` for experts below the mean, down for those above.

    Args:
        state: the bias is `weight` [E].
        load_E: tokens each expert got in this step, over the whole global batch.
        speed: size of one move.
    """
    load = load_E.to(device=state.weight.device, dtype=torch.float64)
    direction = torch.sign(load.sum() - load * load.numel())  # sign(mean - load), exact for whole numbers
    state.weight.add_(direction.to(state.weight.dtype) * speed)
