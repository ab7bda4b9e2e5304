"""The layers of a model one after another, and what becomes of the losses and statistics that each one has."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch

from elastic_moe.config.schema import ModelConfig
from elastic_moe.model.attention.context import AttentionContext
from elastic_moe.model.backend import ExpertBackend
from elastic_moe.model.block import Block
from elastic_moe.model.recompute import layers_at_once, whole_layers
from elastic_moe.model.residual.connections import Segments


class LayerSums(NamedTuple):
    """Losses of the layers besides the cross-entropy.

    Attributes:
        balance: summed over sequences and layers.
        index: summed over tokens and layers.
        router_z: summed over tokens and layers.
    """

    balance: torch.Tensor
    index: torch.Tensor
    router_z: torch.Tensor


class StackOutput(NamedTuple):
    """The output of some layers.

    Attributes:
        x: the residual after the last one.
        sums: losses.
        loads: int64 [E] per MoE layer, tokens routed to each expert.
        maps: H_res of each sub-layer; empty without streams.
    """

    x: torch.Tensor
    sums: LayerSums
    loads: list[torch.Tensor]
    maps: list[torch.Tensor]


class Stack:
    """Runs layers on one micro-batch.

    Args:
        cfg: the model's shape.
        tokens_BS: the micro-batch.
        context: of the attention.
        experts: backend of the routed experts.
    """

    def __init__(
        self, cfg: ModelConfig, tokens_BS: torch.Tensor, context: AttentionContext, experts: ExpertBackend
    ) -> None:
        self._cfg, self._tokens_BS, self._context, self._experts = cfg, tokens_BS, context, experts

    def run(self, blocks: Sequence[Block], x: torch.Tensor) -> StackOutput:
        """The output of these layers, from the residual before the first one."""
        zero, size = torch.zeros((), device=x.device), layers_at_once(self._cfg)
        sums, loads, maps = LayerSums(zero, zero, zero), list[torch.Tensor](), list[torch.Tensor]()
        if not size or not torch.is_grad_enabled():
            return self._run(blocks, x, sums, self._experts)
        for start in range(0, len(blocks), size):
            group = blocks[start : start + size]
            x, *rest = whole_layers(partial(self._flat, group), x, *sums)
            sums, rest = LayerSums(*rest[:3]), rest[3:]
            with_experts = sum(block.moe is not None for block in group)
            loads += rest[:with_experts]
            maps += [each.detach() for each in rest[with_experts:]]
        return StackOutput(x, sums, loads, maps)

    def _flat(
        self, blocks: Sequence[Block], x: torch.Tensor, *sums: torch.Tensor, again: bool
    ) -> tuple[torch.Tensor, ...]:
        """`_run` as a tuple of tensors. `again`: the backward pass makes the layers once more."""
        experts = partial(self._experts, again=True) if again else self._experts
        out = self._run(blocks, x, LayerSums(*sums), experts)
        return out.x, *out.sums, *out.loads, *out.maps

    def _run(self, blocks: Sequence[Block], x: torch.Tensor, sums: LayerSums, experts: ExpertBackend) -> StackOutput:
        """The output of these layers, with losses added to the sums."""
        segments = Segments(self._cfg, x.device)
        loads: list[torch.Tensor] = []
        maps: list[torch.Tensor] = []
        balance, index, router_z = sums
        for block in blocks:
            out = block(x, self._tokens_BS, self._context, segments, experts)
            x = out.x
            if out.load_E is not None:
                balance, router_z = balance + out.balance_loss, router_z + out.router_z
                loads.append(out.load_E)
            if out.index_loss is not None:
                index = index + out.index_loss
            maps += out.maps
        return StackOutput(x, LayerSums(balance, index, router_z), loads, maps)
