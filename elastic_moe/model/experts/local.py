"""Experts that are all here: the computation, and the backend that holds every expert of every layer in one process.

On CPUs the gather, the experts and the weighted sum are one autograd function that goes expert by expert, so an
expert's rows stay in the cache. On other devices all experts are computed at once with `grouped.grouped_swiglu`.

The backward passes are written out. Autograd would turn the gather of rows into a scatter, and would make a stack's
gradient before it adds it.

Shapes: T tokens, K experts per token, N = T * K routed rows, E experts, D hidden, F expert hidden.
G = 2F: the rows of an expert's gate matrix, then those of its up matrix.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from elastic_moe.config.schema import ModelConfig
from elastic_moe.model.experts.grouped import add_product, busy_slots, count_of, grouped_swiglu
from elastic_moe.model.experts.kernels import routed_sums
from elastic_moe.model.experts.routed_sum import Combine, Gather
from elastic_moe.model.experts.specs import expert_specs
from elastic_moe.model.init import init_param
from elastic_moe.model.layers import compute_dtype, swiglu, swiglu_backward

Stacks = tuple[torch.Tensor, torch.Tensor]


class _SwiGLUByExpert(torch.autograd.Function):
    """Gather, experts and weighted sum on a CPU, expert by expert.

    The gradient of a gate is <dy, y> = <W_down^T dy, hidden>, so the experts' outputs need not be kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: torch.Tensor,
        gates_TK: torch.Tensor,
        order_N: torch.Tensor,
        counts: list[int],
        limit: float,
        direct: bool,
        remake: bool,
        *stacks: torch.Tensor,
    ) -> torch.Tensor:
        """Arguments: x in the compute dtype, rows in the order of their experts, rows per expert, both weight stacks.

        With `direct`, the gradients of the stacks are added to their `grad`, and autograd gets none. With `remake`, the
        backward pass makes gate and up again.
        """
        undo_N = torch.empty_like(order_N)
        undo_N[order_N] = torch.arange(len(order_N))
        token_N = order_N // gates_TK.shape[1]
        w_gate_up, w_down = (stack.to(x_TD.dtype) for stack in stacks)
        gate_up_NG = x_TD.new_empty((len(order_N), w_gate_up.shape[1]))
        y_ND = x_TD.new_empty((len(order_N), x_TD.shape[1]))
        for expert, (tokens, gate_up, y) in busy_slots(counts, token_N, gate_up_NG, y_ND):
            torch.mm(x_TD.index_select(0, tokens), w_gate_up[expert].t(), out=gate_up)
            gate, up = gate_up.chunk(2, dim=1)
            torch.mm(swiglu(gate, up, limit), w_down[expert].t(), out=y)
        kept = None if remake else gate_up_NG
        ctx.save_for_backward(x_TD, gates_TK, order_N, undo_N, token_N, kept, *stacks)
        ctx.rest = (counts, limit, tuple(stack.grad for stack in stacks) if direct else None)
        return F.embedding_bag(
            undo_N.view(gates_TK.shape), y_ND, mode="sum", per_sample_weights=gates_TK.to(x_TD.dtype)
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_TD, gates_TK, order_N, undo_N, token_N, kept, *stacks = ctx.saved_tensors
        counts, limit, grad_sums = ctx.rest
        compute = x_TD.dtype
        w_gate_up, w_down = (stack.to(compute) for stack in stacks)
        gate_up_NG = x_TD.new_empty((len(order_N), w_gate_up.shape[1])) if kept is None else kept
        totals = [torch.zeros_like(stack) for stack in stacks] if grad_sums is None else grad_sums
        gates_N = gates_TK.flatten()[order_N]
        d_gates_N = torch.empty_like(gates_N)
        d_x_ND = x_TD.new_empty((len(order_N), x_TD.shape[1]))
        d_out_TD = grads[0].contiguous()
        for expert, rows in busy_slots(counts, token_N, gate_up_NG, gates_N, d_gates_N, d_x_ND):
            tokens, gate_up, gates, d_gates, d_x = rows
            x, d_y = x_TD.index_select(0, tokens), d_out_TD.index_select(0, tokens)
            if kept is None:
                torch.mm(x, w_gate_up[expert].t(), out=gate_up)
            d_hidden, column = d_y @ w_down[expert], gates.to(compute).unsqueeze(1)
            hidden, d_gate_up = swiglu_backward(d_hidden * column, gate_up, limit)
            d_gates.copy_((d_hidden.to(d_gates.dtype) * hidden).sum(dim=1))
            add_product(totals[0][expert], d_gate_up, x)
            add_product(totals[1][expert], d_y, hidden * column)
            torch.mm(d_gate_up, w_gate_up[expert], out=d_x)
        d_x_TD = F.embedding_bag(undo_N.view(gates_TK.shape), d_x_ND, mode="sum")
        d_gates_TK = d_gates_N[undo_N].view(gates_TK.shape)
        returned = (None, None) if grad_sums is not None else tuple(totals)
        return d_x_TD, d_gates_TK, None, None, None, None, None, *returned


def local_experts(
    x_TD: torch.Tensor,
    expert_ids_TK: torch.Tensor,
    gates_TK: torch.Tensor,
    stacks: Stacks,
    limit: float = 0.0,
    direct: bool = False,
    remake: bool = False,
) -> torch.Tensor:
    """The gated sum of each token's experts, whose weights are all here.

    Args:
        x_TD: tokens; T may be 0.
        expert_ids_TK: int64, index of each chosen expert in the stacks.
        gates_TK: weight of each chosen expert.
        stacks: the experts' weights, [E, 2F, D] and [E, D, F].
        limit: clamp of the SwiGLU's inputs; 0 for none.
        direct: the backward pass adds the weights' gradients to their `grad`, and returns none to autograd.
        remake: the backward pass makes the products of gate and up again, which are then not kept.

    Returns:
        y_TD in the dtype of x.
    """
    if x_TD.device.type != "cpu" or not len(expert_ids_TK):
        return local_experts_grouped(x_TD, expert_ids_TK, gates_TK, stacks, limit, direct, remake)
    dtype, x = x_TD.dtype, x_TD.to(compute_dtype(x_TD))
    order_N, counts_E = _by_expert(expert_ids_TK, len(stacks[0]))
    with torch.autocast("cpu", enabled=False):
        out = _SwiGLUByExpert.apply(x, gates_TK, order_N, counts_E.tolist(), limit, direct, remake, *stacks)
    return out.to(dtype)


def local_experts_grouped(
    x_TD: torch.Tensor,
    expert_ids_TK: torch.Tensor,
    gates_TK: torch.Tensor,
    stacks: Stacks,
    limit: float = 0.0,
    direct: bool = False,
    remake: bool = False,
) -> torch.Tensor:
    """As `local_experts`, on any device and for any number of tokens: gather, all experts at once, weighted sum."""
    dtype, x = x_TD.dtype, x_TD.to(compute_dtype(x_TD))
    order_N, counts_E = _by_expert(expert_ids_TK, len(stacks[0]))
    place_N = torch.empty_like(order_N)
    place_N[order_N] = torch.arange(len(order_N), device=order_N.device)
    place_TK, sums = place_N.view(expert_ids_TK.shape), routed_sums(x_TD.device)
    with torch.autocast(x.device.type, enabled=False):
        rows_ND = Gather.apply(x, order_N, place_TK, sums)
        y_ND = grouped_swiglu(rows_ND, counts_E, *stacks, limit, direct, remake)
        return Combine.apply(y_ND, place_TK, gates_TK, sums).to(dtype)


def _by_expert(expert_ids_TK: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(order of the rows by expert, rows per expert)."""
    flat_N = expert_ids_TK.flatten()
    return flat_N.argsort(stable=True), count_of(flat_N, num_experts)


class LocalExperts(nn.Module):
    """Backend that holds all experts of all layers: one device, no distribution. An `ExpertBackend`.

    Args:
        cfg: the model's shape.
        seed: seed of the initial weights, which equal `init_param` of the experts' specs; None leaves them unset.

    Attributes:
        direct: add gradients to the weights' `grad` in place; every weight must then have a `grad`.
        gate_up, down: one stack of weights per layer, [E, 2F, D] and [E, D, F].
    """

    gate_up: nn.ParameterList
    down: nn.ParameterList

    def __init__(self, cfg: ModelConfig, seed: int | None = 0) -> None:
        super().__init__()
        self.direct = False
        self._cfg, self._remake = cfg, cfg.recompute == "selective"
        self.num_layers, self.num_experts, self._limit = cfg.num_moe_layers, cfg.num_experts, cfg.swiglu_limit
        shapes = {
            "gate_up": (self.num_experts, 2 * cfg.expert_hidden, cfg.hidden_size),
            "down": (self.num_experts, cfg.hidden_size, cfg.expert_hidden),
        }
        for name, shape in shapes.items():
            stacks = [nn.Parameter(torch.empty(shape)) for _ in range(self.num_layers)]
            setattr(self, name, nn.ParameterList(stacks))
        if seed is not None:
            views = self.named_views()
            for moe_layer in range(self.num_layers):
                for spec in expert_specs(cfg, moe_layer):
                    views[spec.name].copy_(init_param(spec, seed))

    def slot_params(self, moe_layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(w_gate_up [E, 2F, D], w_down [E, D, F]) of one layer."""
        return self.gate_up[moe_layer], self.down[moe_layer]

    def named_views(self, of_grad: bool = False) -> dict[str, torch.Tensor]:
        """Views of each expert's matrices, or of their gradients, by the names of `param_specs`."""
        views: dict[str, torch.Tensor] = {}
        for moe_layer in range(self.num_layers):
            gate_up, down = (stack.grad if of_grad else stack.data for stack in self.slot_params(moe_layer))
            assert gate_up is not None
            assert down is not None
            gate, up = gate_up.chunk(2, dim=1)
            stacks = {"gate": gate, "up": up, "down": down}
            for spec in expert_specs(self._cfg, moe_layer):
                assert spec.expert is not None
                views[spec.name] = stacks[spec.name.rsplit(".", 1)[1]][spec.expert]
        return views

    def forward(
        self,
        moe_layer: int,
        x_TD: torch.Tensor,
        expert_ids_TK: torch.Tensor,
        gates_TK: torch.Tensor,
        again: bool = False,
    ) -> torch.Tensor:
        """See `ExpertBackend`: y_TD, the gated sum of each token's experts."""
        stacks = self.slot_params(moe_layer)
        return local_experts(x_TD, expert_ids_TK, gates_TK, stacks, self._limit, self.direct, self._remake)
