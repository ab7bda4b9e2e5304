"""The membership machine: each rule by example, and what holds for every sequence of events."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_moe.config.schema import ElasticConfig
from elastic_moe.control import events as ev
from elastic_moe.control.ending import FINISH_GRACE_S, MAX_REFORMS
from elastic_moe.control.machine import ADOPTION_GAP, initial_state, transition
from elastic_moe.control.rules import START_GRACE_S
from elastic_moe.control.state import FAILED, FINISHED, RUNNING, WAITING, State
from elastic_moe.types import Member, View


class Machine:
    """Drives the machine with a clock, and obeys like well-behaved workers where asked."""

    def __init__(self, target: int, **elastic: Any) -> None:
        self.config = ElasticConfig(**({"join_settle_s": 0.5, "heartbeat_timeout_s": 6.0} | elastic))
        self.state: State = initial_state(target)
        self.now_s = 100.0
        self.published: list[ev.Publish] = []
        self.commands: list[ev.Command] = []

    def on(self, *events: ev.Event) -> list[ev.Command]:
        given: list[ev.Command] = []
        for event in events:
            self.state, commands, _ = transition(self.state, event, self.now_s, self.config)
            given += commands
        self.published += [c for c in given if isinstance(c, ev.Publish)]
        self.commands += given
        return given

    def join(self, *workers: str, node: str = "", on_spot: bool = False) -> None:
        for i, worker in enumerate(workers):
            self.on(ev.Hello(worker, node or f"n-{worker}", i, on_spot=on_spot), ev.Ready(worker))

    def enter(self) -> None:
        assert self.state.view is not None
        for member in self.state.view.members:
            self.on(ev.Entered(member.worker, self.state.view.generation))

    def wait(self, seconds: float, silent: tuple[str, ...] = (), step: int = 0) -> list[ev.Command]:
        """Let time pass, everyone but the silent showing signs of life; `step` > 0: and getting on."""
        given: list[ev.Command] = []
        for tick in range(round(seconds / 0.5)):
            self.now_s += 0.5
            for worker in list(self.state.records):
                if worker not in silent:
                    given += self.on(ev.Heartbeat(worker, 0, step, tick if step else 0))
            given += self.on(ev.Tick())
        return given

    @property
    def members(self) -> list[str]:
        assert self.state.view is not None
        return [m.worker for m in self.state.view.members]

    @property
    def draining(self) -> list[str]:
        assert self.state.view is not None
        return [m.worker for m in self.state.view.members if m.draining]


def running(*workers: str, **elastic: Any) -> Machine:
    machine = Machine(len(workers), **elastic)
    machine.join(*workers)
    machine.enter()
    return machine


def test_first_view_waits_for_the_target() -> None:
    machine = Machine(3)
    machine.join("a", "b")
    assert machine.state.view is None
    machine.join("c")
    assert machine.members == ["a", "b", "c"]
    assert machine.state.phase == RUNNING


def test_first_view_without_the_target_after_a_grace() -> None:
    machine = Machine(3, min_workers=2)
    machine.join("a", "b")
    machine.wait(START_GRACE_S - 1)
    assert machine.state.view is None
    machine.wait(2)
    assert machine.members == ["a", "b"]


def test_death_gives_a_view_in_the_same_call() -> None:
    machine = running("a", "b", "c")
    commands = machine.on(ev.Lost("b"))
    (publish,) = [c for c in commands if isinstance(c, ev.Publish)]
    assert (machine.members, publish.planned, publish.view.generation) == (["a", "c"], False, 2)


def test_second_death_before_the_first_is_repaired() -> None:
    machine = running("a", "b", "c", "d")
    machine.on(ev.Lost("b"), ev.Lost("d"))
    assert machine.members == ["a", "c"]
    assert [p.view.generation for p in machine.published] == [1, 2, 3]


def test_node_death_is_one_view() -> None:
    machine = Machine(4)
    machine.join("a", "b", node="n1")
    machine.join("c", "d", node="n2")
    machine.enter()
    machine.on(ev.NodeLost("n1"))
    assert machine.members == ["c", "d"]
    assert len(machine.published) == 2


def test_a_dead_worker_stays_out() -> None:
    machine = running("a", "b")
    assert ev.Evict("b", "process died") in machine.on(ev.Lost("b"))
    assert machine.members == ["a"]
    assert machine.on(ev.Hello("b", "n-b", 1)) == [ev.Evict("b", "no longer a member")]


def test_a_stall_of_the_coordinator_evicts_nobody() -> None:
    machine = running("a", "b")
    machine.on(ev.Tick())
    machine.now_s += 1000
    machine.on(ev.Tick())
    assert machine.members == ["a", "b"]


def test_pause_below_minimum_and_resume() -> None:
    machine = running("a", "b", min_workers=2)
    commands = machine.on(ev.Lost("b"))
    assert any(isinstance(c, ev.Pause) and c.workers == ("a",) for c in commands)
    assert machine.state.phase == WAITING
    machine.join("c")
    assert machine.members == ["a", "c"]
    assert not machine.published[-1].planned


def test_a_long_pause_ends_the_run() -> None:
    machine = running("a", "b", min_workers=2, wait_below_min_s=5)
    machine.on(ev.Lost("b"), ev.Held("a", 2))
    commands = machine.wait(6)
    assert machine.state.phase == FAILED
    assert "min_workers" in machine.state.reason
    assert any(isinstance(c, ev.Release) for c in commands)


def test_joiners_settle_and_are_appended_together() -> None:
    machine = running("a", "b", max_workers=4)
    machine.join("c")
    machine.now_s += 0.4
    machine.join("d")
    assert machine.members == ["a", "b"]
    machine.wait(0.5)
    assert machine.members == ["a", "b", "c", "d"]
    assert machine.published[-1].planned


def test_no_more_than_the_largest_number() -> None:
    machine = running("a", "b", max_workers=2)
    machine.join("c")
    machine.wait(2)
    assert machine.members == ["a", "b"]
    machine.on(ev.Lost("a"))
    machine.enter()
    machine.wait(1)
    assert machine.members == ["b", "c"]


def test_planned_view_waits_until_the_last_one_is_entered() -> None:
    machine = running("a", "b", max_workers=4)
    machine.join("c")
    machine.wait(1)
    machine.join("d")
    machine.wait(2)
    assert machine.members == ["a", "b", "c"]
    machine.enter()
    machine.on(ev.Tick())
    assert machine.members == ["a", "b", "c", "d"]


def test_drain_takes_two_planned_views() -> None:
    machine = running("a", "b", "c")
    machine.on(ev.Drain(node="n-b", deadline_s=20))
    assert (machine.members, machine.draining) == (["a", "b", "c"], ["b"])
    for worker in ("a", "c"):
        machine.on(ev.Entered(worker, 2))
    assert machine.members == ["a", "c"]
    assert ev.Release("b") in machine.commands
    assert all(p.planned for p in machine.published)
    machine.enter()
    commands = machine.on(ev.Lost("b"))
    assert not any(isinstance(c, ev.Publish | ev.Evict) for c in commands)


def test_death_while_draining_keeps_the_drain() -> None:
    machine = running("a", "b", "c")
    machine.on(ev.Drain(worker="b", deadline_s=20), ev.Lost("c"))
    assert (machine.members, machine.draining) == (["a", "b"], ["b"])
    assert not machine.published[-1].planned


def test_passed_drain_deadline_is_a_death() -> None:
    machine = running("a", "b", "c")
    machine.on(ev.Drain(worker="b", deadline_s=2))
    machine.wait(3)
    assert machine.members == ["a", "c"]
    assert not machine.published[-1].planned


def test_the_last_workers_go_on_until_others_come() -> None:
    machine = running("a", "b")
    machine.on(ev.Drain(worker="a", deadline_s=60), ev.Drain(worker="b", deadline_s=30))
    assert machine.draining == ["a"]
    machine.enter()
    assert (machine.members, machine.draining) == (["b"], [])
    machine.enter()
    machine.join("c")
    assert (machine.members, machine.draining) == (["b", "c"], ["b"])


def test_a_draining_node_takes_no_newcomer() -> None:
    machine = running("a", "b", max_workers=4)
    machine.on(ev.Drain(node="n-b"))
    assert ev.Release("late") in machine.on(ev.Hello("late", "n-b", 7))


def test_hung_member_is_evicted() -> None:
    machine = running("a", "b", "c", hang_timeout_s=10)
    for _ in range(24):
        machine.now_s += 0.5
        for worker, progress in (("a", 8), ("b", 7), ("c", 8)):
            machine.on(ev.Heartbeat(worker, 1, 5, progress))
        machine.on(ev.Tick())
    assert machine.members == ["a", "c"]


def test_everybody_stuck_at_the_same_point_is_reformed_and_then_the_hung_one_goes() -> None:
    machine = running("a", "b", hang_timeout_s=10)
    for _ in range(24):
        machine.now_s += 0.5
        machine.on(ev.Heartbeat("a", 1, 5, 3), ev.Heartbeat("b", 1, 5, 3), ev.Tick())
    assert (machine.members, machine.state.generation) == (["a", "b"], 2)
    for _ in range(24):
        machine.now_s += 0.5
        machine.on(ev.Heartbeat("a", 2, 5, 0), ev.Heartbeat("b", 1, 5, 3), ev.Tick())
    assert machine.members == ["a"]


def test_suspicion_probes_and_reforms_but_removes_nobody() -> None:
    machine = running("a", "b")
    commands = machine.on(ev.Suspect("a", 1, "reset"))
    assert ev.Probe(("a", "b")) in commands
    assert machine.state.generation == 1
    machine.wait(1)
    assert (machine.members, machine.state.generation) == (["a", "b"], 2)
    assert not any(isinstance(c, ev.Evict) for c in machine.commands)


def test_suspicion_waits_for_a_verdict_on_who_does_not_answer() -> None:
    machine = running("a", "b", "c")
    machine.on(ev.Suspect("a", 1, "reset"))
    machine.wait(7, silent=("b",))
    assert machine.members == ["a", "c"]
    assert machine.state.generation == 2


def test_views_that_always_fail_end_the_run() -> None:
    machine = running("a", "b")
    for _ in range(MAX_REFORMS + 2):
        machine.on(ev.Suspect("a", machine.state.generation, "cannot connect"))
        machine.wait(12)
    assert machine.state.phase == WAITING, "they save what they have"
    (hold,) = [c for c in machine.commands if isinstance(c, ev.Hold)]
    machine.on(ev.Held("a", hold.view.generation), ev.Held("b", hold.view.generation))
    assert machine.state.phase == FAILED
    assert "could not be entered" in machine.state.reason


def test_stale_messages_are_dropped() -> None:
    machine = running("a", "b", "c")
    machine.on(ev.Lost("b"))
    before = machine.state
    assert machine.on(ev.Entered("a", 1), ev.Suspect("a", 1)) == []
    assert (machine.state.entered, machine.state.suspected_s) == (before.entered, None)


def test_stop_then_finish() -> None:
    machine = running("a", "b")
    assert ev.StopAll(("a", "b")) in machine.on(ev.Stop("Ctrl-C"))
    machine.on(ev.Finished("a"), ev.Lost("a"))
    assert machine.state.phase != FINISHED
    machine.on(ev.Finished("b"))
    assert (machine.state.phase, machine.state.reason) == (FINISHED, "Ctrl-C")
    assert len(machine.published) == 1


def test_death_after_the_last_barrier_does_not_hold_up_the_end() -> None:
    machine = running("a", "b")
    machine.on(ev.Finished("a"), ev.Lost("b"))
    assert machine.state.phase == FINISHED


def test_silent_finisher_is_not_waited_for() -> None:
    machine = running("a", "b")
    machine.on(ev.Finished("a"))
    commands = machine.wait(FINISH_GRACE_S + 1)
    assert machine.state.phase == FINISHED
    assert ev.Release("b") in commands


def view_of(*workers: str, generation: int) -> View:
    return View(generation, tuple(Member(w, f"n-{w}", i) for i, w in enumerate(workers)))


def test_new_coordinator_adopts_the_newest_view_and_interrupts_nobody() -> None:
    machine = Machine(2)
    view = view_of("a", "b", "c", generation=7)
    for i, worker in enumerate("abc"):
        commands = machine.on(ev.Hello(worker, f"n-{worker}", i, ready=True, view=view, entered=7, step=40))
        assert not any(isinstance(c, ev.Publish) for c in commands)
    assert machine.state.all_entered
    assert machine.state.step == 40
    machine.wait(20, step=41)
    assert machine.published == []
    machine.on(ev.Lost("a"))
    assert machine.members == ["b", "c"]
    assert machine.state.generation == 7 + ADOPTION_GAP + 1


def test_new_coordinator_takes_the_newer_of_two_views_and_reforms_it() -> None:
    machine = Machine(2)
    machine.on(ev.Hello("a", "n-a", 0, ready=True, view=view_of("a", "b", generation=7), entered=7))
    machine.on(ev.Hello("b", "n-b", 1, ready=True, view=view_of("a", "b", "c", generation=8), entered=7))
    machine.on(ev.Hello("c", "n-c", 2, ready=True, view=view_of("a", "b", "c", generation=8)))
    assert machine.members == ["a", "b", "c"]
    machine.wait(2)
    assert machine.members == ["a", "b", "c"]
    assert (machine.published[-1].planned, machine.state.generation > 8) == (False, True)


def test_member_that_died_with_the_coordinator_is_found() -> None:
    machine = Machine(3)
    view = view_of("a", "b", generation=3)
    machine.on(ev.Hello("a", "n-a", 0, ready=True, view=view, entered=3))
    machine.wait(8, silent=("b",))
    assert machine.members == ["a"]


def test_a_worker_of_another_view_leaves_it_and_joins() -> None:
    machine = running("a", "b", max_workers=3)
    machine.on(ev.Hello("z", "n-z", 9, ready=True, view=view_of("z", generation=50), entered=50))
    (pause,) = [c for c in machine.commands if isinstance(c, ev.Pause)]
    assert (pause.workers, pause.generation) == (("z",), 50)
    machine.wait(1)
    assert machine.members == ["a", "b", "z"]
    assert machine.state.generation == 51


# --- properties -------------------------------------------------------------------------------------------------------

NAMES = st.sampled_from("abcdef")
GENERATIONS = st.integers(0, 8)
VIEWS = st.none() | st.builds(
    lambda names, g: view_of(*names, generation=g), st.lists(NAMES, min_size=1, max_size=4, unique=True), GENERATIONS
)
EVENTS = st.one_of(
    st.builds(ev.Hello, NAMES, st.sampled_from(["n1", "n2"]), st.integers(0, 9), st.just(0), st.booleans(), VIEWS),
    st.builds(ev.Ready, NAMES),
    st.builds(ev.Heartbeat, NAMES, GENERATIONS, st.integers(0, 9), st.integers(0, 9)),
    st.builds(ev.Suspect, NAMES, GENERATIONS),
    st.builds(ev.Entered, NAMES, GENERATIONS),
    st.builds(ev.Closed, NAMES),
    st.builds(ev.Lost, NAMES),
    st.builds(ev.NodeLost, st.sampled_from(["n1", "n2"])),
    st.builds(ev.Drain, NAMES | st.just(""), st.sampled_from(["", "n1", "n2"]), st.floats(0, 5)),
    st.builds(ev.Left, NAMES),
    st.builds(ev.Finished, NAMES),
    st.builds(ev.Stop),
    st.builds(ev.Tick),
)
TRACES = st.lists(st.tuples(EVENTS, st.sampled_from([0.0, 0.01, 0.6, 1.9, 7.0, 40.0])), max_size=40)
CONFIGS = st.builds(
    ElasticConfig, min_workers=st.integers(1, 3), max_workers=st.integers(0, 4), wait_below_min_s=st.just(60.0)
)


@settings(max_examples=300, deadline=None)
@given(TRACES, st.integers(1, 4), CONFIGS)
def test_total_and_consistent(trace: list[tuple[ev.Event, float]], target: int, config: ElasticConfig) -> None:
    """Any event in any state has an answer; generations grow; members of a published view live and are distinct."""
    state, now_s, generation, adopted = initial_state(target), 0.0, 0, False
    for event, gap_s in trace:
        now_s += gap_s
        before = state
        state, commands, _ = transition(state, event, now_s, config)
        adopted |= any(
            isinstance(c, ev.LogEvent) and c.event == "adopted" for c in commands
        )  # may be smaller than allowed here
        assert state.generation >= before.generation
        for publish in (c for c in commands if isinstance(c, ev.Publish) and c.reason != "re-registered"):
            members = publish.view.members
            assert publish.view.generation > generation
            generation = publish.view.generation
            assert len({m.worker for m in members}) == len(members)
            assert all(m.worker in state.records for m in members)
            assert adopted or len(publish.view.active_ranks) >= max(1, config.min_workers)
            assert not publish.planned or before.view is None or before.over or _was_entered(before, event)
        assert not state.removed & set(state.records)


def _was_entered(before: State, event: ev.Event) -> bool:
    """A planned view follows one that all active members had entered, with this event at the latest."""
    entered = before.entered | ({event.worker} if isinstance(event, ev.Entered | ev.Hello) else set())
    adopted = isinstance(event, ev.Hello) and event.view is not None
    assert before.view is not None
    return adopted or all(m.draining or m.worker in entered for m in before.view.members)


@settings(max_examples=100, deadline=None)
@given(TRACES, st.integers(1, 4), CONFIGS)
def test_a_fair_trace_ends(trace: list[tuple[ev.Event, float]], target: int, config: ElasticConfig) -> None:
    """Whatever happened: if workers then live, obey and finish, the run finishes; if there are too few, it fails."""
    state, now_s = initial_state(target), 0.0
    for event, gap_s in trace:
        now_s += gap_s
        state, _, _ = transition(state, event, now_s, config)
    entered: set[tuple[str, int]] = set()
    for round_ in itertools.count():
        assert round_ < 1200, state
        if state.over:
            break
        now_s += 0.5
        events: list[ev.Event] = [ev.Tick()]
        events += [ev.Ready(w) for w in state.records] + [ev.Heartbeat(w, 99, 99, round_) for w in state.records]
        view = state.view
        if view is not None:
            events += [ev.Entered(w, view.generation) for w in state.view_workers]
            if (view.members[0].worker, view.generation) in entered and state.all_entered and round_ > 250:
                events += [ev.Finished(m.worker) for m in view.members]
            entered |= {(m.worker, view.generation) for m in view.members}
        for event in events:
            state, _, _ = transition(state, event, now_s, config)
    assert state.phase in (FINISHED, FAILED)


@pytest.mark.parametrize("num_workers", [1, 2, 7, 13])
def test_any_number_of_workers(num_workers: int) -> None:
    machine = running(*(f"w{i}" for i in range(num_workers)))
    assert machine.state.all_entered
    assert len(machine.members) == num_workers
