"""Saves before planned ends, holds and failures: when members are asked, and what the end of the run waits for."""

from __future__ import annotations

import pytest

from elastic_moe.control import events as ev
from elastic_moe.control.adoption import ADOPTION_GAP
from elastic_moe.control.holds import MAX_BACKOFF_S, MAX_TRIES
from elastic_moe.control.state import FAILED, FINISHED, RUNNING, WAITING
from elastic_moe.types import INTERRUPTED, NOT_WHOLE
from tests.unit.control.test_machine import Machine, running


def saves(commands: list[ev.Command]) -> list[ev.Save]:
    return [c for c in commands if isinstance(c, ev.Save)]


def test_members_save_before_one_of_them_drains() -> None:
    machine = running("a", "b", "c")
    machine.wait(0.5, step=8)
    commands = machine.on(ev.Drain(worker="b"))
    assert saves(commands) == [ev.Save(("a", "b", "c"), 7)]
    publish = next(c for c in commands if isinstance(c, ev.Publish))
    assert commands.index(saves(commands)[0]) < commands.index(publish), "the wish must be in the last vote of the view"


def test_a_drain_of_nobody_asks_for_no_checkpoint() -> None:
    machine = running("a", "b")
    machine.join("spare")
    assert saves(machine.on(ev.Drain(node="elsewhere"), ev.Drain(worker="spare"))) == []


def holds(commands: list[ev.Command]) -> list[ev.Hold]:
    return [c for c in commands if isinstance(c, ev.Hold)]


def test_survivors_that_are_too_few_save_together_and_a_stop_waits_for_them() -> None:
    machine = running("a", "b", "c", min_workers=3)
    commands = machine.on(ev.Lost("b"))
    (hold,) = holds(commands)
    assert [m.worker for m in hold.view.members] == ["a", "c"]
    assert hold.view.generation == 2
    assert [type(c) for c in commands].index(ev.Pause) < commands.index(hold)
    assert holds(machine.wait(3)) == [], "once in a hold"
    machine.on(ev.Stop("enough"), ev.Held("a", 2), ev.Held("c", 1))
    assert machine.state.phase == WAITING
    machine.on(ev.Held("c", 2))
    assert machine.state.phase == FINISHED


def test_a_stop_waits_for_a_save_with_a_bound_and_not_for_the_dead() -> None:
    machine = running("a", "b", "c", min_workers=3)
    machine.on(ev.Lost("b"), ev.Stop("enough"), ev.Held("a", 2), ev.Lost("c"))
    assert machine.state.phase == FINISHED
    machine = running("a", "b", min_workers=2, hang_timeout_s=20)
    machine.on(ev.Lost("b"), ev.Stop("enough"))
    machine.wait(19)
    assert machine.state.phase == WAITING
    machine.wait(2)
    assert machine.state.phase == FINISHED


def test_the_view_after_a_hold_is_newer_than_the_hold() -> None:
    machine = running("a", "b", min_workers=2)
    (hold,) = holds(machine.on(ev.Lost("b")))
    machine.join("c")
    assert machine.members == ["a", "c"]
    assert machine.state.generation == hold.view.generation + 1
    machine.enter()
    machine.on(ev.Stop("enough"))
    assert machine.state.phase == RUNNING, "the save of the hold before is not waited for"


@pytest.mark.parametrize(("notice_s", "before_s"), [(30.0, 10.0), (120.0, 30.0)])
def test_a_run_that_cannot_go_on_without_the_drained_holds_before_their_deadline(
    notice_s: float, before_s: float
) -> None:
    machine = running("a", "b", min_workers=2)
    assert saves(machine.on(ev.Drain(node="n-a", deadline_s=notice_s)))
    assert holds(machine.wait(notice_s - before_s - 0.5, step=3)) == []
    assert machine.state.phase == RUNNING, "it goes on until then"
    (hold,) = holds(machine.wait(1.0, step=4))
    assert [m.worker for m in hold.view.members] == ["a", "b"]
    machine.wait(2.0)
    assert machine.state.phase == WAITING, "those that must end soon are not enough to go on with"
    machine.join("c")
    assert (machine.members, machine.draining) == (["a", "b", "c"], ["a"])


def test_a_whole_run_that_is_drained_holds_and_is_not_lost() -> None:
    machine = running("a", "b")
    machine.on(ev.Drain(worker="a", deadline_s=30), ev.Drain(worker="b", deadline_s=60))
    machine.enter()
    machine.enter()
    assert machine.members == ["b"], "one hands over"
    (hold,) = holds(machine.wait(60, step=3))
    assert [m.worker for m in hold.view.members] == ["b"]


def test_no_save_where_another_group_may_have_a_newer_state() -> None:
    """`c` has entered a view that the others never entered; they are cut off, and may still commit in the old one."""
    machine = running("a", "b", max_workers=3, heartbeat_timeout_s=3, hang_timeout_s=8, lease_s=60)
    machine.join("c")
    machine.wait(1)
    machine.on(ev.Entered("c", 2))
    commands = machine.wait(12, silent=("a", "b"))
    assert machine.state.phase == WAITING
    assert "lease" in machine.state.reason
    assert holds(commands) == []


def test_it_saves_once_the_other_group_cannot_commit_any_more() -> None:
    """As above; the lease of those that were cut off runs out in the hold, and a stop waits for that."""
    machine = running("a", "b", min_workers=2, max_workers=3, heartbeat_timeout_s=3, hang_timeout_s=8, lease_s=18)
    machine.join("c")
    machine.wait(1)
    machine.on(ev.Entered("c", 2))
    assert holds(machine.wait(12, silent=("a", "b"))) == []
    machine.on(ev.Stop("enough"))
    (hold,) = holds(machine.wait(7))
    assert [m.worker for m in hold.view.members] == ["c"]
    assert machine.state.phase == WAITING
    machine.on(ev.Held("c", hold.view.generation))
    assert machine.state.phase == FINISHED


# --- saves that do not succeed ----------------------------------------------------------------------------------------


def told(commands: list[ev.Command]) -> list[str]:
    return [c.reason for c in commands if isinstance(c, ev.LogEvent) and c.event == "checkpoint_failed"]


def held(machine: Machine, outcome: str, *workers: str) -> list[ev.Command]:
    return machine.on(*(ev.Held(worker, machine.state.generation, outcome) for worker in workers))


def test_an_interrupted_save_is_tried_again_with_longer_and_longer_pauses_and_told_once() -> None:
    machine = running("a", "b", "c", min_workers=3)
    machine.on(ev.Lost("c"))
    pauses_s: list[float] = []
    commands: list[ev.Command] = []
    while True:
        commands += held(machine, INTERRUPTED, "a", "b")
        before_s, begun = machine.now_s, len(holds(machine.commands))
        while len(holds(machine.commands)) == begun and machine.now_s < before_s + 2 * MAX_BACKOFF_S:
            commands += machine.wait(0.5)
        if len(holds(machine.commands)) == begun:
            break
        pauses_s.append(machine.now_s - before_s)
    assert pauses_s == [1, 2, 4, 8, 16, 32, 60]
    assert len(told(commands)) == 1
    assert "again" in told(commands)[0]
    assert len(holds(machine.commands)) == MAX_TRIES < ADOPTION_GAP
    generations = [hold.view.generation for hold in holds(machine.commands)]
    assert generations == sorted(set(generations))
    machine.on(ev.Stop("enough"))
    assert machine.state.phase == FINISHED, "no further try is waited for"


def test_a_member_that_is_lost_while_all_save_lets_the_others_begin_anew() -> None:
    machine = running("a", "b", "c", "d", min_workers=4)
    machine.on(ev.Lost("d"))
    commands = machine.on(ev.Lost("b"))
    (again,) = holds(commands)
    assert [m.worker for m in again.view.members] == ["a", "c"]
    machine.on(ev.Held("a", again.view.generation - 1, INTERRUPTED))
    assert machine.state.saving == {"a", "c"}, "of the try before"
    held(machine, "saved", "a", "c")
    assert holds(machine.wait(100)) == []
    assert holds(machine.on(ev.Lost("c"))) == [], "the state is saved"


def test_a_state_that_is_not_whole_is_saved_when_the_rest_is_back() -> None:
    machine = running("a", "b", "c", min_workers=3, redundancy=0, heartbeat_timeout_s=3, hang_timeout_s=8, lease_s=2)
    machine.on(ev.Closed("c"))
    (hold,) = holds(machine.wait(6, silent=("c",)))
    assert [m.worker for m in hold.view.members] == ["a", "b"]
    assert len(told(held(machine, NOT_WHOLE, "a", "b"))) == 1
    assert holds(machine.wait(100, silent=("c",))) == []
    view = machine.state.view
    machine.on(ev.Lost("b"))
    commands = machine.on(ev.Hello("c", "n-c", 2, ready=True, view=view, entered=1))
    (again,) = holds(commands)
    assert [m.worker for m in again.view.members] == ["a", "c"]


def test_a_stop_does_not_wait_for_a_state_that_is_not_whole() -> None:
    machine = running("a", "b", "c", min_workers=3)
    machine.on(ev.Lost("b"))
    held(machine, NOT_WHOLE, "a", "c")
    machine.on(ev.Stop("enough"))
    assert machine.state.phase == WAITING, "one more try, since storage or workers may be back"
    held(machine, NOT_WHOLE, "a", "c")
    assert machine.state.phase == FINISHED


def test_a_stop_late_in_a_hold_waits_for_the_save_that_is_still_tried() -> None:
    machine = running("a", "b", min_workers=2, hang_timeout_s=20)
    machine.on(ev.Lost("b"))
    machine.wait(100)
    machine.on(ev.Stop("enough"))
    machine.wait(19)
    assert machine.state.phase == WAITING, "the member writes again and again"
    held(machine, "saved", "a")
    assert machine.state.phase == FINISHED


# --- failures with living members -------------------------------------------------------------------------------------


def test_a_run_that_is_given_up_saves_first() -> None:
    machine = running("a", "b", "c")
    commands = machine.on(ev.Fail("a worker has no GPU"))
    (hold,) = holds(commands)
    assert [m.worker for m in hold.view.members] == ["a", "b", "c"]
    machine.join("d")
    assert machine.state.phase == WAITING, "nobody is taken in any more"
    assert machine.on(ev.Fail("another")) == []
    held(machine, "saved", "a", "b")
    assert machine.state.phase == WAITING
    commands = held(machine, "saved", "c")
    assert (machine.state.phase, machine.state.reason) == (FAILED, "a worker has no GPU")
    assert {c.worker for c in commands if isinstance(c, ev.Release)} == {"a", "b", "c", "d"}


def test_a_run_that_is_given_up_waits_for_its_save_with_a_bound() -> None:
    machine = running("a", "b", hang_timeout_s=20)
    machine.on(ev.Fail("no"))
    machine.wait(19)
    assert machine.state.phase == WAITING
    machine.wait(2)
    assert machine.state.phase == FAILED


def test_a_run_without_members_is_given_up_at_once() -> None:
    machine = Machine(2)
    machine.join("a")
    machine.on(ev.Fail("no"))
    assert machine.state.phase == FAILED
    machine = running("a", "b")
    machine.on(ev.Lost("a"), ev.Lost("b"), ev.Fail("no"))
    assert machine.state.phase == FAILED


def test_a_run_that_is_given_up_in_a_hold_tries_to_save_once_more() -> None:
    machine = running("a", "b", min_workers=2)
    machine.on(ev.Lost("b"))
    held(machine, INTERRUPTED, "a")
    machine.wait(0.5)
    (hold,) = holds(machine.on(ev.Fail("no")))
    assert machine.state.phase == WAITING
    machine.on(ev.Held("a", hold.view.generation))
    assert machine.state.phase == FAILED


def test_a_run_that_is_given_up_at_its_end_has_finished() -> None:
    machine = running("a", "b")
    machine.on(ev.Finished("a"), ev.Fail("no"))
    assert holds(machine.commands) == []
    machine.on(ev.Finished("b"))
    assert machine.state.phase == FINISHED
