"""Members in doubt: who is removed, who is waited for, who comes back, and who may start from storage."""

from __future__ import annotations

import pytest

from elastic_moe.control import events as ev
from elastic_moe.control.doubt import CLOCK_DRIFT, CLOSED_GRACE_S, PATIENT_FAILURES
from elastic_moe.control.links import ASIDE_S
from elastic_moe.control.machine import initial_state, transition
from elastic_moe.control.rules import REFORMS_WITH_NEWCOMERS
from elastic_moe.control.state import RUNNING, WAITING
from elastic_moe.types import View
from tests.unit.control.test_machine import Machine, running


def hello(machine: Machine, worker: str, view: View | None = None, entered: int = 0, step: int = 0) -> ev.Hello:
    node = next((m.node for m in view.members if m.worker == worker), "") if view else ""
    return ev.Hello(worker, node or f"n-{worker}", 7, ready=True, view=view, entered=entered, step=step)


def back(machine: Machine, *workers: str) -> None:
    """These workers, members of the newest view before, register again with their state."""
    view = machine.published[0].view
    for worker in workers:
        machine.on(hello(machine, worker, view, view.generation))


def test_connections_that_are_all_reset_evict_nobody() -> None:
    machine = running("a", "b", "c", "d")
    machine.on(*(ev.Closed(w) for w in "abcd"))
    machine.now_s += 0.2
    back(machine, *"abcd")
    machine.wait(30)
    assert machine.members == ["a", "b", "c", "d"]
    assert machine.state.generation == 1
    assert len(machine.published) == 1
    assert not any(isinstance(c, ev.Evict | ev.Disconnect) for c in machine.commands)


def test_a_closed_connection_and_a_failed_collective_are_a_death_at_once() -> None:
    machine = running("a", "b", "c")
    machine.on(ev.Closed("b"))
    assert machine.state.generation == 1
    machine.on(ev.Suspect("a", 1, "connection closed by peer"))
    assert machine.members == ["a", "c"]


def test_a_closed_connection_alone_is_a_death_after_a_grace() -> None:
    machine = running("a", "b", "c")
    machine.on(ev.Closed("b"))
    machine.wait(CLOSED_GRACE_S)
    assert machine.members == ["a", "b", "c"]
    machine.wait(1)
    assert machine.members == ["a", "c"]


def test_silence_removes_a_member_that_may_come_back_with_its_state() -> None:
    machine = running("a", "b")
    commands = machine.wait(8, silent=("b",))
    assert ev.Disconnect("b") in commands
    assert machine.members == ["a"]
    machine.enter()
    back(machine, "b")
    assert [c.workers for c in machine.commands if isinstance(c, ev.Pause)] == [("b",)]
    machine.wait(2)
    assert machine.members == ["a", "b"]
    assert machine.state.records["b"].incarnation == 1
    assert any(isinstance(c, ev.LogEvent) and c.event == "worker_readmitted" for c in machine.commands)


def test_silence_of_all_is_waited_out_and_told_once() -> None:
    machine = running("a", "b", "c", hang_timeout_s=60)
    commands = machine.wait(40, silent=("a", "b", "c"))
    assert machine.members == ["a", "b", "c"]
    assert machine.state.generation == 1
    assert [c.event for c in commands if isinstance(c, ev.LogEvent)] == ["members_in_doubt"]
    commands = machine.wait(5)
    assert machine.state.in_doubt == frozenset()
    assert machine.state.generation == 1


def test_two_silent_members_may_hold_the_last_copies_but_not_on_one_node() -> None:
    machine = running("a", "b", "c", "d", hang_timeout_s=60)
    machine.wait(20, silent=("a", "b"))
    assert machine.members == ["a", "b", "c", "d"]
    machine = Machine(4)
    machine.join("a", "b", node="n1")
    machine.join("c", "d", node="n2")
    machine.enter()
    machine.wait(8, silent=("a", "b"))
    assert machine.members == ["c", "d"]


def test_a_second_member_in_doubt_before_copies_are_made_anew_is_waited_for() -> None:
    machine = running("a", "b", "c", "d", hang_timeout_s=60)
    machine.on(ev.Lost("a"))  # the view without it is not entered yet
    machine.wait(20, silent=("b",))
    assert machine.members == ["b", "c", "d"]
    machine.on(ev.Lost("b"))
    assert machine.members == ["c", "d"]


def test_no_view_starts_from_storage_while_a_lease_may_last() -> None:
    machine = running("a", "b", hang_timeout_s=20, lease_s=30.0, max_workers=3)
    machine.wait(21, silent=("a", "b"))
    assert machine.state.phase == WAITING
    heard_s = machine.now_s - 21
    machine.join("c")
    assert machine.state.phase == WAITING, "a and b may still commit"
    while machine.state.phase == WAITING:
        machine.wait(0.5)
        assert machine.now_s < heard_s + 100
    assert machine.members == ["c"]
    assert machine.now_s >= heard_s + CLOCK_DRIFT * 30


def test_proof_of_death_ends_the_wait_for_a_lease() -> None:
    machine = running("a", "b", hang_timeout_s=20, lease_s=1000.0)
    machine.wait(21, silent=("a", "b"))
    machine.join("c")
    assert machine.state.phase == WAITING
    machine.on(ev.Lost("a"), ev.Lost("b"))
    assert (machine.state.phase, machine.members) == (RUNNING, ["c"])


def test_all_that_were_cut_off_come_back_with_everything() -> None:
    machine = running("a", "b", "c", hang_timeout_s=20)
    machine.wait(21, silent=("a", "b", "c"))
    assert machine.state.phase == WAITING
    back(machine, "c")
    assert machine.state.phase == WAITING, "c alone may lack units that the others hold"
    back(machine, "a")
    assert sorted(machine.members) == ["a", "c"]
    machine.enter()
    back(machine, "b")
    machine.wait(2)
    assert sorted(machine.members) == ["a", "b", "c"]


def test_one_that_comes_back_alone_is_enough_in_the_end() -> None:
    machine = running("a", "b", "c", hang_timeout_s=20)
    machine.wait(21, silent=("a", "b", "c"))
    back(machine, "c")
    machine.wait(8)
    assert machine.members == ["c"]


def test_a_restarted_coordinator_waits_for_the_leases_it_cannot_know() -> None:
    machine = Machine(1)
    machine.state = initial_state(1, fence_s=machine.now_s + 30)
    machine.join("new")
    machine.wait(28)
    assert machine.state.view is None
    machine.wait(4)
    assert machine.members == ["new"]


def test_newcomers_with_which_no_view_forms_are_set_aside() -> None:
    machine = running("a", "b", max_workers=4)
    machine.join("c")
    machine.wait(1)
    assert machine.members == ["a", "b", "c"]
    for _ in range(REFORMS_WITH_NEWCOMERS):
        machine.on(ev.Suspect("a", machine.state.generation, "cannot connect"))
        machine.wait(12)
    assert machine.members == ["a", "b", "c"]
    machine.on(ev.Suspect("a", machine.state.generation, "cannot connect"))
    while "c" in machine.members:
        machine.wait(0.5)
    assert machine.members == ["a", "b"]
    last = machine.published[-1]
    assert (last.planned, "c" in last.workers) == (False, True), "its collectives are ended too"
    machine.enter()
    machine.wait(ASIDE_S - 2)
    assert machine.members == ["a", "b"]
    machine.wait(4)
    assert machine.members == ["a", "b", "c"]


def test_a_node_whose_workers_die_before_they_work_is_given_pauses() -> None:
    machine = running("a", max_workers=2)
    for i in range(PATIENT_FAILURES + 1):
        machine.join(f"b{i}", node="bad")
        machine.wait(1)
        assert machine.members == ["a", f"b{i}"]
        machine.enter()
        machine.on(ev.Lost(f"b{i}"))
        machine.enter()
    machine.join("next", node="bad")
    machine.wait(3)
    assert machine.members == ["a"]
    machine.wait(4)
    assert machine.members == ["a", "next"]
    assert any(isinstance(c, ev.LogEvent) and c.event == "node_backoff" for c in machine.commands)


@pytest.mark.parametrize("slots", [3, 4])
def test_too_few_expert_slots_make_the_run_wait(slots: int) -> None:
    machine = Machine(2)
    machine.state = initial_state(2, slots_needed=4)
    for worker in "ab":
        machine.on(ev.Hello(worker, f"n-{worker}", 1, slots=slots), ev.Ready(worker))
    machine.enter()
    machine.on(ev.Lost("b"))
    assert machine.state.phase == (RUNNING if slots >= 4 else WAITING)
    if slots < 4:
        assert "expert slots" in machine.state.reason


def test_a_heartbeat_costs_no_look_at_the_rules() -> None:
    """A heartbeat that no rule waits for changes its worker's record alone; the tick does the rest."""
    machine = running("a", "b", "c")
    before = machine.state
    state, commands, _ = transition(before, ev.Heartbeat("b", 1, 0, 5), machine.now_s + 1.0, machine.config)
    assert commands == ()
    assert all(state.records[w] is before.records[w] for w in "ac")
    assert state.records["b"].last_heard_s > before.records["b"].last_heard_s
