"""Links: who joins, who is left out, who is waited for, and whose refused connection shows a death."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_moe.control import events as ev
from elastic_moe.control.links import ANSWER_S, ASIDE_S, cover
from elastic_moe.types import View
from tests.unit.control.test_machine import Machine

WORKERS = list("abcdefgh")
PAIRS = st.frozensets(st.tuples(st.sampled_from(WORKERS), st.sampled_from(WORKERS)).filter(lambda p: p[0] != p[1]))


@pytest.mark.parametrize(
    ("pairs", "newcomers", "out"),
    [
        ({("a", "b")}, "", "b"),
        ({("a", "b")}, "a", "a"),
        ({("b", "a"), ("c", "a")}, "", "a"),
        ({("a", "e"), ("b", "e"), ("c", "e"), ("d", "e")}, "a", "e"),
        ({("b", "a"), ("a", "b"), ("c", "d")}, "", "bd"),
        ({("a", "c"), ("a", "d"), ("b", "c"), ("b", "d")}, "", "cd"),
        (set(), "ab", ""),
    ],
)
def test_few_are_left_out(pairs: set[tuple[str, str]], newcomers: str, out: str) -> None:
    assert sorted(cover(pairs, newcomers, WORKERS)) == sorted(out)


@settings(max_examples=300, deadline=None)
@given(PAIRS, st.frozensets(st.sampled_from(WORKERS)))
def test_the_rest_is_connected_and_nobody_is_left_out_in_vain(
    pairs: frozenset[tuple[str, str]], newcomers: frozenset[str]
) -> None:
    out = cover(pairs, newcomers, WORKERS)
    assert all(set(pair) & set(out) for pair in pairs)
    for worker in out:
        assert not all(set(pair) & (set(out) - {worker}) for pair in pairs), "it could have stayed"
    least = next(n for n in range(9) if any(all(set(p) & set(c) for p in pairs) for c in combinations(WORKERS, n)))
    assert len(out) <= 2 * least


class Linked(Machine):
    """A machine whose workers answer checks of links, with some pairs cut; (a, b): a does not reach b."""

    def __init__(self, target: int, **elastic: float) -> None:
        super().__init__(target, **elastic)
        self.cut: set[tuple[str, str]] = set()
        self.gone: set[str] = set()
        self.checks = 0

    def on(self, *events: ev.Event) -> list[ev.Command]:
        given = super().on(*events)
        for command in list(given):
            if isinstance(command, ev.CheckLinks):
                self.checks += 1
                for worker in command.workers:
                    if worker not in self.gone:
                        given += self.on(self.answer(worker, command))
        return given

    def answer(self, worker: str, command: ev.CheckLinks) -> ev.Links:
        peers = [p.worker for p in command.peers if p.worker != worker]
        both_ways = not self.state.in_view(worker)
        silent = [p for p in peers if (worker, p) in self.cut or (both_ways and (p, worker) in self.cut)]
        refused = [p for p in peers if p in self.gone]
        reached = [p for p in peers if p not in silent and p not in refused]
        return ev.Links(worker, command.check, tuple(reached), tuple(silent), tuple(refused))

    def join(self, *workers: str, node: str = "") -> None:
        for i, worker in enumerate(workers):
            self.on(ev.Hello(worker, f"n-{worker}", i, address=("h", 1 + i)), ev.Ready(worker))

    def told(self, event: str) -> list[ev.LogEvent]:
        return [c for c in self.commands if isinstance(c, ev.LogEvent) and c.event == event]


def linked(*workers: str, **elastic: float) -> Linked:
    machine = Linked(len(workers), **{"max_workers": 8} | elastic)
    machine.join(*workers)
    machine.enter()
    return machine


def test_a_joiner_comes_in_once_its_links_hold() -> None:
    machine = linked("a", "b")
    assert machine.checks == 0, "the first view needs no proof"
    machine.join("c", "d")
    machine.wait(1.5)
    assert machine.members == ["a", "b", "c", "d"]
    assert not machine.told("worker_set_aside")


@pytest.mark.parametrize("cut", [("c", "b"), ("b", "c")])
def test_a_joiner_without_a_link_stays_outside_and_the_pair_is_named_once(cut: tuple[str, str]) -> None:
    machine = linked("a", "b")
    machine.cut = {cut}
    machine.join("c")
    machine.wait(ASIDE_S - 1)
    assert machine.members == ["a", "b"]
    assert machine.state.generation == 1, "the view that works is not disturbed"
    (line,) = machine.told("worker_set_aside")
    assert line.worker == "c"
    assert "cannot reach b (n-b)" in line.reason
    machine.wait(ASIDE_S * 2)
    assert len(machine.told("worker_set_aside")) == 2, "the pause doubles"
    machine.cut = set()
    machine.wait(ASIDE_S * 3)
    assert machine.members == ["a", "b", "c"]


def test_two_joiners_that_do_not_reach_each_other_come_in_one_by_one() -> None:
    machine = linked("a", "b")
    machine.cut = {("c", "d"), ("d", "c")}
    machine.join("c", "d")
    machine.wait(5)
    assert len(machine.members) == 3
    assert len(machine.told("worker_set_aside")) == 1


def test_a_member_that_dies_is_not_the_joiners_fault() -> None:
    machine = linked("a", "b", "c")
    machine.gone = {"b"}
    machine.join("d")
    machine.on(ev.Closed("b"))
    machine.wait(4, silent=("b",))
    machine.enter()
    machine.wait(4, silent=("b",))
    assert machine.members == ["a", "c", "d"]
    assert not machine.told("worker_set_aside")


def test_a_joiner_that_does_not_answer_is_asked_again() -> None:
    machine = linked("a", "b")
    machine.gone = {"c"}
    machine.join("c")
    machine.wait(ANSWER_S - 1)
    assert machine.members == ["a", "b"]
    machine.gone = set()
    machine.wait(3)
    assert machine.members == ["a", "b", "c"]


def test_a_closed_connection_and_a_refused_one_are_a_death_at_once() -> None:
    machine = linked("a", "b", "c", redundancy=0)
    machine.gone = {"b"}
    machine.on(ev.Closed("b"))
    assert machine.members == ["a", "c"]
    assert "b" not in machine.state.removed, "it may be taken in again if it lives after all"


def test_a_closed_connection_of_a_worker_that_listens_is_no_death() -> None:
    machine = linked("a", "b", "c")
    machine.on(ev.Closed("b"))
    assert machine.members == ["a", "b", "c"]


def test_of_a_pair_without_a_link_one_is_left_out_and_comes_back() -> None:
    machine = linked("a", "b", "c")
    machine.cut = {("a", "b")}
    machine.on(ev.Suspect("c", 1, "timed out"))
    machine.wait(2)
    assert machine.members == ["a", "c"]
    assert machine.state.reforms == 0
    assert "a does not reach b" in machine.published[-1].reason
    assert "b" in machine.published[-1].workers, "it is told that its view is over"
    machine.enter()
    machine.cut = set()
    machine.wait(ASIDE_S + 2)
    assert machine.members == ["a", "c", "b"]


def test_a_suspicion_with_all_links_whole_leaves_nobody_out() -> None:
    machine = linked("a", "b", "c")
    machine.on(ev.Suspect("c", 1, "reset"))
    machine.wait(1)
    assert machine.members == ["a", "b", "c"]
    assert machine.state.generation == 2


def test_a_cut_that_makes_no_collective_fail_is_found_and_nobody_is_evicted() -> None:
    """Two members stand still in an exchange, and the others wait for them in the next one."""
    machine = linked("a", "b", "c", hang_timeout_s=120)
    machine.cut = {("a", "b"), ("b", "a")}
    machine.on(ev.Heartbeat("a", 1, 9, 5), ev.Heartbeat("b", 1, 9, 5), ev.Heartbeat("c", 1, 9, 6))
    machine.wait(40)
    assert machine.members == ["a", "c"]
    assert not machine.told("worker_evicted")


def test_the_last_copies_are_waited_for_until_the_links_heal() -> None:
    machine = linked("a", "b", "c", "d", hang_timeout_s=60)
    machine.cut = {(x, y) for x in "ab" for y in "cd"}
    machine.on(ev.Suspect("a", 1, "reset"))
    machine.wait(30)
    assert machine.state.generation == 1
    assert len(machine.told("members_in_doubt")) == 1
    machine.cut = set()
    machine.wait(5)
    assert machine.members == ["a", "b", "c", "d"]
    assert machine.state.generation == 2


def test_the_last_copies_are_not_waited_for_without_a_bound() -> None:
    machine = linked("a", "b", "c", "d", hang_timeout_s=60)
    machine.cut = {(x, y) for x in "ab" for y in "cd"}
    machine.on(ev.Suspect("a", 1, "reset"))
    machine.wait(70)
    assert machine.members == ["a", "b"]
    assert machine.state.view is not None
    assert isinstance(machine.state.view, View)


def test_a_member_that_does_not_answer_a_check_holds_nobody_up_for_long() -> None:
    machine = linked("a", "b", "c")
    machine.gone = {"c"}
    machine.on(ev.Suspect("a", 1, "reset"))
    machine.wait(ANSWER_S + 3)
    assert machine.state.generation == 2
