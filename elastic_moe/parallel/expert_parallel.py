"""Expert parallelism over an uneven, replicated placement: tokens travel to slots, outputs travel back.

No token is dropped and no row is padded. In each MoE layer one all-gather brings the counts, from which every rank
computes the same split over replicas. One uneven all-to-all sends the rows to their slots, another one sends the
outputs back, and the backward pass has the same two. Rows travel sorted by slot, so the receiver need only interleave
its sources. Each permutation is part of the transport's autograd function. Its backward pass is the inverse
permutation, a gather, and not the scatter-add that autograd would derive.

The rows that reach a rank may need more memory than allowed. Then the tokens are sent in chunks, one after the other.
The rows of a chunk are not kept for the backward pass but sent again. So a load of all tokens on one expert costs time
and no memory.

Shapes: T tokens, K experts per token, N = T * K rows sent, M rows computed here. P slots in the world, S slots here,
R ranks, D hidden, F expert hidden.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.checkpoint import checkpoint

from elastic_moe.config.schema import ModelConfig
from elastic_moe.model.backend import ExpertStatistics
from elastic_moe.model.experts.grouped import grouped_swiglu, weighted_sum
from elastic_moe.parallel.collectives.group import HOST, Group
from elastic_moe.parallel.reproducible import Grid, segmented_swiglu
from elastic_moe.parallel.row_exchange import BackwardWatch, FromSlots, Route, ToSlots, finish_own_work
from elastic_moe.parallel.slots import Slots, most_rows
from elastic_moe.parallel.transport import transport_for
from elastic_moe.plan.placement import Placement
from elastic_moe.plan.split import RankSplit, of_rank, positive_speeds, split_for_rank, split_tokens, split_whole


class ExpertParallel:
    """Expert backend of one generation on one rank; implements `model.backend.TrainableExperts`.

    Args:
        group: the generation's collectives.
        placement: experts in slots. Rows, and the counts of them, travel between the ranks that its `reach` names.
        cfg: the model's shape.
        device: of the slot weights.
        speeds: relative speed per rank, for the split; None for equal ones.
        grid: compute the rows from each rank to each expert as a product of their own, and sum the weights' gradients
            exactly; None: grouped, in fp32.
        memory_limit: bytes that one layer's rows may take on a rank, their part kept for the backward pass included; 0
            for no limit. It has no effect on exact sums, whose segments must be the same on any rank.
        by_node: one message per pair of nodes instead of one per pair of ranks.

    Attributes:
        before_experts: called before the slots' weights are used; may wait until they are there.
        local_tokens: rows that this rank's slots computed since `begin_step`.
        tokens_R: the same for every rank that its rows may reach.
        cross_node_rows: rows that this rank's tokens sent to other nodes, counted once for all ranks on rank 0.
        compute_s: seconds of this rank's experts in the forward passes.
        chunks: the largest number of chunks in which a layer's rows came.
    """

    def __init__(
        self,
        group: Group,
        placement: Placement,
        cfg: ModelConfig,
        device: torch.device,
        speeds: Sequence[float] | None = None,
        grid: Grid | None = None,
        memory_limit: int = 0,
        by_node: bool = False,
    ) -> None:
        self._ranks, self._world_rank = tuple(range(group.world_size)), group.rank
        speeds = speeds or [1.0] * group.world_size
        if placement.in_nodes or (placement.rows_apart and grid is None and device == HOST):
            self._ranks, placement = placement.reach(group.rank)
            group = group.subgroup("rows", self._ranks)  # gradients leave in the backward pass by the other one
        nodes = placement.node_of_rank
        self.before_experts: Callable[[], None] = lambda: None
        self.together, self.exact_times = True, False
        self._transport = transport_for(group, None if nodes is None else nodes.tolist(), by_node)
        self._most_rows = most_rows(memory_limit, cfg) if grid is None else 0
        self._group, self._placement, self._rank = group, placement, group.rank
        self._use(speeds)
        self._grid, self._limit, self._remake = grid, cfg.swiglu_limit, cfg.recompute == "selective"
        self._span = placement.slots_of(group.rank)
        self.num_layers, self.num_experts = placement.expert_of_slot.shape[0], cfg.num_experts
        num_slots = self._span.stop - self._span.start
        self._slots = Slots(self.num_layers, num_slots, cfg, device, exact=grid is not None)
        self._anchor = torch.zeros((), device=device, requires_grad=True)
        starts = [placement.slots_of(r).start for r in range(group.world_size)]
        self._bounds = np.array([*starts, len(placement.rank_of_slot)])
        self.begin_step()

    def adopt(self, placement: Placement, speeds: Sequence[float] | None = None) -> None:
        """Use another placement with the same slots. The caller then sets the weights of the slots anew.

        `speeds`: of the ranks, if they have changed.
        """
        _, placement = placement.reach(self._world_rank)
        assert np.array_equal(placement.rank_of_slot, self._placement.rank_of_slot)
        self._placement = placement
        if speeds:
            self._use(speeds)

    def _use(self, speeds: Sequence[float]) -> None:
        """Split tokens by these speeds of all ranks."""
        relative_R = positive_speeds(speeds, len(speeds))
        self._speeds = [relative_R[rank] for rank in self._ranks]

    def slot_params(self, moe_layer: int) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
        """See `Slots.params`."""
        return self._slots.params[moe_layer]

    def slot_grads(self, moe_layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Slots.grads`; fp64 with a grid."""
        return self._slots.grads[moe_layer]

    def begin_step(self) -> None:
        """Set the gradients and the statistics to zero."""
        self._slots.zero_grads()
        self.local_tokens = 0
        self.tokens_R = np.zeros(self._group.world_size, dtype=np.int64)
        self._mean_L, self._max_L = np.zeros(self.num_layers), np.zeros(self.num_layers)
        self.cross_node_rows, self.compute_s, self.chunks = 0, 0.0, 1
        self._watch = BackwardWatch(self.exact_times)

    def statistics(self) -> ExpertStatistics:
        """Statistics of the calls since `begin_step`."""
        dispatched_s = self.compute_s + self._watch.seconds
        return ExpertStatistics(self.local_tokens, self.cross_node_rows, self.compute_s, self._max_L, dispatched_s)

    @property
    def balance(self) -> float:
        """Mean over maximum of the times of these ranks with slots, over the calls since `begin_step`; 1 is perfect."""
        return float(self._mean_L.sum() / self._max_L.sum()) if self._max_L.any() else 1.0

    def __call__(
        self,
        moe_layer: int,
        x_TD: torch.Tensor,
        expert_ids_TK: torch.Tensor,
        gates_TK: torch.Tensor,
        again: bool = False,
    ) -> torch.Tensor:
        self.before_experts()
        split = self._split(expert_ids_TK, moe_layer)
        chunks = -(-int(self._per_rank(split.tokens_P).max()) // self._most_rows) if self._most_rows else 1
        self.chunks = max(self.chunks, chunks)
        if chunks <= 1:
            return weighted_sum(self._experts(moe_layer, x_TD, expert_ids_TK, split, again), gates_TK)
        outputs = []
        for x, ids in zip(x_TD.tensor_split(chunks), expert_ids_TK.tensor_split(chunks), strict=True):
            rows = x + 0 * self._anchor  # every rank joins the backward collectives, or none
            run = _CountedOnce(self._experts, again)
            outputs.append(checkpoint(run, moe_layer, rows, ids, None, use_reentrant=False, preserve_rng_state=False))
        return weighted_sum(torch.cat(outputs), gates_TK)

    def _experts(
        self,
        moe_layer: int,
        x_TD: torch.Tensor,
        expert_ids_TK: torch.Tensor,
        split: RankSplit | None,
        again: bool,
    ) -> torch.Tensor:
        """Outputs of the tokens' experts, [T, K, D]."""
        num_tokens, num_choices = expert_ids_TK.shape
        split = split or self._split(expert_ids_TK, moe_layer)
        if not again:
            self._count(moe_layer, self._per_rank(split.tokens_P), split.cross_node_tokens)
        route = self._route(expert_ids_TK, split, moe_layer, x_TD.device)
        rows_MD = ToSlots.apply(x_TD, self._anchor, self._transport, route)
        started = time.perf_counter()
        y_MD = self._compute(moe_layer, rows_MD, split.here_RS)
        if self.exact_times:
            finish_own_work(y_MD)
        if not again:
            self.compute_s += time.perf_counter() - started
        y_ND = FromSlots.apply(y_MD, self._transport, route)
        return y_ND.view(num_tokens, num_choices, x_TD.shape[1])

    def _split(self, expert_ids_TK: torch.Tensor, moe_layer: int) -> RankSplit:
        """The split of a layer's tokens over replicas, from the counts of all ranks; collective."""
        if self.exact_times:
            finish_own_work(expert_ids_TK)
        mine_E = torch.bincount(expert_ids_TK.reshape(-1), minlength=self.num_experts)
        counts_RE = self._group.all_gather(mine_E, device=HOST).numpy()
        placement, rank, speeds = self._placement, self._rank, self._speeds
        if self._grid is not None:
            return of_rank(split_whole(counts_RE, placement, moe_layer, speeds), placement, rank)
        if self._transport.needs_row_matrix:
            return of_rank(split_tokens(counts_RE, placement, moe_layer, speeds), placement, rank)
        return split_for_rank(counts_RE, placement, moe_layer, rank, speeds)

    def _compute(self, moe_layer: int, rows_MD: torch.Tensor, here_RS: NDArray[np.int64]) -> torch.Tensor:
        weights = self._slots.params[moe_layer]
        if self._grid is None:
            rows_S = torch.from_numpy(here_RS.sum(axis=0))
            return grouped_swiglu(rows_MD, rows_S, *weights, self._limit, direct=True, remake=self._remake)
        segments = [(slot, int(rows)) for slot, rows_R in enumerate(here_RS.T) for rows in rows_R]
        sums = self._slots.grads[moe_layer]
        return segmented_swiglu(rows_MD, segments, weights, sums, self._grid, self._limit, self._remake)

    def _count(self, moe_layer: int, tokens_R: NDArray[np.int64], far: int) -> None:
        self.tokens_R += tokens_R
        self.local_tokens += int(tokens_R[self._rank])
        self.cross_node_rows += far if self._rank == 0 else 0
        able_R = np.diff(self._bounds) > 0
        speed_R = np.array(self._speeds)
        self._mean_L[moe_layer] += float(tokens_R.sum()) / max(math.fsum(speed_R[able_R].tolist()), 1e-9)
        self._max_L[moe_layer] += float((tokens_R / speed_R).max())

    def _per_rank(self, rows_P: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows per slot -> rows per rank."""
        return np.diff(np.concatenate([[0], np.cumsum(rows_P)])[self._bounds])

    def _route(
        self,
        expert_ids_TK: torch.Tensor,
        split: RankSplit,
        moe_layer: int,
        device: torch.device,
    ) -> Route:
        mine_P, here_RS = split.sent_P, split.here_RS
        flat_N = expert_ids_TK.reshape(-1).cpu().numpy()
        order_N = _sending_order(flat_N, mine_P, self._placement.expert_of_slot[moe_layer])
        by_slot_M = _interleave(here_RS)
        plan = (order_N, _inverse(order_N), by_slot_M, _inverse(by_slot_M))
        order, undo, by_slot, by_source = (torch.from_numpy(t).to(device) for t in plan)
        sent, arrived = self._per_rank(mine_P).tolist(), here_RS.sum(axis=1).tolist()
        choices = expert_ids_TK.shape[1]
        return Route(order, undo, by_slot, by_source, sent, arrived, split.rows_RR, choices, self._watch)


class _CountedOnce:
    """Tells a function whether it was called before: a recomputation must not count its rows again."""

    def __init__(self, function: Callable[..., torch.Tensor], called: bool) -> None:
        self._function, self._called = function, called

    def __call__(self, *args: Any) -> torch.Tensor:
        again, self._called = self._called, True
        return self._function(*args, again)


def _sending_order(
    expert_N: NDArray[np.int64], split_P: NDArray[np.int64], expert_P: NDArray[np.int32]
) -> NDArray[np.int64]:
    """Rows by destination slot: each expert's rows, in order, are dealt to the expert's slots, in order."""
    by_expert_N = _stable_order(expert_N)
    slots = np.argsort(expert_P, kind="stable")  # slots of one expert side by side
    slot_N = np.repeat(slots, split_P[slots])
    return by_expert_N[_stable_order(slot_N)]


def _interleave(here_RS: NDArray[np.int64]) -> NDArray[np.int64]:
    """Permutation that brings rows received by (source, slot) into (slot, source) order."""
    sources, slots = here_RS.shape
    slot_M = np.repeat(np.tile(np.arange(slots), sources), here_RS.reshape(-1))
    return _stable_order(slot_M)


def _stable_order(keys_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """Permutation that sorts by keys >= 0, equal ones in their order; numpy sorts 16-bit keys in linear time."""
    short = len(keys_N) > 0 and keys_N.max() < 1 << 16
    return np.argsort(keys_N.astype(np.uint16) if short else keys_N, kind="stable")


def _inverse(permutation: NDArray[np.int64]) -> NDArray[np.int64]:
    inverse = np.empty_like(permutation)
    inverse[permutation] = np.arange(len(permutation))
    return inverse
