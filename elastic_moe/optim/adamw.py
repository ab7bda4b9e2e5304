"""AdamW on flat fp32 vectors, in place, the same bits on every CPU.

Twins apply the same update to the same numbers and must stay equal bit for bit. Their vectors lie differently in
memory, and their CPUs may have different vector widths. So every operation here rounds once (IEEE add, multiply,
divide, square root), on a GPU too, so twins may lie on both. One pass over memory does all: a compiled loop on a CPU
(`adamw_loop.py`), of which each thread takes a part, and a kernel of Triton on a GPU (`adamw_triton.py`). Where Triton
does not work, a GPU makes a few passes of torch; its fused kernels (lerp, addcmul, addcdiv) may contract to FMA.
Source: Loshchilov and Hutter (https://arxiv.org/abs/1711.05101), as in `torch.optim.AdamW`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from elastic_moe.config.schema import OptimConfig
from elastic_moe.model.has_triton import has_triton
from elastic_moe.optim.adamw_loop import update
from elastic_moe.optim.committed import CommittedStep
from elastic_moe.optim.unit_state import UnitState
from elastic_moe.types import Unit

SPAN = 1 << 18  # elements that are worth a thread of their own
DEVICE_CHUNK = 1 << 24  # on a GPU, whose launches cost more than its passes; bounds the temporaries


def apply(units: Sequence[Unit], state: UnitState, grad: torch.Tensor | None, step: CommittedStep) -> None:
    """One AdamW update of all the units; weight decay applies where the units say so."""
    assert grad is not None, "AdamW needs a gradient"
    apply_adamw(state, grad, step.step, step.lr, step.optim, units[0].decay)


@torch.no_grad()
def apply_adamw(state: UnitState, grad: torch.Tensor, step: int, lr: float, cfg: OptimConfig, decay: bool) -> None:
    """One AdamW update in place.

    Args:
        state: `weight`, and the first and second moment `m` and `v`; each fp32 [n].
        grad: fp32 [n] gradient, already averaged and clipped; left as it is.
        step: number of this update, from 1.
        lr: learning rate of this step.
        cfg: betas, eps and weight decay.
        decay: whether weight decay applies.
    """
    assert step >= 1, "steps count from 1"
    keep = 1.0 - lr * cfg.weight_decay if decay else 1.0
    step_size = lr / (1.0 - cfg.beta1**step)
    root_scale = 1.0 / math.sqrt(1.0 - cfg.beta2**step)  # a GPU divides by a number by such a product too
    tensors = (state.weight, state["m"], state["v"], grad)
    exact = (keep, cfg.beta1, 1.0 - cfg.beta1, cfg.beta2, 1.0 - cfg.beta2, step_size, root_scale, cfg.eps)
    factors = [np.float32(factor) for factor in exact]
    if grad.device.type == "cpu":
        _on_cpu(tensors, factors)
    elif has_triton(grad.device):
        from elastic_moe.optim.adamw_triton import update as update_on_gpu

        update_on_gpu(tensors, [float(factor) for factor in factors])
    else:
        _in_passes(tensors, [float(factor) for factor in factors])


def _in_passes(tensors: Sequence[torch.Tensor], factors: Sequence[float]) -> None:
    """One update in place on any device, in a few passes. Arguments as of `adamw_triton.update`."""
    keep, beta1, rest1, beta2, rest2, step_size, root_scale, eps = factors
    for weight, m, v, g in zip(*(tensor.split(DEVICE_CHUNK) for tensor in tensors), strict=True):
        if keep != 1.0:
            weight.mul_(keep)
        m.mul_(beta1).add_(g * rest1)
        v.mul_(beta2).add_((g * g).mul_(rest2))
        denominator = v.sqrt().mul_(root_scale).add_(eps)
        weight.sub_((m * step_size).div_(denominator))


def _on_cpu(tensors: Sequence[torch.Tensor], factors: Sequence[Any]) -> None:
    """The compiled loop over the vectors, in as many spans as torch may use threads and as are worth one."""
    vectors: list[Any] = [tensor.numpy() for tensor in tensors]
    numel = len(vectors[0])
    spans = max(1, min(torch.get_num_threads(), numel // SPAN))
    if spans == 1:
        update(*vectors, *factors)
        return
    cuts = [numel * span // spans for span in range(spans + 1)]
    with ThreadPoolExecutor(spans) as pool:
        for _ in pool.map(lambda a, b: update(*(vector[a:b] for vector in vectors), *factors), cuts[:-1], cuts[1:]):
            pass


def warm_up() -> None:
    """Compile the loop, or load it from the cache: a second the first time on a machine."""
    _on_cpu([torch.zeros(1) for _ in range(4)], [np.float32(1.0)] * 8)
