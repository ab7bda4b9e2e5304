"""What a sweep learns of its trials' speed: exact cases, and pools drawn at random."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from elastic_moe.sweep.gains import PATIENCE_S, SECONDS, Gains, Look

POLL_S = 0.5


class Pool:
    """Trials that train, looked at twice a second. `speed`: tokens/s with so many workers in so large a pool."""

    def __init__(self, gains: Gains, speed: Callable[[int, int], float]) -> None:
        self.gains, self.speed = gains, speed
        self.now_s, self.told = 0.0, list[str]()
        self.workers: dict[int, int] = {}
        self.steps: dict[int, int] = {}

    def train(self, seconds: float, kind: str = "a", steps: int = 1) -> None:
        """Let time pass, in which each trial makes so many steps between two looks."""
        for _ in range(int(seconds / POLL_S)):
            self.now_s += POLL_S
            for trial in self.workers:
                self.steps[trial] = self.steps.get(trial, 0) + steps
            self.told += self.gains.look([self.look(trial, kind) for trial in self.workers], self.now_s)

    def look(self, trial: int, kind: str = "a") -> Look:
        workers = self.workers.get(trial, 0)
        if not workers:
            return Look(trial, kind, 0)
        return Look(trial, kind, workers, workers, self.steps[trial], self.speed(workers, sum(self.workers.values())))

    def most(self, trial: int, kind: str = "a") -> int:
        return self.gains.most(self.look(trial, kind), 8)


def test_a_trial_grows_once_its_speed_is_known_and_shrinks_where_that_did_not_pay() -> None:
    pool = Pool(Gains(0.2), lambda workers, _: 100.0)
    pool.workers = {0: 1, 1: 1}
    pool.train(2)
    assert pool.most(0) == 1, "its speed is not known yet"
    assert pool.most(2) == 8, "one that waits is not held back"
    pool.train(SECONDS)
    assert pool.most(0) == pool.most(1) == 8
    pool.workers[0] = 2
    pool.train(3)
    assert pool.most(1) == 1, "the pool has just changed"
    pool.train(SECONDS)
    assert pool.most(0) == pool.most(1) == pool.most(2) == 1
    assert pool.told == [
        "trial 0: 2 workers train 1.00 times as fast as 1, so trials like it have 1 at most (sweep.min_gain=0.2)"
    ]
    assert pool.most(3, "b") == 8, "another model"


@pytest.mark.parametrize(("share", "most"), [(0.15, 2), (0.25, 8)])
def test_the_share_of_a_speed_up_in_proportion(share: float, most: int) -> None:
    pool = Pool(Gains(0.2), lambda workers, _: 100.0 * (1 + share * (workers / 2 - 1)))
    for workers in (2, 3, 4):
        pool.workers = {0: workers}
        pool.train(10)
    assert pool.most(0) == most


def test_small_additions_are_compared_once_they_have_added_up() -> None:
    """From 6 to 7 workers a sixth more is possible at best: nothing to be told from noise."""
    pool = Pool(Gains(0.2), lambda workers, _: 100.0)
    for workers in (6, 7, 8):
        pool.workers = {0: workers}
        pool.train(10)
        assert pool.most(0) == 8
        assert not pool.told
    pool.workers = {0: 9}
    pool.train(10)
    assert pool.most(0) == 6


def test_the_number_that_pays_is_found_from_below_and_above() -> None:
    """Four workers train three times as fast as one, and eight no faster than two."""
    speeds = {1: 100.0, 2: 180.0, 4: 300.0, 8: 150.0}
    pool, tried = Pool(Gains(0.2), lambda workers, _: speeds[workers]), []
    pool.workers = {0: 1}
    for _ in range(6):
        pool.train(10)
        tried.append(pool.most(0))
        pool.workers = {0: tried[-1]}
    assert tried == [8, 2, 4, 4, 4, 4]
    assert pool.told == [
        "trial 0: 8 workers train 1.50 times as fast as 1, so trials like it have 2 at most (sweep.min_gain=0.2)"
    ]


def test_a_speed_counts_only_in_the_pool_in_which_it_was_measured() -> None:
    """Four trials share two processors. When two end, the others are twice as fast, with or without more workers."""
    pool = Pool(Gains(0.2), lambda workers, everyone: 100.0 * workers * min(1.0, 2 / everyone))
    pool.workers = {0: 1, 1: 1, 2: 1, 3: 1}
    pool.train(20)
    pool.workers = {0: 1, 1: 1}
    pool.train(2)
    assert pool.most(0) == 1
    pool.train(10)
    assert pool.most(0) == 8
    pool.workers = {0: 2, 1: 2}
    pool.train(10)
    assert pool.most(0) == 1


def test_a_trial_that_starts_does_not_hold_the_others_for_ever() -> None:
    pool = Pool(Gains(0.2), lambda workers, _: 100.0 * workers)
    pool.workers = {0: 1}
    pool.train(10)
    starting = Look(1, "a", 1)
    for _ in range(int(PATIENCE_S / POLL_S) - 4):
        pool.now_s += POLL_S
        pool.steps[0] += 1
        pool.gains.look([pool.look(0), starting], pool.now_s)
        assert pool.most(0) == 1
    for _ in range(8):
        pool.now_s += POLL_S
        pool.gains.look([pool.look(0), starting], pool.now_s)
    assert pool.most(0) == 8
    assert pool.gains.most(starting, 8) == 1


def test_a_pool_that_changes_all_the_time_is_measured_too() -> None:
    pool = Pool(Gains(0.2), lambda workers, _: 100.0 * workers)
    known = 0
    for turn in range(60):
        pool.workers = {0: 1, 1 + turn: 1}
        pool.train(3)
        known += pool.most(0) == 8
    assert 0 < known < 60


def test_without_a_least_gain_nobody_is_measured() -> None:
    pool = Pool(Gains(0.0), lambda workers, _: 100.0)
    pool.workers = {0: 1}
    assert pool.most(0) == 8 if pool.train(1) is None else False


@pytest.mark.parametrize("seed", range(20))
def test_noise_of_a_tenth_seldom_stops_what_pays(seed: int) -> None:
    """A trial that gains half of the proportion grows to the end under noise; one that gains nothing does not."""
    rng = random.Random(seed)
    for share, expected in ((0.5, 8), (0.0, 1)):
        pool = Pool(Gains(0.2), lambda workers, _, share=share: rng.gauss(1, 0.1) * (1 + share * (workers - 1)))
        for workers in (1, 2, 4, 8):
            pool.workers = {0: min(workers, pool.most(0)) if pool.workers else 1}
            pool.train(15)
        assert pool.most(0) == expected
