"""Gradients that leave in the backward pass are the whole gradients: their sums are those of a reduction after it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from elastic_moe.config.schema import ModelConfig
from elastic_moe.model.params import param_specs
from elastic_moe.model.transformer import Transformer
from elastic_moe.optim.unit_state import UnitState
from elastic_moe.parallel.expert_parallel import ExpertParallel
from elastic_moe.parallel.experts import experts_of
from elastic_moe.plan.placement import Placement
from elastic_moe.plan.shares import Batching
from elastic_moe.plan.state import buckets
from elastic_moe.plan.state.ownership import NONE, plan_ownership
from elastic_moe.plan.state.units import build_units
from elastic_moe.runtime.exchange import reduce as reduce_module
from elastic_moe.runtime.gradients import DenseGradients
from elastic_moe.runtime.initial import InitialWeights
from elastic_moe.runtime.session import ContextBuilder
from elastic_moe.runtime.state import HeldState
from elastic_moe.types import Member, View
from tests.dist.ranks import Seat, results

WORLD, SEQ = 3, 12
SMALL = ModelConfig(
    vocab_size=48, end_token=3, hidden_size=16, num_layers=3, num_heads=2, num_kv_heads=1, head_dim=8, rope_dim=4,
    value_dim=8, kv_latent=8, dense_hidden=24, num_experts=4, experts_per_token=2, expert_hidden=8,
)  # fmt: skip
MHC = replace(SMALL, residual="mhc", num_streams=2, readout="learned")
COMPRESSED = replace(
    MHC, attention="csa", num_hash_layers=1, query_latent=16, output_latent=8, index_heads=2, index_dim=8, window=4,
    csa_rate=2, hca_rate=4, index_topk=4, document_mask=True, layer_kinds=["sliding", "csa", "hca"],
)  # fmt: skip
MODELS = {
    "plain": SMALL,
    "latent": replace(SMALL, attention="mla", query_latent=8, seq_balance_weight=0.01, router_z_loss=0.01),
    "mtp": replace(SMALL, mtp_depth=1, z_loss=0.01),
    "mhc": replace(MHC, mtp_depth=1),
    "segments": replace(MHC, stream_segment=-1),
    "hc": replace(MHC, residual="hc"),
    "compressed": COMPRESSED,
    "selective": replace(MHC, recompute="selective"),
    "full": replace(MHC, recompute="full", mtp_depth=1),
    "two layers at once": replace(SMALL, recompute="2"),
    "chunked logits": replace(SMALL, logits_gib=1e-9, mtp_depth=1),
}
APART = ("plain", "mtp", "mhc", "selective", "full")  # also where rows travel
SEQUENCES = {0: [3, 2], 1: [2, 0], 2: [0, 0]}  # rank -> of each micro-batch: one rank ends with none, one has none


def _everywhere(cfg: ModelConfig) -> Placement:
    experts = np.tile(np.arange(cfg.num_experts, dtype=np.int32), WORLD)
    home = np.arange(cfg.num_experts, dtype=np.int32) % WORLD
    return Placement(
        np.tile(experts, (cfg.num_moe_layers, 1)),
        np.repeat(np.arange(WORLD, dtype=np.int32), cfg.num_experts),
        np.tile(home, (cfg.num_moe_layers, 1)),
    )


def _in_nodes(cfg: ModelConfig) -> Placement:
    """The two ranks of the first node have half of the experts each, and the one of the second node has all."""
    experts, half = np.arange(cfg.num_experts, dtype=np.int32), cfg.num_experts // 2
    return Placement(
        np.tile(experts, (cfg.num_moe_layers, 2)),
        np.repeat(np.arange(WORLD, dtype=np.int32), [half, half, cfg.num_experts]),
        np.tile(np.array([0] * half + [1] * (half - 1) + [2], dtype=np.int32), (cfg.num_moe_layers, 1)),
        np.array([0, 0, 1], dtype=np.int32),
        in_nodes=True,
    )


def _between_nodes(cfg: ModelConfig) -> Placement:
    """Each rank, on a node of its own, has some experts; the last one has a second copy of the first expert."""
    home = np.arange(cfg.num_experts, dtype=np.int32) % WORLD
    experts = [*(expert for rank in range(WORLD) for expert in np.flatnonzero(home == rank)), 0]
    return Placement(
        np.tile(np.array(experts, np.int32), (cfg.num_moe_layers, 1)),
        np.array([*np.sort(home), WORLD - 1], np.int32),
        np.tile(home, (cfg.num_moe_layers, 1)),
        np.arange(WORLD, dtype=np.int32),
    )


PLACEMENTS = {"everywhere": _everywhere, "in nodes": _in_nodes, "between nodes": _between_nodes}


class _Rank:
    """A rank with its model, and the state that it holds. `where`: the experts are, and rows travel."""

    def __init__(self, seat: Seat, cfg: ModelConfig, dtype: torch.dtype, where: str, rounding_seed: int | None) -> None:
        self.group, self.dtype = seat.form(1, seat.rank, seat.world), dtype
        specs, placement = param_specs(cfg), PLACEMENTS[where](cfg)
        units, initial = build_units(specs, 200), InitialWeights(cfg, specs, 0)
        nodes = ["a", "a", "b"] if where == "in nodes" else ["a", "b", "c"]
        view = View(1, tuple(Member(f"w{r}", nodes[r], r) for r in range(WORLD)))
        ownership = plan_ownership(units, view, np.full((WORLD, len(units)), NONE, np.uint8), 1, placement.home)
        device, roles_U = torch.device("cpu"), ownership.role(seat.rank)
        self.held = HeldState.build(units, roles_U, lambda u: UnitState.initial(units[u], initial(units[u])), device)
        self.experts = experts_of(self.group, placement, cfg, device)
        assert isinstance(self.experts, ExpertParallel) == (where != "everywhere")
        self.model = Transformer(cfg, self.experts)
        self.dense = DenseGradients(self.model, None)
        builder = ContextBuilder(
            units, self.model, self.dense.tensors, cfg.num_moe_layers, Batching(WORLD, 1), dtype, rounding_seed
        )
        context = builder.build(view, self.group, self.experts, self.held, ownership, placement)
        assert context.layout.early_bucket_U is not None
        self.buckets = int(context.layout.early_bucket_U.max()) + 1
        self.exchanger = context.exchanger
        self.exchanger.publish(frozen=True)

    def reduced(self, seed: int, early: bool) -> tuple[float, list[torch.Tensor], int]:
        """The norm and the gradients of a step, and how many buckets left before its backward pass ended."""
        self.experts.begin_step()
        self.dense.zero()
        sizes = SEQUENCES[self.group.rank]
        for number, size in enumerate(sizes):
            generator = torch.Generator().manual_seed(100 * seed + 10 * number + self.group.rank)
            tokens = torch.randint(48, (size, SEQ + 1), generator=generator)
            with self._autocast():
                out = self.model.loss(tokens[:, :-1], tokens[:, 1:])
            with self.dense.telling(self.exchanger.early(seed) if early and number == len(sizes) - 1 else None):
                out.loss_sum.backward()
        begun = self.exchanger._reducer._begun
        square = self.exchanger.reduce(seed)
        self.exchanger.mirror()
        held = [torch.cat(list(self.held.grads.pieces(u))).clone() for u in sorted(self._trained())]
        return square, held, begun

    def _trained(self) -> list[int]:
        return [u for u in self.held.states if self.held.units[u].rule.has_gradient]

    def _autocast(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.dtype == torch.float32 else torch.autocast("cpu", self.dtype)


def _both_ways(
    seat: Seat,
    cfg: ModelConfig,
    dtype: torch.dtype,
    room: int,
    where: str = "everywhere",
    rounding_seed: int | None = None,
) -> tuple[int, list[int]]:
    buckets.EARLY_ELEMENTS, buckets.MESSAGE_ELEMENTS, reduce_module.ROOM_BYTES = 400, 1, room
    rank, begun = _Rank(seat, cfg, dtype, where, rounding_seed), list[int]()
    for seed in range(2):
        late, early = (rank.reduced(seed, early) for early in (False, True))
        assert late[2] == 0
        assert early[0] == late[0] > 0
        assert all(map(torch.equal, early[1], late[1]))
        assert any(tensor.any() for tensor in late[1])
        begun.append(early[2])
    rank.group.close()
    return rank.buckets, begun


@pytest.mark.parametrize(
    ("name", "where"),
    [
        *((name, "everywhere") for name in MODELS),
        *((name, where) for name in APART for where in PLACEMENTS if where[0] != "e"),
    ],
)
def test_gradients_that_leave_early_are_complete(name: str, where: str) -> None:
    for count, begun in results(WORLD, _both_ways, MODELS[name], torch.float32, 1 << 26, where):
        assert count >= 4
        assert min(begun) == count, "the last bucket left within the backward pass too"


@pytest.mark.parametrize("name", ["plain", "full"])
def test_gradients_of_bf16_weights(name: str) -> None:
    results(WORLD, _both_ways, MODELS[name], torch.bfloat16, 1 << 26)


@pytest.mark.parametrize("where", PLACEMENTS)
def test_gradients_that_are_rounded(where: str) -> None:
    results(WORLD, _both_ways, MODELS["mhc"], torch.float32, 1 << 26, where, 5)


@pytest.mark.parametrize("where", PLACEMENTS)
def test_little_room_for_what_is_under_way(where: str) -> None:
    """Then ranks wait for one another's buckets within the pass, between the exchanges of rows."""
    results(WORLD, _both_ways, MODELS["plain"], torch.float32, 1, where)
