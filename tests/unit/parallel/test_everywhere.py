"""Experts with a copy on every rank against those behind a dispatch: values, gradients, statistics."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from elastic_moe.config.schema import ModelConfig
from elastic_moe.errors import GroupAborted
from elastic_moe.model.backend import TrainableExperts
from elastic_moe.parallel.collectives.abort import AbortSignal
from elastic_moe.parallel.collectives.backend import GroupMember
from elastic_moe.parallel.collectives.group import Group
from elastic_moe.parallel.collectives.store import Rendezvous
from elastic_moe.parallel.everywhere import ExpertsEverywhere
from elastic_moe.parallel.expert_parallel import ExpertParallel
from elastic_moe.parallel.experts import experts_of
from elastic_moe.parallel.reproducible import Grid
from elastic_moe.plan.placement import Placement

CONFIG = ModelConfig(
    hidden_size=16, num_layers=3, num_dense_layers=1, num_experts=6, experts_per_token=3, expert_hidden=8, vocab_size=32
)
CPU, TOKENS = torch.device("cpu"), 11
ORDERS = {  # experts in slots, per layer
    "in order": [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]],
    "mixed, with empty slots": [[4, -1, 0, 5, 2, 1, 3, -1], [-1, 3, 2, 1, -1, 0, 5, 4]],
}


def alone(abort: AbortSignal | None = None) -> Group:
    return Group(GroupMember(1, 0, 1), Rendezvous("nowhere", 0, "", 1.0), abort or AbortSignal())


def placed(experts_LS: list[list[int]]) -> Placement:
    slots = len(experts_LS[0])
    homes = np.zeros((len(experts_LS), CONFIG.num_experts), np.int32)
    return Placement(np.array(experts_LS, np.int32), np.zeros(slots, np.int32), homes)


def fill(experts: TrainableExperts, experts_LS: list[list[int]]) -> None:
    """Give each expert the same weights in whatever slot it is."""
    for layer, expert_S in enumerate(experts_LS):
        for slot, expert in enumerate(expert_S):
            for number, stack in enumerate(experts.slot_params(layer)):
                generator = torch.Generator().manual_seed(100 * layer + 10 * expert + number)
                stack.data[slot] = torch.randn(stack.shape[1:], generator=generator) * 0.3


def tokens() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    x_TD = torch.randn(TOKENS, CONFIG.hidden_size, generator=generator)
    ids_TK = torch.stack([torch.randperm(6, generator=generator)[:3] for _ in range(TOKENS)])
    return x_TD.requires_grad_(), ids_TK, torch.rand(TOKENS, 3, generator=generator).requires_grad_()


def trained(experts: TrainableExperts, experts_LS: list[list[int]], twice: bool = False) -> list[torch.Tensor]:
    """Output, gradients of tokens and gates, and those of the weights by expert."""
    fill(experts, experts_LS)
    experts.begin_step()
    x, ids, gates = tokens()
    for _ in range(1 + twice):
        y = x + experts(0, x, ids, gates)
        y = y + experts(1, y, ids, gates)
        (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    assert x.grad is not None
    assert gates.grad is not None
    slots = [expert_S.index(e) for expert_S in experts_LS for e in range(CONFIG.num_experts)]
    layers = [layer for layer in range(len(experts_LS)) for _ in range(CONFIG.num_experts)]
    weights = [g[s] for layer, s in zip(layers, slots, strict=True) for g in experts.slot_grads(layer)]
    return [y.detach(), x.grad, gates.grad, *weights]


@pytest.mark.parametrize("memory_limit", [0, 4 * (3 * 16 + 4 * 8) * 7])
@pytest.mark.parametrize("order", ORDERS)
def test_equals_the_dispatched_way(order: str, memory_limit: int) -> None:
    slots = ORDERS[order]
    local = experts_of(alone(), placed(slots), CONFIG, CPU, memory_limit=memory_limit)
    assert isinstance(local, ExpertsEverywhere)
    dispatched = ExpertParallel(alone(), placed(slots), CONFIG, CPU)
    kept = [grad.data_ptr() for layer in range(2) for grad in local.slot_grads(layer)]
    pairs = zip(trained(local, slots, True), trained(dispatched, slots, True), strict=True)
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    assert kept == [grad.data_ptr() for layer in range(2) for grad in local.slot_grads(layer)]
    assert local.chunks == (5 if memory_limit else 1)
    ours, others = local.statistics(), dispatched.statistics()
    assert (ours.local_tokens, ours.cross_node_rows) == (others.local_tokens, others.cross_node_rows)
    assert ours.compute_s > 0
    assert not ours.slowest_L.any(), "no rows travel"
    assert others.slowest_L.tolist() == [others.local_tokens / 2] * 2


def test_slots_do_not_change_the_bits() -> None:
    first, second = (trained(experts_of(alone(), placed(s), CONFIG, CPU), s) for s in ORDERS.values())
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_another_placement_with_the_same_slots() -> None:
    slots = ORDERS["in order"]
    experts = experts_of(alone(), placed([list(reversed(s)) for s in slots]), CONFIG, CPU)
    experts.adopt(placed(slots))
    fresh = experts_of(alone(), placed(slots), CONFIG, CPU)
    for a, b in zip(trained(experts, slots), trained(fresh, slots), strict=True):
        assert torch.equal(a, b)


def test_a_layer_without_tokens() -> None:
    experts = experts_of(alone(), placed(ORDERS["in order"]), CONFIG, CPU)
    x = torch.zeros(0, CONFIG.hidden_size, requires_grad=True)
    y = experts(0, x, torch.zeros(0, 3, dtype=torch.int64), torch.zeros(0, 3))
    y.sum().backward()
    assert y.shape == x.shape
    assert experts.statistics().local_tokens == 0


def test_exact_sums_are_computed_as_at_any_world_size() -> None:
    experts = experts_of(alone(), placed(ORDERS["in order"]), CONFIG, CPU, grid=Grid(64))
    assert isinstance(experts, ExpertParallel)
    assert experts.slot_grads(0)[0].dtype == torch.float64


def test_the_end_of_the_generation_ends_either_pass() -> None:
    abort, activity = AbortSignal(), [0]
    group = Group(GroupMember(1, 0, 1), Rendezvous("nowhere", 0, "", 1.0), abort, activity)
    experts = experts_of(group, placed(ORDERS["in order"]), CONFIG, CPU)
    x, ids, gates = tokens()
    y = experts(0, x, ids, gates)
    forward = activity[0]
    y.sum().backward(retain_graph=True)
    assert 0 < forward < activity[0], "heartbeats see that both passes get on"
    abort.set("the view is over")
    with pytest.raises(GroupAborted):
        y.sum().backward()
    with pytest.raises(GroupAborted):
        experts(0, x, ids, gates)
