"""The books of a run's time: each second of each worker is booked once, and to its cause."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from elastic_moe.control.booking import Books
from elastic_moe.control.goodput import (
    CHECKPOINT,
    EVALUATION,
    IMBALANCE,
    RECOVERING,
    REDONE,
    START,
    STRAGGLERS,
    TIME_CAUSES,
    TRAINING,
    WAITING,
    Goodput,
    as_record,
    idle_of_step,
    node_kind,
    price_of,
)

BEGAN_S = 1000.0


class Run:
    """A run as its lines. Times are seconds since its begin."""

    def __init__(self) -> None:
        self.books = Books()
        self.generation = 0
        self.tell(0, "started", restarted=False)

    def tell(self, at_s: float, event: str, **values: Any) -> None:
        self.books.event({"time": BEGAN_S + at_s, "event": event, "generation": self.generation, "step": 0} | values)

    def connect(self, at_s: float, *workers: str, placed_s: float | None = None, ready_s: float = 0.0) -> None:
        for worker in workers:
            origin = {} if placed_s is None else {"placed_s": BEGAN_S + placed_s, "node_kind": "spot"}
            self.tell(at_s, "worker_connected", worker=worker, node=f"node of {worker}", **origin)
        for worker in workers:
            self.tell(at_s + ready_s, "worker_ready", worker=worker)

    def view(self, at_s: float, members: str, entered_s: float, cause: str = "start", planned: bool = True) -> None:
        self.generation += 1
        self.tell(at_s, "view", members=list(members), planned=planned, cause=cause)
        self.tell(entered_s, "entered")

    def step(self, at_s: float, step: int, world_size: int, **values: float) -> None:
        line = {"step": step, "time": BEGAN_S + at_s, "generation": self.generation, "world_size": world_size}
        self.books.step(line | values)

    def at(self, at_s: float) -> Goodput:
        return self.books.at(BEGAN_S + at_s)


def booked(books: Goodput) -> dict[str, float]:
    return {cause: pytest.approx(seconds) for cause, seconds in books.worker_s.items() if seconds > 1e-9}


def started(workers: str = "ab") -> Run:
    """Workers that were placed at 0, registered at 4, were ready at 6, and began at 10."""
    run = Run()
    run.connect(4, *workers, placed_s=0, ready_s=2)
    run.view(8, workers, entered_s=10)
    return run


def test_start_waiting_and_steps() -> None:
    run = started()
    run.step(12, 1, 2)
    run.step(15, 2, 2, held_s=0.5, imbalance_s=0.25, straggler_s=0.125)
    expected = {START: 2 * 6 + 2 * 2, WAITING: 2 * 2, CHECKPOINT: 2 * 0.5, IMBALANCE: 2 * 0.25, STRAGGLERS: 2 * 0.125}
    assert booked(run.at(15)) == expected | {TRAINING: 2 * 5 - 2 * 0.875}
    books = run.at(16)
    assert books.worker_s[TRAINING] == pytest.approx(2 * 6 - 2 * 0.875)
    assert books.total_s == pytest.approx(2 * 16)
    assert books.goodput == pytest.approx((12 - 1.75) / 32)
    assert books.ettr == pytest.approx((12 - 1) / 32)
    assert (books.mtbf_s, books.mttr_s, books.failures) == (None, None, 0)


def test_a_death_costs_the_step_in_flight_and_the_recovery() -> None:
    run = started("abc")
    for step in (1, 2, 3):
        run.step(10 + 2 * step, step, 3)
    run.tell(21, "worker_lost", worker="b")  # five seconds after the last step, which takes two
    run.view(21, "ac", entered_s=22, cause="death", planned=False)
    run.step(24, 4, 2)
    books = run.at(24)
    assert books.worker_s[REDONE] == pytest.approx(3 * 2)
    assert books.worker_s[RECOVERING] == pytest.approx(3 * 3 + 2 * 1)
    assert books.worker_s[TRAINING] == pytest.approx(3 * 6 + 2 * 2)
    assert books.total_s == pytest.approx(3 * 21 + 2 * 3)
    assert (books.failures, books.repairs, books.mttr_s) == (1, 1, pytest.approx(6))
    assert books.mtbf_s == pytest.approx(24)


def test_steps_that_are_made_again_are_no_training() -> None:
    run = started()
    for step in (1, 2, 3):
        run.step(10 + step, step, 2)
    run.tell(13, "worker_lost", worker="a")
    run.view(13, "b", entered_s=14, cause="death", planned=False)
    run.step(15, 2, 1)  # from a checkpoint of step 1
    run.step(16, 3, 1)
    run.step(17, 4, 1)
    books = run.at(17)
    assert books.worker_s[REDONE] == pytest.approx(2)
    assert books.worker_s[TRAINING] == pytest.approx(2 * 3 + 1)


def test_a_planned_view_lets_the_members_go_on() -> None:
    run = started()
    run.step(12, 1, 2)
    run.connect(13, "c", placed_s=12.5, ready_s=0.5)
    run.generation += 1
    run.tell(14, "view", members=["a", "b", "c"], planned=True, cause="join")
    run.generation -= 1
    run.step(15, 2, 2)
    run.generation += 1
    run.tell(16, "entered")
    run.step(18, 3, 3)
    books = run.at(18)
    assert books.worker_s[TRAINING] == pytest.approx(2 * 5 + 3 * 2)
    assert books.worker_s[RECOVERING] == pytest.approx(2)
    assert books.worker_s[START] == pytest.approx(2 * 6 + 2 * 2 + 3.5)
    assert books.failures == 0


def test_a_draining_member_hands_over() -> None:
    run = started()
    run.step(11, 1, 2)
    run.view(11, "ab", entered_s=12, cause="drain")
    run.step(14, 2, 1)  # one of the two computes nothing
    run.view(14, "a", entered_s=15, cause="release")
    run.tell(15, "worker_released", worker="b")
    run.tell(15, "worker_left", worker="b")
    run.step(17, 3, 1)
    books = run.at(17)
    assert books.worker_s[TRAINING] == pytest.approx(2 + 2 + 2)
    assert books.worker_s[RECOVERING] == pytest.approx(2 + 2 + 2)
    assert books.total_s == pytest.approx(17 + 15)


def test_a_pause_is_waiting_and_no_failure_if_an_operator_asked_for_it() -> None:
    for failed in (False, True):
        run = started()
        run.step(12, 1, 2)
        if failed:
            run.tell(13, "worker_lost", worker="b")
        run.tell(13, "pause")
        run.view(33, "a" if failed else "ab", entered_s=34, cause="pause", planned=False)
        books = run.at(34)
        members = 1 if failed else 2
        assert books.worker_s[WAITING] == pytest.approx(2 * 2 + members * 20)
        assert books.mttr_s == (pytest.approx(22) if failed else None)


def test_evaluations_and_the_end() -> None:
    run = started()
    run.step(12, 1, 2)
    run.tell(15, "evaluated", eval_s=3.0)
    run.step(17, 2, 2)
    assert booked(run.at(17)) == {START: 16, WAITING: 4, EVALUATION: 6, TRAINING: 8}
    run.tell(20, "evaluated", eval_s=2.0)
    run.tell(21, "sample", sample_s=0.5)
    run.tell(22, "worker_finished", worker="a")
    run.tell(23, "worker_finished", worker="b")
    run.tell(23, "finished")
    books = run.at(99)
    assert books.worker_s[EVALUATION] == pytest.approx(6 + 5)
    assert books.worker_s[CHECKPOINT] == pytest.approx(2 * 2.5 + 1)
    assert books.total_s == pytest.approx(22 + 23)


def test_a_start_that_was_cut_off_ends_at_its_last_line() -> None:
    run = started()
    run.step(12, 1, 2)
    run.step(14, 2, 2)
    run.tell(500, "started", restarted=False)
    run.connect(504, "c", placed_s=501)
    run.generation = 0
    run.view(505, "c", entered_s=506)
    run.step(508, 2, 1)
    books = run.at(508)
    assert books.total_s == pytest.approx(2 * 14 + 7)
    assert books.worker_s[REDONE] == pytest.approx(2)
    assert (books.failures, books.up_s) == (1, pytest.approx(14 + 7))


def test_a_coordinator_that_was_restarted() -> None:
    run = started()
    run.step(12, 1, 2)
    run.connect(13, "c", "d", placed_s=12)  # wait outside, and d dies while there is no coordinator
    run.tell(20, "started", restarted=True)
    run.step(14, 2, 2)  # made meanwhile, and told late
    run.step(21, 3, 2)
    run.connect(22, "a", "b", "c")
    run.tell(22, "adopted")
    run.step(23, 4, 2)
    books = run.at(23)
    assert books.total_s == pytest.approx(2 * 23 + 11 + 8)
    assert books.worker_s[TRAINING] == pytest.approx(2 * 13)


def test_a_worker_that_comes_back_was_cut_off_meanwhile() -> None:
    run = started()
    run.step(12, 1, 2)
    run.tell(14, "worker_evicted", worker="b")
    run.view(14, "a", entered_s=15, cause="eviction", planned=False)
    run.tell(20, "worker_readmitted", worker="b", node="node of b", placed_s=BEGAN_S)
    run.step(21, 2, 1)
    books = run.at(21)
    assert books.total_s == pytest.approx(2 * 21)
    assert books.failures == 1
    assert sum(books.node_s.values()) == pytest.approx(2 * 21)


def test_nodes_are_counted_once_and_priced_by_their_kind() -> None:
    run = Run()
    for worker, node, kind in (("a", "1", "spot/small"), ("b", "1", "spot/small"), ("c", "2", "on-demand/big")):
        run.tell(0, "worker_connected", worker=worker, node=node, node_kind=kind)
    run.tell(1800, "worker_left", worker="a")
    books = run.at(3600)
    assert books.node_s == {"spot/small": 3600.0, "on-demand/big": 3600.0}
    assert books.cost({"spot": 1.0, "big": 5.0}) == pytest.approx(6)
    assert books.cost({"spot": 1.0, "spot/small": 2.0, "default": 4.0}) == pytest.approx(6)
    assert books.cost({"spot": 1.0, "default": 0.0}) is None
    assert as_record(books, {})["cost"] is None
    assert price_of("", {"default": 3.0}) == 3.0
    assert node_kind("", "group") == "group"
    assert price_of("group", {"group": 2.0, "default": 3.0}) == 2.0


@pytest.mark.parametrize("seed", range(20))
def test_the_books_add_up_whatever_happens(seed: int) -> None:
    """Lives of workers are drawn at random, and summed beside the books."""
    draw, run = random.Random(seed), Run()
    now_s, step, number, lived_s = 0.0, 0, 0, 0.0
    placed: dict[str, float] = {}
    members: list[str] = []
    for _ in range(300):
        now_s += draw.expovariate(1.0)
        what = draw.choice(("connect", "lose", "view", "step", "step", "step", "pause", "evaluated", "restart"))
        if what == "connect" or not placed:
            number += 1
            placed[f"w{number}"] = now_s - draw.random()
            run.connect(now_s, f"w{number}", placed_s=placed[f"w{number}"])
        elif what == "lose":
            worker = draw.choice(sorted(placed))
            lived_s += now_s - placed.pop(worker)
            run.tell(now_s, draw.choice(("worker_lost", "worker_evicted", "worker_left")), worker=worker)
        elif what == "view":
            members = sorted(placed)
            run.generation += 1
            run.tell(now_s, "view", members=members, planned=draw.random() < 0.5, cause="death")
            if draw.random() < 0.8:
                run.tell(now_s, "entered")
        elif what == "step":
            step = max(1, step + draw.choice((1, 1, 1, -2)))
            run.step(now_s, step, max(1, len(members)), held_s=draw.random(), straggler_s=draw.random())
        elif what == "restart":
            run.tell(now_s, "started", restarted=True)
            run.connect(now_s, *placed)
        else:
            run.tell(now_s, what, eval_s=draw.random())
    lived_s += sum(now_s - began_s for began_s in placed.values())
    books = run.at(now_s)
    assert books.total_s == pytest.approx(lived_s, rel=1e-6)
    assert min(books.worker_s.values()) >= -1e-9
    assert set(books.worker_s) == set(TIME_CAUSES)


def test_idle_time_is_split_into_imbalance_and_stragglers() -> None:
    even = idle_of_step(np.array([4.0, 4.0, 4.0, 8.0]), wait_s=5.0, expert_s=1.0, layer_time_L=np.ones(3))
    assert even == (0.0, 3.0)
    uneven = idle_of_step(np.array([4.0, 4.0, 4.0, 8.0]), wait_s=5.0, expert_s=1.0, layer_time_L=np.array([1.0, 1.5]))
    assert uneven == (pytest.approx(0.75), pytest.approx(2.25))
    assert idle_of_step(np.array([4.0, 4.0]), wait_s=0.1, expert_s=9.0, layer_time_L=np.array([2.0])) == (0.1, 0.0)
    assert idle_of_step(np.array([4.0]), wait_s=0.0, expert_s=1.0, layer_time_L=np.ones(0)) == (0.0, 0.0)
