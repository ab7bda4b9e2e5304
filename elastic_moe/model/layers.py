"""The small layers, each of which declares its parameters.

A parameter is declared once, where it is used, with its initial value and its optimizer. `params.param_specs` reads the
declarations from a model on the meta device. So the list of parameters that ownership, checkpoints and recovery use
cannot disagree with the model.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from elastic_moe.config.schema import ModelConfig
from elastic_moe.model.init import Init, constant, init_in, init_out
from elastic_moe.types import RULE_FACTS


class DeclaredModule(nn.Module):
    """A module that declares its own parameters and buffers.

    Attributes:
        inits: the declaration of each, by its name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.inits: dict[str, Init] = {}

    def declare(self, name: str, shape: tuple[int, ...], init: Init) -> None:
        """Register a parameter, or a buffer where no gradient trains it. `Transformer.initialize` sets its value."""
        if RULE_FACTS[init.optimizer].has_gradient:
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        else:
            self.register_buffer(name, torch.zeros(shape))
        self.inits[name] = init


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """In which products of x are computed: autocast's dtype where it is on, else that of x."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype


class Linear(DeclaredModule):
    """y = x W^T (+ b); weight [out, in]."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, width_in: int, width_out: int, init: Init, bias: bool = False) -> None:
        super().__init__()
        self.declare("weight", (width_out, width_in), init)
        if bias:
            self.declare("bias", (width_out,), constant(0.0))
        else:
            self.bias = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


class _RMSNorm(torch.autograd.Function):
    """y = r x w with r = 1 / rms(x), in fp32; written out for CPUs, where torch's norm is many passes over memory.

    With t = dy * x the backward pass needs two products of t with vectors: dw = r t summed over rows, and s = t w for
    dx = r dy w - x r^3 s / n.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        r = torch.rsqrt(norm * norm / x.shape[-1] + eps)
        ctx.save_for_backward(x, weight, r)
        return (wide * r * weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        x, weight, r = ctx.saved_tensors
        width = x.shape[-1]
        wide, grad = (t.reshape(-1, width).to(r.dtype) for t in (x, grads[0]))
        r, w = r.reshape(-1), weight.to(r.dtype)
        t = grad * wide
        d_weight, s = r @ t, t @ w
        d_x = torch.addcmul((grad * w).mul_(r[:, None]), wide, (r * r * r * s / width)[:, None], value=-1)
        return d_x.view(x.shape).to(x.dtype), d_weight.to(weight.dtype), None


class RMSNorm(DeclaredModule):
    """Root mean square normalisation of the last axis with a gain (Zhang and Sennrich, arXiv 1910.07467)."""

    weight: torch.Tensor

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self._eps = eps
        self.declare("weight", (width,), constant(1.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type == "cpu":
            return _RMSNorm.apply(x, self.weight, self._eps)
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self._eps)


class Embedding(DeclaredModule):
    """Rows of weight [V, D] by token id."""

    weight: torch.Tensor

    def __init__(self, vocab_size: int, width: int, init: Init) -> None:
        super().__init__()
        self.declare("weight", (vocab_size, width), init)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return F.embedding(tokens, self.weight)


def swiglu(gate: torch.Tensor, up: torch.Tensor, limit: float) -> torch.Tensor:
    """silu(gate) * up. With a limit, gate is clamped from above and up on both sides (DeepSeek-V4, section 2.1)."""
    if limit:
        gate, up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
    return F.silu(gate) * up


def swiglu_backward(grad_NF: torch.Tensor, gate_up_NG: torch.Tensor, limit: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Value and gradient of `swiglu(gate, up, limit)`.

    Args:
        grad_NF: gradient of the result.
        gate_up_NG: gate and up side by side, G = 2F.
        limit: as in `swiglu`.

    Returns:
        The value [N, F], and the gradient of gate and up side by side [N, 2F].
    """
    gate, up = gate_up_NG.chunk(2, dim=-1)
    out = torch.empty_like(gate_up_NG)
    d_gate, d_up = out.chunk(2, dim=-1)
    if not limit:
        act = F.silu(gate)
        d_gate.copy_(torch.ops.aten.silu_backward(grad_NF * up, gate))
        torch.mul(grad_NF, act, out=d_up)
        return act * up, out
    inside_gate, inside_up = gate <= limit, up.abs() <= limit
    gate, up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
    act = F.silu(gate)
    d_gate.copy_(torch.ops.aten.silu_backward(grad_NF * up, gate) * inside_gate)
    torch.mul(grad_NF * act, inside_up, out=d_up)
    return act * up, out


class SwiGLU(nn.Module):
    """down(swiglu(gate(x), up(x))), without biases."""

    def __init__(self, cfg: ModelConfig, hidden: int) -> None:
        super().__init__()
        self._limit = cfg.swiglu_limit
        self.gate = Linear(cfg.hidden_size, hidden, init_in(cfg))
        self.up = Linear(cfg.hidden_size, hidden, init_in(cfg))
        self.down = Linear(hidden, cfg.hidden_size, init_out(cfg))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(swiglu(self.gate(x), self.up(x), self._limit))
