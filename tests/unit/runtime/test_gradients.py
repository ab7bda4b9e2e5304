"""The sums over micro-batches: those of autograd, or exact ones whose bits do not depend on the order."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from elastic_moe.parallel.reproducible import Grid
from elastic_moe.runtime.gradients import DenseGradients


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, 3, generator=generator) * 10.0**scale for scale in (-3, 0, 1)]


def sums(order: list[torch.Tensor], grid: Grid | None) -> dict[str, torch.Tensor]:
    model = nn.Linear(3, 2, bias=False)
    gradients = DenseGradients(model, grid)
    gradients.zero()
    for batch in order:
        model(batch).pow(1).sum().backward()
        gradients.add()
    return gradients.tensors


def test_sums_are_autograds() -> None:
    expected = torch.cat(batches()).sum(dim=0).expand(2, 3)
    for grid in (None, Grid(12)):
        (total,) = sums(batches(), grid).values()
        torch.testing.assert_close(total.float(), expected)


def test_with_a_grid_the_order_does_not_matter() -> None:
    (forward,), (backward,) = (sums(order, Grid(12)).values() for order in (batches(), batches()[::-1]))
    assert forward.dtype == torch.float64
    assert torch.equal(forward, backward)


def test_zero_begins_a_new_step_in_the_same_tensors() -> None:
    for grid in (None, Grid(12)):
        model = nn.Linear(3, 2, bias=False)
        gradients = DenseGradients(model, grid)
        (place,) = (tensor.data_ptr() for tensor in gradients.tensors.values())
        for _ in range(2):
            gradients.zero()
            model(torch.ones(1, 3)).sum().backward()
            gradients.add()
            (total,) = gradients.tensors.values()
            assert torch.equal(total.float(), torch.ones(2, 3))
            assert total.data_ptr() == place


def test_one_value_that_is_not_finite_is_found() -> None:
    for grid in (None, Grid(12)):
        for value in (float("nan"), float("inf"), float("-inf")):
            model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 5))
            gradients = DenseGradients(model, grid)
            gradients.zero()
            assert gradients.finite()
            list(gradients.tensors.values())[-1].view(-1)[3] = value
            assert not gradients.finite()
            gradients.zero()
            assert gradients.finite()
            for total in gradients.tensors.values():
                total.fill_(1e30)
            assert gradients.finite(), "only their lengths overflow"


def test_a_gradient_that_was_added_is_told() -> None:
    """Each parameter once, when its sum is complete, and nobody is told any more after an error."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    gradients, told = DenseGradients(model, None), list[tuple[str, float]]()
    total = {name: tensor.sum for name, tensor in gradients.tensors.items()}

    def listen(name: str) -> None:
        told.append((name, float(total[name]())))

    model(torch.ones(1, 3)).sum().backward()
    with gradients.telling(listen):
        model(torch.ones(1, 3)).sum().backward()
    assert sorted(told) == sorted((name, float(tensor.sum())) for name, tensor in gradients.tensors.items())
    assert [name[0] for name, _ in told] == ["1", "1", "0", "0"]
    with pytest.raises(ZeroDivisionError), gradients.telling(lambda _: 1 / 0):
        model(torch.ones(1, 3)).sum().backward()
    model(torch.ones(1, 3)).sum().backward()
    assert len(told) == 4
