"""The interfaces of the routed experts: the call that the model makes, and the members that a trainer needs besides.

The model calls a backend once per MoE layer and knows nothing else of it. So one process that holds every expert
(`experts.local.LocalExperts`), a rank of an expert-parallel group (`parallel.expert_parallel.ExpertParallel`) and a
rank of a group with all experts everywhere (`parallel.everywhere.ExpertsEverywhere`) serve the same model. A new way to
place or compute experts is one new class that implements these Protocols.

Shapes: T tokens, K experts per token, D hidden, F expert hidden, S slots of this rank, L MoE layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:  # the placement's module needs numba, and the model needs torch alone
    import numpy as np
    from numpy.typing import NDArray

    from elastic_moe.plan.placement import Placement


class ExpertBackend(Protocol):
    """Computes the routed experts of one layer, wherever their weights are."""

    def __call__(
        self,
        moe_layer: int,
        x_TD: torch.Tensor,
        expert_ids_TK: torch.Tensor,
        gates_TK: torch.Tensor,
        again: bool = False,
    ) -> torch.Tensor:
        """Apply each token's experts and sum their outputs.

        Args:
            moe_layer: index among the MoE layers.
            x_TD: tokens; T may be 0.
            expert_ids_TK: int64, the experts chosen for each token.
            gates_TK: weight of each chosen expert.
            again: a backward pass makes the layer once more; it does not count in the statistics.

        Returns:
            y_TD: per token, the sum over its K experts of gate * expert(x), in the dtype of x. It is differentiable in
            x and in the gates. A distributed backend is collective: every rank calls it for every layer, both ways.
        """
        ...


@dataclass(frozen=True, slots=True, eq=False)
class ExpertStatistics:
    """Work of the routed experts since `TrainableExperts.begin_step`.

    Attributes:
        local_tokens: rows that this rank's slots computed.
        cross_node_rows: rows sent to another node, of all ranks together; counted on rank 0, and 0 on the others.
        compute_s: seconds of this rank's experts in the forward passes.
        slowest_L: per MoE layer, rows of the slowest rank over its speed, relative to the fastest rank's; of the ranks
            that this one's rows may reach, and equal on these. 0 where no rows travel.
        dispatched_s: seconds of this rank's experts in both passes where rows travel to them; 0 where each rank
            computes the rows of its own tokens.
    """

    local_tokens: int
    cross_node_rows: int
    compute_s: float
    slowest_L: NDArray[np.float64]
    dispatched_s: float = 0.0


class TrainableExperts(ExpertBackend, Protocol):
    """A backend whose weights lie in slots that a trainer fills, and whose gradients it reduces.

    Attributes:
        before_experts: called before the slots' weights are used; it may wait until they have arrived.
        together: the ranks wait for one another in every layer.
        exact_times: wait for a GPU's own work before rows travel, so that its time is not taken for waiting.
    """

    before_experts: Callable[[], None]
    together: bool
    exact_times: bool

    def slot_params(self, moe_layer: int) -> tuple[torch.Tensor, ...]:
        """(w_gate_up [S, 2F, D], w_down [S, D, F]) of one layer. The tensors are never replaced, only written to."""
        ...

    def slot_grads(self, moe_layer: int) -> tuple[torch.Tensor, ...]:
        """Gradients of `slot_params`, summed since `begin_step`. The tensors are never replaced."""
        ...

    def begin_step(self) -> None:
        """Set the gradients and the statistics to zero."""
        ...

    def statistics(self) -> ExpertStatistics:
        """Statistics of the calls since `begin_step`."""
        ...

    def adopt(self, placement: Placement, speeds: Sequence[float] | None = None) -> None:
        """Use another placement with the same number of slots per rank. The caller then sets the slots' weights.

        `speeds`: of the ranks, in rows, if they have changed.
        """
        ...
