"""The layers of a model one after another, and what becomes of the losses and statistics that each one has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from elastic_moe.config.schema import ModelConfig
from elastic_moe.model.attention.context import AttentionContext
from elastic_moe.model.backend import ExpertBackend
from elastic_moe.model.block import Block
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
        zero = torch.zeros((), device=x.device)
        return self._run(blocks, x, LayerSums(zero, zero, zero), self._experts)

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
