"""The objects with which a worker makes steps in one generation, and their builder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from elastic_moe.model.backend import TrainableExperts
from elastic_moe.parallel.collectives.group import Group
from elastic_moe.plan.batch import share_of_batch
from elastic_moe.plan.placement import Placement
from elastic_moe.plan.state.ownership import Ownership
from elastic_moe.plan.state.schedule import Layout
from elastic_moe.runtime.exchange.exchanger import Exchanger
from elastic_moe.runtime.exchange.one_memory import share
from elastic_moe.runtime.exchange.windows import ComputeTensors
from elastic_moe.runtime.state import HeldState
from elastic_moe.types import Unit, View


@dataclass(frozen=True)
class GenerationContext:
    """Everything that a step needs of its generation. A reconfiguration and a change of placement make a new one.

    Attributes:
        rank: of this worker in the view.
        layout: ownership, placement and the exchanges that follow from them.
        group: the generation's collectives.
        experts: backend of the routed experts.
        exchanger: moves gradients and weights.
        held: state that this worker owns or mirrors.
        shares: slice per rank of a batch of so many sequences.
        switch_s: seconds of the change of placement that made this context; 0 if none made it.
    """

    rank: int
    layout: Layout
    group: Group
    experts: TrainableExperts
    exchanger: Exchanger
    held: HeldState
    shares: Callable[[int], list[slice]]
    switch_s: float = 0.0

    @property
    def leads(self) -> bool:
        """Whether this rank is the first active one, which reports for all."""
        return self.rank == self.layout.view.active_ranks[0]


class ContextBuilder:
    """Builds contexts.

    Args:
        units: all units.
        model: the compute model without its experts.
        dense_gradients: parameter name -> sum of its gradient.
        num_moe_layers: MoE layers of the model.
        batch_multiple: each rank's share of the batch is a multiple of so many sequences.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        model: nn.Module,
        dense_gradients: Mapping[str, torch.Tensor],
        num_moe_layers: int,
        batch_multiple: int = 1,
    ) -> None:
        self._units, self._model, self._dense_gradients = units, model, dense_gradients
        self._layers = range(num_moe_layers)
        self._batch_multiple = batch_multiple

    def build(
        self,
        view: View,
        group: Group,
        experts: TrainableExperts,
        held: HeldState,
        ownership: Ownership,
        placement: Placement,
        switch_s: float = 0.0,
    ) -> GenerationContext:
        """The context for a placement. The experts wait for the exchanger's weights from now on."""
        layout = Layout(self._units, view, group.rank, ownership, placement)
        dense = dict(self._model.named_parameters()) | dict(self._model.named_buffers())
        weights = ComputeTensors(dense, [experts.slot_params(i) for i in self._layers])
        gradients = ComputeTensors(self._dense_gradients, [experts.slot_grads(i) for i in self._layers])
        share(layout, weights, gradients, held)
        exchanger = Exchanger(layout, weights.detached(), gradients, held, group)
        experts.before_experts = exchanger.wait_expert_weights
        shares = partial(share_of_batch, view, multiple=self._batch_multiple)
        return GenerationContext(group.rank, layout, group, experts, exchanger, held, shares, switch_s)
