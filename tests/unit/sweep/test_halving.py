"""Asynchronous successive halving: the rungs, who ends, and a simulation beside the full sweep."""

from __future__ import annotations

import math
import random

import pytest

from elastic_moe.sweep.halving import Rungs, due, rungs_of


@pytest.mark.parametrize(
    ("steps", "first", "factor", "expected"),
    [(200, 0, 3, [22, 66, 198]), (90, 10, 3, [10, 30]), (90, 0, 2, [22, 44, 88]), (3, 0, 3, [1]), (5, 5, 2, [])],
)
def test_rungs_lie_before_the_end(steps: int, first: int, factor: int, expected: list[int]) -> None:
    assert rungs_of(steps, first, factor) == expected


def ends(rungs: Rungs, values: list[float]) -> list[bool]:
    """Whether each trial ends, in the order in which they come."""
    found = []
    for trial, value in enumerate(values):
        rungs.note(trial, 10, value)
        found.append(bool(rungs.behind(trial, 10)))
    return found


def test_the_first_goes_on_and_later_ones_only_among_the_best() -> None:
    assert ends(Rungs(3), [5.0, 6.0, 4.0, 4.5, 3.0, 3.5]) == [False, True, False, True, False, False]
    assert ends(Rungs(3, larger=True), [5.0, 6.0, 4.0]) == [False, False, True]


def test_what_is_not_finite_ends_and_beats_nobody() -> None:
    assert ends(Rungs(2), [math.nan, 4.0, math.inf, 5.0, 3.0]) == [True, False, True, False, False]


def test_the_objective_of_a_rung_is_the_first_at_or_after_it() -> None:
    assert due([10, 30, 90], [(5, 4.0), (10, 3.0), (20, 2.5), (35, 2.0)]) == [(10, 3.0), (30, 2.0)]
    assert due([10], []) == []


def test_a_simulated_sweep_keeps_the_best_and_spends_less() -> None:
    """27 trials whose order does not change while they train: the best is never ended, and most steps are saved."""
    for seed in range(30):
        chance = random.Random(seed)
        quality = [chance.random() for _ in range(27)]
        rungs, spent = Rungs(3), 0
        for trial, own in enumerate(quality):
            ended = 81
            for rung in rungs_of(81, 9, 3):
                rungs.note(trial, rung, own + 1 / rung)
                if rungs.behind(trial, rung):
                    ended = rung
                    break
            spent += ended
            assert ended == 81 or own > min(quality)
        assert spent < 27 * 81 * 0.6
