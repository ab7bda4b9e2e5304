"""Schedules of the soak: drawn from the seed alone, within the run, and with every kind of fault."""

from __future__ import annotations

from scripts.benchmarks.chaos_faults import FATAL, WEIGHTS, schedule

STEPS = 120


def test_a_seed_gives_one_schedule_and_seeds_differ() -> None:
    assert schedule(7, STEPS) == schedule(7, STEPS)
    assert len({str(schedule(seed, STEPS)) for seed in range(50)}) == 50


def test_faults_are_within_the_run_and_one_of_them_at_most_ends_it() -> None:
    for seed in range(300):
        faults = schedule(seed, STEPS)
        steps = [fault["step"] for fault in faults]
        assert steps == sorted(steps)
        assert steps[0] >= 2
        assert steps[-1] < STEPS
        assert sum(fault["kind"] in FATAL for fault in faults) <= 1


def test_every_kind_is_drawn_and_none_that_is_left_out() -> None:
    drawn = {fault["kind"] for seed in range(100) for fault in schedule(seed, STEPS)}
    assert drawn == set(WEIGHTS)
    without = tuple(kind for kind in WEIGHTS if not kind.startswith("reset"))
    assert {fault["kind"] for seed in range(100) for fault in schedule(seed, STEPS, without)} == set(without)
