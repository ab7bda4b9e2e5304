"""Stochastic rounding to bf16: neighbours only, right in the mean, the same again, and the same on every device."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from elastic_moe.runtime.exchange import rounding
from elastic_moe.runtime.exchange.rounding import StochasticRounding, rounded

ROUNDING = StochasticRounding(seed=7, rank=2, bucket=1)
HALF_WAY = torch.cat([torch.arange(-50.0, 50.0) * 2.0**-7 + 1.3, torch.tensor([1e-30, -1e-38, 3e38, 1e-42])])


def packed(values: torch.Tensor, step: int = 1, how: StochasticRounding = ROUNDING) -> torch.Tensor:
    sent = torch.empty(values.numel(), dtype=torch.bfloat16)
    how.pack(values.split(37), sent, step)
    return sent


def test_numbers_go_to_one_of_their_neighbours() -> None:
    down = (HALF_WAY.view(torch.int32) & -65536).view(torch.float32)  # toward zero
    up = (down.view(torch.int32) + 65536).view(torch.float32)
    seen = torch.stack([packed(HALF_WAY, step).float() for step in range(200)])
    assert ((seen == down) | (seen == up)).all()
    between = down != HALF_WAY
    assert ((seen == up).any(0) == between).all()
    assert (seen == down).any(0).all()


def test_the_mean_is_the_number_itself() -> None:
    """Over steps, over ranks, over buckets and over places; five standard deviations of the mean at most."""
    number, gap, count = 1.0 + 0.3 * 2.0**-7, 2.0**-7, 4096
    bound = 5 * gap * math.sqrt(0.3 * 0.7 / count)
    one = torch.tensor([number])
    assert abs(packed(torch.full((count,), number)).double().mean() - number) < bound
    ways: list[Callable[[int], torch.Tensor]] = [
        lambda k: packed(one, step=k),
        lambda k: packed(one, how=StochasticRounding(0, k, 0)),
        lambda k: packed(one, how=StochasticRounding(0, 0, k)),
        lambda k: packed(one, how=StochasticRounding(k, 0, 0)),
    ]
    for way in ways:
        assert abs(np.mean([way(k).item() for k in range(count)]) - number) < bound


def test_errors_of_neighbours_are_independent() -> None:
    values = torch.rand(1 << 16, generator=torch.Generator().manual_seed(0)) + 1
    error = (packed(values).double() - values.double()).numpy()
    other = (packed(values, step=2).double() - values.double()).numpy()
    pairs = [(error[:-shift], error[shift:]) for shift in (1, 2, 3, 37, 4096)] + [(error, other)]
    for a, b in pairs:
        assert abs(np.corrcoef(a, b)[0, 1]) < 5 / math.sqrt(len(a))


def test_what_bf16_has_stays_as_it_is() -> None:
    every = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    found = packed(every.float())
    nan = every.isnan()
    assert torch.equal(found.isnan(), nan)
    assert torch.equal(found[~nan].view(torch.int16), every[~nan].view(torch.int16)), "zeros keep their signs"
    narrow_nan = torch.tensor([0x7F800001, -1, -0x7FFFFF], dtype=torch.int32).view(torch.float32)
    assert narrow_nan.isnan().all()
    assert packed(narrow_nan).isnan().all(), "a NaN whose bits bf16 lacks"


def test_sums_are_rounded_where_they_lie_and_only_once() -> None:
    sums, before = HALF_WAY.clone(), HALF_WAY.clone()
    ROUNDING.round_sums(sums.split(50), 3)
    assert torch.equal(sums, sums.bfloat16().float())
    assert not torch.equal(sums, before)
    again = sums.clone()
    ROUNDING.round_sums(again.split(29), 4)
    assert torch.equal(again, sums)


def test_the_same_step_is_rounded_the_same_way_however_it_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = torch.empty(HALF_WAY.numel(), dtype=torch.bfloat16)
    ROUNDING.pack([HALF_WAY], whole, 1)
    assert torch.equal(packed(HALF_WAY), whole)
    monkeypatch.setattr(rounding, "SPAN", 7)
    assert torch.equal(packed(HALF_WAY), whole)
    assert not torch.equal(packed(HALF_WAY, 2), whole)


@pytest.mark.parametrize(("key", "start"), [(0, 0), (2**32 - 1, 5), (123_456_789, 2**31 - 3), (1, 2**32 - 20)])
def test_passes_of_torch_have_the_bits_of_the_loop(key: int, start: int) -> None:
    """They serve GPUs; here they run on the CPU."""
    bits = torch.randint(-(2**31), 2**31, (5000,), generator=torch.Generator().manual_seed(1)).to(torch.int32)
    bits[:3] = torch.tensor([0x7F800001, 0x7F800000, -8388608])
    values = bits.view(torch.float32)
    mine = values.clone()
    rounding._round_in_place(rounding._bits(mine), np.uint32(key), start)
    assert torch.equal(rounded(values, key, start).view(torch.int32), mine.view(torch.int32))
    sent = torch.empty(5000, dtype=torch.bfloat16)
    rounding._round_to(rounding._bits(values), sent.view(torch.int16).numpy().view(np.uint16), np.uint32(key), start)
    assert torch.equal(sent.view(torch.int16), (mine.view(torch.int32) >> 16).to(torch.int16))
