"""Muon: momentum whose matrices are orthogonalised, as DeepSeek-V4 trains with it.

Sources: Muon, Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon/); decoupled weight decay and an update of
AdamW's size, so that its learning rate serves both: Moonlight (arXiv 2502.16982, section 2.2); the hybrid
Newton-Schulz iteration, each independent matrix by itself, and the factor 0.18: DeepSeek-V4's report.

Twins must stay equal bit for bit, and a product's rounding depends on the library that computes it, the processor, the
number of threads, and where the operands lie. So every matrix is copied to memory of its own, a product never has
another size than the unit itself brings along, and `arithmetic` names what the rest depends on: a worker whose name
differs from the others' is turned away (`coordination/newcomers.py`).

Shapes: B matrices of one shape, N rows, M columns, N <= M.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch

from elastic_moe.config.schema import OptimConfig
from elastic_moe.optim.committed import CommittedStep
from elastic_moe.optim.unit_state import UnitState
from elastic_moe.types import Unit

FAST, PRECISE = (3.4445, -4.7750, 2.0315), (2.0, -1.5, 0.5)
STEPS = (*(FAST,) * 8, *(PRECISE,) * 2)  # the fast ones bring singular values near 1, the last two bring them to 1
UPDATE_RMS = 0.18  # of an update over the learning rate, for matrices of full rank
SMALLEST = 1e-30  # of a norm: a matrix of zeros stays one


def apply(units: Sequence[Unit], state: UnitState, grad: torch.Tensor | None, step: CommittedStep) -> None:
    """One update of a unit's matrices."""
    (unit,) = units
    assert grad is not None, "Muon needs a gradient"
    apply_muon(unit, state, grad, step.lr, step.optim)


@torch.no_grad()
def apply_muon(unit: Unit, state: UnitState, grad: torch.Tensor, lr: float, cfg: OptimConfig) -> None:
    """One update in place.

    Args:
        unit: whose parts are matrices.
        state: `weight` and the momentum `m`, fp32 [n] each.
        grad: fp32 [n] gradient, already averaged and clipped; left as it is.
        lr: learning rate of this step.
        cfg: momentum and weight decay.
    """
    momentum = state["m"].mul_(cfg.momentum).add_(grad)
    direction = (momentum * cfg.momentum).add_(grad)  # Nesterov's
    if unit.decay:
        state.weight.mul_(1.0 - lr * cfg.weight_decay)
    by_shape: dict[tuple[int, int], list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for pair in zip(matrices(unit, direction), matrices(unit, state.weight), strict=True):
        wide = [matrix if matrix.shape[0] <= matrix.shape[1] else matrix.t() for matrix in pair]
        by_shape.setdefault((wide[0].shape[0], wide[0].shape[1]), []).append((wide[0], wide[1]))
    for (_, columns), pairs in by_shape.items():
        updates = orthogonal(torch.stack([matrix for matrix, _ in pairs]))
        updates.mul_(lr * UPDATE_RMS * math.sqrt(columns))
        for (_, weight), update in zip(pairs, updates, strict=True):
            weight.sub_(update)


def matrices(unit: Unit, vector: torch.Tensor) -> list[torch.Tensor]:
    """Views of the unit's independent matrices in one of its vectors."""
    found: list[torch.Tensor] = []
    for part in unit.parts:
        whole = vector[part.offset : part.offset + part.numel].view(part.shape)
        found += whole.chunk(part.stacked)
    return found


def orthogonal(g_BNM: torch.Tensor) -> torch.Tensor:
    """The nearest matrices with orthonormal rows, by Newton-Schulz iteration; singular values within 0.01 of 1.

    In fp32 on a CPU, in bf16 on a GPU.
    """
    x_BNM = g_BNM / torch.linalg.vector_norm(g_BNM, dim=(1, 2), keepdim=True).clamp_min(SMALLEST)
    x_BNM = x_BNM.to(torch.bfloat16 if g_BNM.is_cuda else torch.float32)
    for a, b, c in STEPS:
        gram_BNN = torch.bmm(x_BNM, x_BNM.transpose(1, 2))
        factor_BNN = torch.baddbmm(gram_BNN, gram_BNN, gram_BNN, beta=b, alpha=c)
        x_BNM = torch.baddbmm(x_BNM, factor_BNN, x_BNM, beta=a)
    return x_BNM.float()


def arithmetic(device: torch.device) -> str:
    """A name of what decides the rounding of the products on a device: their result for a fixed matrix, and threads."""
    fixed = torch.randn((3, 96, 320), generator=torch.Generator().manual_seed(0)).to(device)
    digest = hashlib.sha256(orthogonal(fixed).cpu().numpy().tobytes()).hexdigest()[:8]
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return f"{device.type} with products {digest}{threads}"
