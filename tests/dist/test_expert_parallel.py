"""Expert parallelism against its slow twin, the backend that holds all experts: values and gradients.

Placements: uneven, replicated, with empty slots, a rank without slots, a rank without tokens, everything on one expert.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from elastic_moe.config.schema import ModelConfig
from elastic_moe.errors import GroupAborted
from elastic_moe.model.experts.local import LocalExperts
from elastic_moe.parallel.collectives.group import Group
from elastic_moe.parallel.expert_parallel import (
    ExpertParallel,
    _interleave,
    _inverse,
    _sending_order,
    _stable_order,
)
from elastic_moe.parallel.transport import ByNode
from elastic_moe.plan.placement import Placement, Topology, plan_placement
from tests.dist.ranks import Seat, alone, results

CONFIG = ModelConfig(
    hidden_size=16, num_layers=3, num_dense_layers=1, num_experts=6, experts_per_token=2, expert_hidden=8, vocab_size=32
)
LAYERS, EXPERTS, CHOICES = 2, CONFIG.num_experts, CONFIG.experts_per_token
CASES: dict[str, tuple[list[int], list[int]]] = {  # slots per rank, tokens per rank
    "even": ([2, 2, 2], [5, 5, 5]),
    "uneven_and_replicated": ([5, 3, 2], [9, 1, 4]),
    "rank_without_slots": ([4, 0, 4], [6, 7, 3]),
    "rank_without_tokens": ([3, 3, 3], [8, 0, 2]),
    "last_rank_has_nothing": ([6, 2, 0], [4, 3, 0]),
    "empty_slots": ([6, 6, 6], [3, 3, 3]),
    "nobody_has_tokens": ([2, 2, 2], [0, 0, 0]),
}


def _placement(slots: list[int], seed: int) -> Placement:
    load_LE = np.random.default_rng(seed).pareto(1.0, (LAYERS, EXPERTS)) + 0.1
    topology = Topology(tuple(f"node{r}" for r in range(len(slots))), (1.0,) * len(slots))
    placement = plan_placement(load_LE, topology, slots)
    if slots == [6, 6, 6]:  # leave some slots empty, but no expert without a copy
        for layer in range(LAYERS):
            placement.expert_of_slot[layer, 12:15] = -1
            placement.expert_of_slot[layer, 2] = -1
    return placement


def _tokens(total: int, seed: int, skewed: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(total, CONFIG.hidden_size, generator=generator)
    weights_E = torch.ones(EXPERTS)
    if skewed:
        weights_E[0] = 1000.0
    ids_TK = (
        torch.multinomial(weights_E.expand(total, -1), CHOICES, generator=generator)
        if total
        else torch.zeros(0, CHOICES, dtype=torch.int64)
    )
    return x_TD, ids_TK, torch.rand(total, CHOICES, generator=generator)


def _run_layers(backend: Any, x_TD: torch.Tensor, ids_TK: torch.Tensor, gates_TK: torch.Tensor) -> torch.Tensor:
    for layer in range(LAYERS):
        x_TD = x_TD + backend(layer, x_TD, ids_TK, gates_TK)
    return x_TD


def _gap(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max()) if a.numel() else 0.0


def _weight_gap(
    group: Group, parallel: ExpertParallel, twin: LocalExperts, expert_of_slot_LS: np.ndarray, kept: list[int]
) -> float:
    """Largest difference of the experts' gradients from the twin's, summed over all copies of an expert.

    The gradient tensors are those at the addresses `kept`, and empty slots have a gradient of zero.
    """
    gap = 0.0
    for layer in range(LAYERS):
        for mine, whole in zip(parallel.slot_params(layer), twin.slot_params(layer), strict=True):
            assert mine.grad is not None
            assert mine.grad.data_ptr() in kept
            summed = torch.zeros_like(whole)
            for slot, expert in enumerate(expert_of_slot_LS[layer]):
                if expert >= 0:
                    summed[int(expert)] += mine.grad[slot]
                else:
                    assert not mine.grad[slot].any()
            group.all_reduce(summed)
            gap = max(gap, _gap(summed, torch.zeros_like(whole) if whole.grad is None else whole.grad))
    return gap


def _one_case(group: Group, case: str, skewed: bool, most_rows: int = 0, nodes: str = "") -> dict[str, float]:
    """Largest differences from the twin that computes all ranks' tokens alone."""
    slots, tokens = CASES[case]
    rank, placement = group.rank, _placement(slots, seed=1)
    limit = most_rows * 4 * (3 * CONFIG.hidden_size + 4 * CONFIG.expert_hidden)
    twin = LocalExperts(CONFIG, seed=3)
    if nodes:
        placement = replace(placement, node_of_rank=np.array([ord(n) - ord("a") for n in nodes], dtype=np.int32))
    device = torch.device("cpu")
    parallel = ExpertParallel(group, placement, CONFIG, device, memory_limit=limit, by_node=bool(nodes))
    if nodes:
        assert isinstance(parallel._transport, ByNode)
    at_once: list[int] = []
    compute = parallel._compute

    def counted(layer: int, rows: Any, here: Any) -> Any:
        at_once.append(len(rows))
        return compute(layer, rows, here)

    parallel._compute = counted  # type: ignore[method-assign]
    span = placement.slots_of(rank)
    for layer in range(LAYERS):
        for mine, whole in zip(parallel.slot_params(layer), twin.slot_params(layer), strict=True):
            for slot, expert in enumerate(placement.expert_of_slot[layer, span]):
                if expert >= 0:
                    mine.data[slot].copy_(whole.data[int(expert)])
    kept = [grad.data_ptr() for layer in range(LAYERS) for grad in parallel.slot_grads(layer)]

    x_TD, ids_TK, gates_TK = _tokens(sum(tokens), 7, skewed)
    x_all, gates_all = x_TD.clone().requires_grad_(), gates_TK.clone().requires_grad_()
    y_all = _run_layers(twin, x_all, ids_TK, gates_all)
    weight_TD = torch.randn(y_all.shape, generator=torch.Generator().manual_seed(9))
    (y_all * weight_TD).sum().backward()

    share = slice(sum(tokens[:rank]), sum(tokens[: rank + 1]))
    x, gates = x_TD[share].clone().requires_grad_(), gates_TK[share].clone().requires_grad_()
    used = parallel._group
    before = used.completed
    y = _run_layers(parallel, x, ids_TK[share], gates)
    forward = used.completed - before
    (y * weight_TD[share]).sum().backward()
    backward = used.completed - before - forward

    assert x.grad is not None
    assert gates.grad is not None
    assert x_all.grad is not None
    assert gates_all.grad is not None
    return {
        "y": _gap(y.detach(), y_all.detach()[share]),
        "x_grad": _gap(x.grad, x_all.grad[share]),
        "gates_grad": _gap(gates.grad, gates_all.grad[share]),
        "weight_grad": _weight_gap(group, parallel, twin, placement.expert_of_slot[:, span], kept),
        "forward": forward,
        "backward": backward,
        "rows": parallel.local_tokens,
        "rows_world": int(parallel.tokens_R.sum()),
        "balance": parallel.balance,
        "at_once": max(at_once),
        "chunks": parallel.chunks,
    }


def _all_cases(seat: Seat) -> dict[tuple[str, bool], dict[str, float]]:
    group = seat.form(1, seat.rank, seat.world)
    found = {(case, skewed): _one_case(group, case, skewed) for case in CASES for skewed in (False, True)}
    group.close()
    return found


@pytest.fixture(scope="module")
def measured() -> list[dict[tuple[str, bool], dict[str, float]]]:
    """All cases on all ranks of one world, because starting processes takes most of the time."""
    return results(3, _all_cases)


@pytest.mark.parametrize("skewed", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_backend_that_holds_all_experts(
    measured: list[dict[tuple[str, bool], dict[str, float]]], case: str, skewed: bool
) -> None:
    found = [rank[case, skewed] for rank in measured]
    rows = sum(CASES[case][1]) * CHOICES * LAYERS
    for result in found:
        for name in ("y", "x_grad", "gates_grad", "weight_grad"):
            assert result[name] < 1e-5, name
        assert result["forward"] == 3 * LAYERS  # counts, rows there, rows back
        assert result["backward"] == 2 * LAYERS
        assert result["rows_world"] == rows
        assert 0 < result["balance"] <= 1
    assert sum(result["rows"] for result in found) == rows


def _in_chunks(seat: Seat) -> dict[str, float]:
    group = seat.form(2, seat.rank, seat.world)
    found = _one_case(group, "even", True, most_rows=4)
    group.close()
    return found


def test_rows_beyond_the_memory_limit_come_in_chunks() -> None:
    """Nearly all tokens on one expert: same values and gradients, and never many more rows at once than allowed."""
    found = results(3, _in_chunks)
    for result in found:
        assert result["chunks"] >= 3
        for name in ("y", "x_grad", "gates_grad", "weight_grad"):
            assert result[name] < 1e-5, name
        assert result["rows_world"] == sum(CASES["even"][1]) * CHOICES * LAYERS, "rows computed again are counted once"
        assert result["at_once"] <= 2 * 4, "chunks have equal tokens, not equal rows"


def _by_node(seat: Seat) -> dict[tuple[str, str], dict[str, float]]:
    group = seat.form(3, seat.rank, seat.world)
    cases = [(nodes, case) for nodes in ("aab", "aba", "abc", "abb") for case in CASES]
    found = {key: _one_case(group, key[1], True, nodes=key[0]) for key in cases}
    group.close()
    return found


def test_by_way_of_the_nodes_the_same_rows_arrive() -> None:
    for of_rank in results(3, _by_node):
        for key, result in of_rank.items():
            for name in ("y", "x_grad", "gates_grad", "weight_grad"):
                assert result[name] < 1e-5, (key, name)
            assert result["forward"] == LAYERS, "the counts; rows travel from rank to rank"


def _abort_by_node(seat: Seat) -> str:
    """A peer that stops: the others wait for its message until the abort."""
    group = seat.form(4, seat.rank, seat.world)
    if seat.rank == 1:
        return "stopped"
    threading.Timer(0.3, seat.abort.set, ("rank 1 stopped",)).start()
    rows_RR = np.full((3, 3), 2)
    with pytest.raises(GroupAborted):
        ByNode(group, [0, 1, 1])(torch.ones(6, 4), [2, 2, 2], [2, 2, 2], rows_RR)
    group.close()
    return "aborted"


def test_abort_ends_the_wait_for_a_message() -> None:
    assert results(3, _abort_by_node) == ["aborted", "stopped", "aborted"]


def _abort_in_backward(seat: Seat) -> str:
    """A peer that stops after the forward pass: the others wait in a backward collective until the abort."""
    group = seat.form(1, seat.rank, seat.world)
    placement = _placement([3, 3, 3], seed=1)
    parallel = ExpertParallel(group, placement, CONFIG, torch.device("cpu"))
    x_TD, ids_TK, gates_TK = _tokens(4, seat.rank, False)
    y = _run_layers(parallel, x_TD.requires_grad_(), ids_TK, gates_TK)
    if seat.rank == 1:
        return "stopped"
    threading.Timer(0.1, seat.abort.set, ("rank 1 stopped",)).start()
    with pytest.raises(GroupAborted):  # by the abort, or by the sockets of the process that ended
        y.sum().backward()
    group.close()
    return "aborted"


def test_abort_passes_through_autograd() -> None:
    assert results(3, _abort_in_backward) == ["aborted", "stopped", "aborted"]


def test_alone_without_gradients_of_the_input() -> None:
    group = alone()
    parallel = ExpertParallel(group, _placement([EXPERTS], 0), CONFIG, torch.device("cpu"))
    for tensor in parallel.slot_params(0):
        tensor.data.normal_()
    x_TD, ids_TK, gates_TK = _tokens(6, 0, False)
    before = group.completed
    parallel(0, x_TD, ids_TK, gates_TK).sum().backward()
    assert group.completed - before == 5  # the backward collectives run whether or not the input needs a gradient
    assert all(tensor.grad is not None and tensor.grad.abs().sum() > 0 for tensor in parallel.slot_params(0))
    parallel.begin_step()
    assert parallel.local_tokens == 0
    assert parallel.balance == 1.0


def test_rows_are_dealt_to_slots() -> None:
    expert_P = np.array([1, 0, 1, -1], dtype=np.int32)
    order_N = _sending_order(np.array([1, 0, 1, 1, 0]), np.array([1, 2, 2, 0]), expert_P)
    assert order_N.tolist() == [
        0,
        1,
        4,
        2,
        3,
    ]  # slot 0: first row of expert 1; slot 1: expert 0; slot 2: the rest of expert 1
    assert _inverse(order_N)[order_N].tolist() == [0, 1, 2, 3, 4]
    assert _interleave(np.array([[1, 2], [2, 0]])).tolist() == [0, 3, 4, 1, 2]


@pytest.mark.parametrize("largest", [3, 65_535, 65_536, 1 << 40])
def test_short_keys_sort_as_long_ones(largest: int) -> None:
    keys_N = np.random.default_rng(0).integers(0, largest, 5000, endpoint=True)
    keys_N[17] = largest
    assert np.array_equal(_stable_order(keys_N), np.argsort(keys_N, kind="stable"))
    assert _stable_order(keys_N[:0]).tolist() == []
