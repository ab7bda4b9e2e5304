"""The objects with which a worker makes steps in one generation, and their builder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import nn

from elastic_moe.model.backend import TrainableExperts
from elastic_moe.parallel.collectives.group import Group
from elastic_moe.plan.placement import Placement
from elastic_moe.plan.shares import Batching, Speeds, plan_shares, slices_of
from elastic_moe.plan.state.ownership import Ownership
from elastic_moe.plan.state.schedule import Layout
from elastic_moe.runtime.compute_copies import set_dtype
from elastic_moe.runtime.exchange.exchanger import Exchanger
from elastic_moe.runtime.exchange.one_memory import computes_with_masters, part, share
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
        batching: how the ranks compute a batch.
        speeds: of the ranks, as they are in use.
        switch_s: seconds of the change of placement that made this context; 0 if none made it.
    """

    rank: int
    layout: Layout
    group: Group
    experts: TrainableExperts
    exchanger: Exchanger
    held: HeldState
    batching: Batching
    speeds: Speeds
    switch_s: float = 0.0

    def shares(self, sequences: int) -> list[slice]:
        """The slice that each rank computes of a batch of so many sequences."""
        return list(_shares(replace(self.batching, global_batch=sequences), self.speeds.sequences))

    @property
    def leads(self) -> bool:
        """Whether this rank is the first active one, which reports for all."""
        return self.rank == self.layout.view.active_ranks[0]


@lru_cache(maxsize=4)
def _shares(batching: Batching, speeds: tuple[float, ...]) -> tuple[slice, ...]:
    return tuple(slices_of(plan_shares(batching, speeds)))


class ContextBuilder:
    """Builds contexts.

    Args:
        units: all units.
        model: the compute model without its experts.
        dense_gradients: parameter name -> sum of its gradient.
        num_moe_layers: MoE layers of the model.
        batching: how the ranks compute a batch; `together` follows from the experts' backend.
        products: dtype in which products are computed.
        rounding_seed: of gradients that travel in bf16; None: they travel as they are.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        model: nn.Module,
        dense_gradients: Mapping[str, torch.Tensor],
        num_moe_layers: int,
        batching: Batching,
        products: torch.dtype = torch.float32,
        rounding_seed: int | None = None,
    ) -> None:
        self._units, self._model, self._dense_gradients = units, model, dense_gradients
        self._layers = range(num_moe_layers)
        self._batching, self._products, self._rounding_seed = batching, products, rounding_seed
        self._shares = False  # the dense tensors of the model lie in a state

    def leave(self) -> None:
        """The tensors of the model no longer lie in a state, so that it can be freed. They are to be published anew."""
        if self._shares:
            part([*self._model.parameters(), *self._model.buffers(), *self._dense_gradients.values()])
            self._shares = False

    def build(
        self,
        view: View,
        group: Group,
        experts: TrainableExperts,
        held: HeldState,
        ownership: Ownership,
        placement: Placement,
        speeds: Speeds | None = None,
    ) -> GenerationContext:
        """The context for a placement. The experts wait for the exchanger's weights from now on.

        `speeds`: of the ranks, None for equal ones.
        """
        layout = Layout(self._units, view, group.rank, ownership, placement)
        gradients = ComputeTensors(self._dense_gradients, [experts.slot_grads(i) for i in self._layers])
        set_dtype(
            self._model,
            [stack for i in self._layers for stack in experts.slot_params(i)],
            torch.float32 if computes_with_masters(layout, gradients, held) else self._products,
        )
        dense = dict(self._model.named_parameters()) | dict(self._model.named_buffers())
        weights = ComputeTensors(dense, [experts.slot_params(i) for i in self._layers])
        self._shares = share(layout, weights, gradients, held)
        exchanger = Exchanger(layout, weights.detached(), gradients, held, group, self._rounding_seed)
        experts.before_experts = exchanger.wait_expert_weights
        speeds = speeds or Speeds.equal(view)
        batching = replace(self._batching, together=experts.together)
        return GenerationContext(group.rank, layout, group, experts, exchanger, held, batching, speeds)
