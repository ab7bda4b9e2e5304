"""The routed experts' arithmetic: SwiGLU over tokens sorted by slot, and the backend that holds every expert here.

A slot is a place for one expert's weights; what a slot holds is the backend's business. Never index a stacked weight
inside a loop: each `W[e]` writes a whole zero [S, F, D] in the backward pass (2 to 20 times slower); `unbind` does not.
`grouped_mm` computes every slot in one call. What it needs, found by measurement: strides in multiples of 16 bytes,
int32 offsets, no fp64, and an incoming gradient in real memory (the expanded gradient of a sum has stride 0).

Shapes: T tokens, K experts per token, N = T * K routed rows, S slots, E experts, D hidden, F expert hidden.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn

from elastic_moe.config.schema import ModelConfig
from elastic_moe.model.layers import swiglu
from elastic_moe.model.params import expert_specs, init_param


class ExpertBackend(Protocol):
    """Computes the routed experts of one layer, wherever they are."""

    def __call__(
        self, moe_layer: int, x_TD: torch.Tensor, expert_ids_TK: torch.Tensor, gates_TK: torch.Tensor
    ) -> torch.Tensor:
        """y_TD: per token, the sum over its K experts of gate * expert(x). T may be 0; differentiable."""
        ...


class _DenseGrad(torch.autograd.Function):
    """Identity whose gradient is contiguous."""

    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: object, grad: torch.Tensor) -> torch.Tensor:
        return grad.contiguous()


def grouped_swiglu(
    x_ND: torch.Tensor,
    counts_S: torch.Tensor,
    w_gate_SFD: torch.Tensor,
    w_up_SFD: torch.Tensor,
    w_down_SDF: torch.Tensor,
    limit: float = 0.0,
) -> torch.Tensor:
    """Slot s's SwiGLU on its rows of x, `down(silu(gate(x)) * up(x))`; all slots in one call where grouped_mm can.

    Args:
        x_ND: rows sorted by slot.
        counts_S: int64 rows per slot, summing to N; zeros are fine.
        w_gate_SFD, w_up_SFD, w_down_SDF: the slots' weights.
        limit: clamp of the SwiGLU's inputs; 0 for none.

    Returns:
        y_ND in the dtype of x. Under autocast the products run in autocast's dtype.
    """
    dtype = x_ND.dtype
    kind = x_ND.device.type
    if torch.is_autocast_enabled(kind) and dtype != torch.float64:
        compute = torch.get_autocast_dtype(kind)
        x_ND, w_gate_SFD, w_up_SFD, w_down_SDF = (
            tensor.to(compute) for tensor in (x_ND, w_gate_SFD, w_up_SFD, w_down_SDF)
        )
    if x_ND.shape[0] == 0 or not _grouped_mm_fits(x_ND, w_gate_SFD):
        return loop_swiglu(x_ND, counts_S, w_gate_SFD, w_up_SFD, w_down_SDF, limit).to(dtype)
    offs = counts_S.to(device=x_ND.device).cumsum(0).to(torch.int32)
    x_ND = x_ND.contiguous()
    gate_NF = F.grouped_mm(x_ND, w_gate_SFD.transpose(1, 2), offs=offs)
    up_NF = F.grouped_mm(x_ND, w_up_SFD.transpose(1, 2), offs=offs)
    y_ND = F.grouped_mm(swiglu(gate_NF, up_NF, limit), w_down_SDF.transpose(1, 2), offs=offs)
    return _DenseGrad.apply(y_ND).to(dtype)


def _grouped_mm_fits(x_ND: torch.Tensor, w_gate_SFD: torch.Tensor) -> bool:
    """Whether grouped_mm takes this dtype on this device, with rows in multiples of 16 bytes."""
    dtypes = (torch.bfloat16,) if x_ND.is_cuda else (torch.float32, torch.bfloat16, torch.float16)
    _, hidden, width = w_gate_SFD.shape
    size = x_ND.element_size()
    return x_ND.dtype in dtypes and hidden * size % 16 == 0 and width * size % 16 == 0


def loop_swiglu(
    x_ND: torch.Tensor,
    counts_S: torch.Tensor,
    w_gate_SFD: torch.Tensor,
    w_up_SFD: torch.Tensor,
    w_down_SDF: torch.Tensor,
    limit: float = 0.0,
) -> torch.Tensor:
    """Slow twin of `grouped_swiglu`: one slot after another; any shape, dtype and number of slots, zero included."""
    if w_gate_SFD.shape[0] == 0:
        return x_ND.clone()  # no slots, hence no rows; stays in the graph
    pieces = [
        F.linear(swiglu(F.linear(x, gate), F.linear(x, up), limit), down)
        for x, gate, up, down in zip(
            x_ND.split(counts_S.tolist()), w_gate_SFD.unbind(), w_up_SFD.unbind(), w_down_SDF.unbind(), strict=True
        )
    ]
    return torch.cat(pieces)


class LocalExperts(nn.Module):
    """Backend that holds all experts of all layers in this process: one device, no distribution.

    Args:
        cfg: the model's shape.
        seed: of the initial weights, which equal `init_param` of the experts' specs; None leaves them unset.
    """

    def __init__(self, cfg: ModelConfig, seed: int | None = 0) -> None:
        super().__init__()
        self._cfg = cfg
        self.num_layers, self.num_experts, self._limit = cfg.num_moe_layers, cfg.num_experts, cfg.swiglu_limit
        wide = (self.num_experts, cfg.expert_hidden, cfg.hidden_size)
        shapes = {"gate": wide, "up": wide, "down": (self.num_experts, cfg.hidden_size, cfg.expert_hidden)}
        for name, shape in shapes.items():
            stacks = [nn.Parameter(torch.empty(shape)) for _ in range(self.num_layers)]
            setattr(self, name, nn.ParameterList(stacks))
        for moe_layer in range(self.num_layers if seed is not None else 0):
            for spec in expert_specs(cfg, moe_layer):
                assert spec.expert is not None and seed is not None
                stack = getattr(self, spec.name.rsplit(".", 1)[1])[moe_layer]
                stack.data[spec.expert].copy_(init_param(spec, seed))

    def slot_params(self, moe_layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(w_gate [E, F, D], w_up [E, F, D], w_down [E, D, F]) of one layer."""
        gate, up, down = (getattr(self, name)[moe_layer] for name in ("gate", "up", "down"))
        return gate, up, down

    def named_views(self, of_grad: bool = False) -> dict[str, torch.Tensor]:
        """Each expert's matrices, or their gradients, by the names of `param_specs`."""
        views: dict[str, torch.Tensor] = {}
        for moe_layer in range(self.num_layers):
            stacks = dict(zip(("gate", "up", "down"), self.slot_params(moe_layer), strict=True))
            for spec in expert_specs(self._cfg, moe_layer):
                stack = stacks[spec.name.rsplit(".", 1)[1]]
                assert spec.expert is not None
                whole = stack.grad if of_grad else stack.data
                assert whole is not None
                views[spec.name] = whole[spec.expert]
        return views

    def forward(
        self, moe_layer: int, x_TD: torch.Tensor, expert_ids_TK: torch.Tensor, gates_TK: torch.Tensor
    ) -> torch.Tensor:
        num_tokens, num_choices = expert_ids_TK.shape
        flat_ids = expert_ids_TK.flatten()
        order = flat_ids.argsort(stable=True)
        counts = torch.bincount(flat_ids, minlength=self.num_experts)
        y_sorted = grouped_swiglu(x_TD[order // num_choices], counts, *self.slot_params(moe_layer), self._limit)
        back = torch.empty_like(order)
        back[order] = torch.arange(order.numel(), device=order.device)
        y_TKD = y_sorted[back].view(num_tokens, num_choices, x_TD.shape[1])
        return (y_TKD * gates_TK.unsqueeze(-1)).sum(dim=1).to(x_TD.dtype)
