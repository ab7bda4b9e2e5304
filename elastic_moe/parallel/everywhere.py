"""Experts with a copy on every rank: every row is local, so nothing is counted, sent or sorted by source.

The computation is that of `model.experts.local`. It differs in rounding from the one behind a dispatch, which computes
the gradient of a gate from the expert's output, and not from its hidden units: outputs need not be kept here. Sums over
rows depend on the world size in any case, unless `elastic.reproducible` is on, which is computed by `ExpertParallel`.

Shapes: T tokens, K experts per token, S slots, D hidden, E experts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

from elastic_moe.config.schema import ModelConfig
from elastic_moe.model.backend import ExpertStatistics
from elastic_moe.model.experts.local import local_experts
from elastic_moe.parallel.collectives.group import Group
from elastic_moe.parallel.slots import Slots, most_rows
from elastic_moe.plan.placement import Placement


class ExpertsEverywhere:
    """Backend of a generation whose ranks have a copy of each expert; implements `model.backend.TrainableExperts`.

    Args:
        group: the generation's collectives.
        placement: experts in slots; each rank that has slots has every expert.
        cfg: the model's shape.
        device: of the slot weights.
        memory_limit: bytes that one layer's rows may take, their part kept for the backward pass included; 0 for no
            limit. More rows are computed in chunks, and once more in the backward pass.

    Attributes:
        before_experts: called before the slots' weights are used; may wait until they are there.
        local_tokens: rows computed since `begin_step`.
        compute_s: seconds of the experts in the forward passes; on a GPU, until they are started.
        chunks: the largest number of chunks in which a layer's rows were computed.
    """

    def __init__(
        self, group: Group, placement: Placement, cfg: ModelConfig, device: torch.device, memory_limit: int = 0
    ) -> None:
        assert placement.everywhere, "rows that are not local need a dispatch"
        self.before_experts: Callable[[], None] = lambda: None
        self.together = self.exact_times = False
        self._group, self._limit, self._device = group, cfg.swiglu_limit, device
        self._remake = cfg.recompute == "selective"
        self._most_rows = most_rows(memory_limit, cfg)
        self.num_layers, self._span = len(placement.expert_of_slot), placement.slots_of(group.rank)
        self._slots = Slots(self.num_layers, self._span.stop - self._span.start, cfg, device)
        self._num_experts = cfg.num_experts
        self.adopt(placement)
        self.begin_step()

    def adopt(self, placement: Placement, speeds: Sequence[float] | None = None) -> None:
        """Use another placement with the same slots. The caller then sets the weights of the slots anew.

        `speeds`: of no meaning here, where no rank computes another one's rows.
        """
        experts_LS = torch.from_numpy(placement.expert_of_slot[:, self._span]).to(self._device, torch.int64)
        self._slot_LE = experts_LS.argsort(dim=1)[:, -self._num_experts :]  # empty slots are -1; a rank may have none
        in_order_E = torch.arange(self._num_experts, device=self._device)
        self._in_order = torch.equal(self._slot_LE, in_order_E.expand(self.num_layers, -1))

    def slot_params(self, moe_layer: int) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
        """See `Slots.params`."""
        return self._slots.params[moe_layer]

    def slot_grads(self, moe_layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Slots.grads`."""
        return self._slots.grads[moe_layer]

    def begin_step(self) -> None:
        """Set the gradients and the statistics to zero."""
        self._slots.zero_grads()
        self.local_tokens, self.compute_s, self.chunks = 0, 0.0, 1

    def statistics(self) -> ExpertStatistics:
        """Statistics of the calls since `begin_step`."""
        return ExpertStatistics(self.local_tokens, 0, self.compute_s, np.zeros(self.num_layers))

    def __call__(
        self,
        moe_layer: int,
        x_TD: torch.Tensor,
        expert_ids_TK: torch.Tensor,
        gates_TK: torch.Tensor,
        again: bool = False,
    ) -> torch.Tensor:
        self.before_experts()
        self._get_on()
        if not len(x_TD):
            return x_TD * gates_TK.sum(dim=1, keepdim=True)  # no rows, but a part of the graph
        slots_TK = expert_ids_TK if self._in_order else self._slot_LE[moe_layer][expert_ids_TK]
        rows, stacks = slots_TK.numel(), self.slot_params(moe_layer)
        chunks = max(1, -(-rows // self._most_rows)) if self._most_rows else 1
        started = time.perf_counter()
        if chunks == 1:
            y_TD = local_experts(x_TD, slots_TK, gates_TK, stacks, self._limit, direct=True, remake=self._remake)
        else:
            parts = zip(*(t.tensor_split(chunks) for t in (x_TD, slots_TK, gates_TK)), strict=True)
            y_TD = torch.cat([self._chunk(x, slots, gates, stacks) for x, slots, gates in parts])
        if not again:
            self.compute_s += time.perf_counter() - started
            self.local_tokens += rows
        self.chunks = max(self.chunks, chunks)
        if y_TD.requires_grad:
            y_TD.register_hook(lambda _: self._get_on())
        return y_TD

    def _chunk(
        self,
        x_TD: torch.Tensor,
        slots_TK: torch.Tensor,
        gates_TK: torch.Tensor,
        stacks: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        """A chunk whose rows are computed again in the backward pass."""
        arguments = (x_TD, slots_TK, gates_TK, stacks, self._limit, True)
        return checkpoint(local_experts, *arguments, use_reentrant=False, preserve_rng_state=False)

    def _get_on(self) -> None:
        """Show that this rank gets on where it needs no other one, and end here if the generation is over."""
        self._group.abort.check()
        self._group.activity[0] += 1
