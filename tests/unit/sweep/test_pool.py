"""The pool of workers: exhaustively over small cases, and as a simulation of whole sweeps."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest

from elastic_moe.sweep.pool import Steady, Want, allocate

SHAPES = [(least, most, priority) for least in (1, 2, 3) for most in (1, 3) for priority in (0, 1) if least <= most]


def small_cases() -> list[tuple[list[Want], int, int]]:
    """Every three trials of these shapes, with what they may have been given before, on every small cluster."""
    found = []
    for shapes in itertools.product(SHAPES, repeat=3):
        for had in itertools.product((0, 1), repeat=3):
            wants = [Want(n, *shape, shape[0] * has) for n, (shape, has) in enumerate(zip(shapes, had, strict=True))]
            found += [(wants, capacity, limit) for capacity in range(6) for limit in (0, 1, 2)]
    return found


def turn(want: Want) -> tuple[int, bool, int]:
    return -want.priority, want.has == 0, want.trial


def test_every_small_case_keeps_the_rules() -> None:
    for wants, capacity, limit in small_cases():
        given = allocate(wants, capacity, limit)
        case = f"{wants} {capacity} {limit}: {given}"
        admitted = [want for want in wants if given[want.trial]]
        out = [want for want in wants if not given[want.trial] and want.least <= capacity]
        assert sum(given.values()) <= capacity, case
        assert all(want.least <= given[want.trial] <= want.most for want in admitted), case
        assert not limit or len(admitted) <= limit, case
        idle = capacity - sum(given.values())
        assert not idle or all(given[want.trial] == want.most for want in admitted), f"idle workers: {case}"
        if out:
            first = min(out, key=turn)
            assert all(turn(want) < turn(first) for want in admitted), f"it was overtaken: {case}"
            assert len(admitted) == limit or sum(w.least for w in admitted) + first.least > capacity, case
        for one, other in itertools.permutations(admitted, 2):
            if one.priority > other.priority and given[other.trial] > other.least:
                assert given[one.trial] == one.most, f"priority: {case}"


def test_it_is_steady() -> None:
    """What was given is given again, so no worker moves while nothing else changes."""
    for wants, capacity, limit in small_cases():
        given = allocate(wants, capacity, limit)
        if all(given[want.trial] for want in wants if want.has):
            again = allocate([replace(want, has=given[want.trial]) for want in wants], capacity, limit)
            assert again == given, f"{wants} {capacity} {limit}"


def test_a_trial_that_ends_leaves_its_workers_to_one_that_waits_and_to_the_others() -> None:
    wants = [Want(n, 1, 4) for n in range(6)]
    given = allocate(wants, 4)
    assert given == {0: 1, 1: 1, 2: 1, 3: 1, 4: 0, 5: 0}
    left = [replace(want, has=given[want.trial]) for want in wants[1:]]
    assert allocate(left, 4) == {1: 1, 2: 1, 3: 1, 4: 1, 5: 0}
    assert allocate([replace(left[0], has=1)], 4) == {1: 4}


def test_a_lost_node_takes_from_those_that_have_more_than_their_least() -> None:
    wants = [Want(0, 1, 4, has=2), Want(1, 1, 4, has=2)]
    assert allocate(wants, 2) == {0: 1, 1: 1}
    assert allocate(wants, 1) == {0: 1, 1: 0}
    assert allocate([replace(wants[0], priority=-1), wants[1]], 1) == {0: 0, 1: 1}


@pytest.mark.parametrize("seed", range(20))
def test_simulated_sweeps_end_and_nobody_starves(seed: int) -> None:
    """Trials with random needs on a cluster that grows and shrinks: all finish, none that has begun waits for long."""
    chance = random.Random(seed)
    wants = {}
    for number in range(12):
        least = chance.randint(1, 4)
        wants[number] = Want(number, least, chance.randint(least, 6), chance.randint(0, 2))
    work = {number: chance.randint(1, 40) for number in wants}
    limit, now, capacity = chance.choice((0, 2, 5)), 0, 4
    while wants:
        capacity = chance.choice((4, 6, 8)) if now % 7 == 0 else capacity
        given = allocate(wants.values(), capacity, limit)
        assert any(given.values())
        for number, workers in given.items():
            wants[number] = replace(wants[number], has=workers)
            work[number] -= workers
            if work[number] <= 0:
                del wants[number]
        now += 1
        assert now < 400


def test_a_value_that_falls_for_a_moment_does_not_count() -> None:
    steady = Steady(20.0)
    assert [steady.take(value, at) for at, value in ((0, 4), (1, 2), (5, 4), (6, 3), (24, 3), (26, 3), (27, 5))] == [
        4, 4, 4, 4, 4, 3, 5,
    ]  # fmt: skip
