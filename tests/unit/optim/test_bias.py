"""A router's bias moves against the load, and stays where the load is even."""

from __future__ import annotations

import torch

from elastic_moe.optim.bias import apply_bias
from elastic_moe.optim.unit_state import UnitState


def test_bias_moves_against_the_load() -> None:
    state = UnitState({"weight": torch.zeros(4)})
    apply_bias(state, torch.tensor([10.0, 0.0, 5.0, 5.0], dtype=torch.float64), 0.5)
    assert state.weight.tolist() == [-0.5, 0.5, 0.0, 0.0]
    apply_bias(state, torch.tensor([1, 1, 1, 2]), 0.25)
    assert state.weight.tolist() == [-0.25, 0.75, 0.25, -0.25]
    apply_bias(state, torch.zeros(4), 0.25)
    assert state.weight.tolist() == [-0.25, 0.75, 0.25, -0.25]


def test_bias_is_still_where_the_mean_is_no_fraction_of_two() -> None:
    state = UnitState({"weight": torch.zeros(3)})
    apply_bias(state, torch.tensor([7.0, 7.0, 7.0]), 1.0)
    assert state.weight.tolist() == [0.0, 0.0, 0.0]
