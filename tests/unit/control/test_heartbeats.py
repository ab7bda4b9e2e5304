"""Events that every member sends cost one pass over the rules, not one for each member."""

from __future__ import annotations

import pytest

from elastic_moe.config.schema import ElasticConfig
from elastic_moe.control import events as ev
from elastic_moe.control import machine
from elastic_moe.control.heartbeats import STALL_S, is_routine, repeats_suspicion, take_heartbeats
from elastic_moe.control.state import State

NUM_WORKERS = 64
CONFIG = ElasticConfig()


class Run:
    """A membership in virtual time that counts how often the rules are applied."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.state, self.commands, self.rules = machine.initial_state(NUM_WORKERS), list[ev.Command](), 0
        apply_rules = machine.apply_rules

        def counted(*arguments: object) -> object:
            self.rules += 1
            return apply_rules(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(machine, "apply_rules", counted)
        for worker in self.names:
            self.tell(ev.Hello(worker, f"node of {worker}", 1, ready=True), 0.0)
        self.tell(ev.Tick(), 0.1)

    @property
    def names(self) -> list[str]:
        return [f"w{number}" for number in range(NUM_WORKERS)]

    def tell(self, event: ev.Event, now_s: float) -> None:
        self.state, commands, _ = machine.transition(self.state, event, now_s, CONFIG)
        self.commands += commands

    def enter(self, now_s: float) -> None:
        for worker in self.state.view_workers:
            self.tell(ev.Entered(worker, self.state.generation), now_s)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    run = Run(monkeypatch)
    assert run.state.generation == 1
    run.rules = 0
    return run


def test_the_last_member_that_enters_brings_the_rules(run: Run) -> None:
    run.enter(0.2)
    assert run.state.all_entered
    assert run.rules == 1


@pytest.mark.parametrize("closed_first", [True, False])
def test_a_death_that_all_notice_is_answered_once(run: Run, closed_first: bool) -> None:
    run.enter(0.2)
    run.rules = 0
    events: list[ev.Event] = [ev.Suspect(worker, 1, "reset") for worker in run.names[:-1]]
    events.insert(0 if closed_first else len(events), ev.Closed(run.names[-1]))
    for event in events:
        run.tell(event, 0.3)
    assert run.state.generation == 2
    assert run.state.view_workers == tuple(run.names[:-1])
    assert run.rules == 2


def test_the_last_answer_to_a_probe_brings_the_rules(run: Run) -> None:
    run.enter(0.2)
    run.tell(ev.Suspect(run.names[0], 1, "reset"), 0.3)
    run.rules = 0
    for worker in run.names:
        run.tell(ev.Heartbeat(worker, 1, 1, 1), 1.0)
    assert run.rules == 1
    assert any(isinstance(command, ev.CheckLinks | ev.Publish) for command in run.commands[-2:])


def test_heartbeats_taken_together_are_those_taken_one_by_one(run: Run) -> None:
    beats = {worker: (ev.Heartbeat(worker, 1, n % 3, n), 0.5 + n / 100) for n, worker in enumerate(run.names[:40])}
    together = take_heartbeats(run.state, beats)
    for beat, now_s in beats.values():
        run.tell(beat, now_s)
    assert together.records == run.state.records
    assert together.step == run.state.step


def test_a_heartbeat_that_something_waits_for_is_not_routine(run: Run) -> None:
    beat = ev.Heartbeat("w1", 1, 1, 1)

    def routine(state: State, now_s: float = 0.2) -> bool:
        return is_routine(state, beat, now_s)

    assert routine(run.state)
    assert not routine(run.state, 0.2 + STALL_S), "the coordinator itself was stopped"
    assert not routine(run.state.with_record("w1", missing=True))
    assert not routine(run.state.without("w1"))
    run.tell(ev.Suspect("w2", 1, "reset"), 0.2)
    assert not routine(run.state)


def test_while_the_rules_rest_any_heartbeat_of_a_worker_is_routine(run: Run) -> None:
    run.tell(ev.Suspect("w2", 1, "reset"), 0.2)
    beat = ev.Heartbeat("w1", 1, 1, 1)
    assert not is_routine(run.state, beat, 0.3)
    assert is_routine(run.state, beat, 0.3, resting=True)
    assert not is_routine(run.state, beat, 0.3 + STALL_S, resting=True), "the coordinator itself was stopped"
    assert not is_routine(run.state.without("w1"), beat, 0.3, resting=True)


def test_a_suspicion_that_is_known_or_over_is_only_a_sign_of_life(run: Run) -> None:
    first, older = ev.Suspect("w2", 1, "reset"), ev.Suspect("w2", 0, "reset")
    assert not repeats_suspicion(run.state, first, 0.2)
    assert repeats_suspicion(run.state, older, 0.2)
    run.tell(ev.Suspect("w3", 1, "reset"), 0.2)
    assert repeats_suspicion(run.state, first, 0.3)
    assert not repeats_suspicion(run.state, first, 0.3 + STALL_S), "the coordinator itself was stopped"
    assert not repeats_suspicion(run.state.without("w2"), first, 0.3)
