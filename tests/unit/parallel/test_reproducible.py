"""Exact sums: independent of order and grouping, and the same numbers as ordinary ones up to rounding."""

from __future__ import annotations

import random

import pytest
import torch

from elastic_moe.model.experts.grouped import grouped_swiglu
from elastic_moe.parallel.reproducible import Grid, segmented_swiglu

HIDDEN, WIDTH, SLOTS = 16, 8, 3


@pytest.mark.parametrize("tokens", [1, 4096, 1_000_000])
def test_grid_sums_do_not_depend_on_order_or_grouping(tokens: int) -> None:
    parts = [torch.randn(1000) * tokens * 10.0 ** random.Random(i).uniform(-9, 0) for i in range(12)]
    grid = Grid(tokens)

    def summed(order: list[int], groups: int) -> torch.Tensor:
        totals = [torch.zeros(1000, dtype=torch.float64) for _ in range(groups)]
        for n, i in enumerate(order):
            grid.add(totals[n % groups], parts[i])
        result = totals[0]
        for total in totals[1:]:
            result = result + total
        return result

    expected = summed(list(range(12)), 1)
    for seed in range(20):
        order = random.Random(seed).sample(range(12), 12)
        assert torch.equal(summed(order, 1 + seed % 5), expected)
    plain = torch.stack(parts).double().sum(dim=0)
    torch.testing.assert_close(expected, plain, rtol=0, atol=12 * tokens * 2.0**-42)


def test_elements_beyond_the_range_are_still_summed_in_fp64() -> None:
    total = torch.zeros(1, dtype=torch.float64)
    Grid(16).add(total, torch.tensor([3.0e30]))
    assert total.item() == torch.tensor(3.0e30).item()
    Grid(16).add(total, torch.tensor([float("nan")]))
    assert torch.isnan(total).all()


def _case(segments: list[tuple[int, int]]) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    torch.manual_seed(0)
    shapes = ((SLOTS, 2 * WIDTH, HIDDEN), (SLOTS, HIDDEN, WIDTH))
    weights = tuple(torch.randn(shape).requires_grad_() for shape in shapes)
    sums = tuple(torch.zeros(shape, dtype=torch.float64) for shape in shapes)
    return torch.randn(sum(rows for _, rows in segments), HIDDEN), weights, sums


@pytest.mark.parametrize("segments", [[(0, 2), (0, 3), (1, 0), (2, 4)], [(1, 5)], [(0, 0), (2, 0)], []])
def test_segments_equal_the_grouped_twin(segments: list[tuple[int, int]]) -> None:
    x_MD, weights, sums = _case(segments)
    ours, theirs = x_MD.clone().requires_grad_(), x_MD.clone().requires_grad_()
    y_MD = segmented_swiglu(ours, segments, weights, sums, Grid(16))  # type: ignore[arg-type]
    counts = torch.tensor([sum(rows for slot, rows in segments if slot == s) for s in range(SLOTS)])
    expected = grouped_swiglu(theirs, counts, *weights)
    torch.testing.assert_close(y_MD, expected)
    factor = torch.randn(y_MD.shape)
    (y_MD * factor).sum().backward()
    (expected * factor).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    for total, weight in zip(sums, weights, strict=True):
        grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        torch.testing.assert_close(total.float(), grad, rtol=1e-5, atol=1e-5)


def test_a_piece_has_the_same_bits_in_any_company() -> None:
    x_MD, weights, together = _case([(0, 37), (0, 5), (2, 11)])
    alone = tuple(torch.zeros_like(t) for t in together)
    grid, rows = Grid(16), [37, 5, 11]
    y_MD = segmented_swiglu(x_MD.requires_grad_(), [(0, 37), (0, 5), (2, 11)], weights, together, grid)  # type: ignore[arg-type]
    y_MD.sum().backward()
    for x, y, slot in zip(x_MD.detach().split(rows), y_MD.split(rows), [0, 0, 2], strict=True):
        single = segmented_swiglu(x.clone().requires_grad_(), [(slot, len(x))], weights, alone, grid)  # type: ignore[arg-type]
        assert torch.equal(single, y)
        single.sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))
