"""A coordinator that was restarted: it publishes no view beside one that it may not know of."""

from __future__ import annotations

from dataclasses import replace

from elastic_moe.control import events as ev
from elastic_moe.control.doubt import CLOCK_DRIFT
from elastic_moe.types import View
from tests.unit.control.test_machine import Machine, running, view_of


def restarted(target: int) -> Machine:
    """A machine without memory that waits for one lease."""
    machine = Machine(target)
    machine.state = replace(machine.state, fence_s=machine.now_s + CLOCK_DRIFT * machine.config.lease_s)
    return machine


def hello(worker: str, view: View, lapsed: bool = False) -> ev.Hello:
    return ev.Hello(worker, f"n-{worker}", 1, ready=True, view=view, entered=view.generation, lapsed=lapsed)


def views(machine: Machine) -> list[list[str]]:
    return [[m.worker for m in publish.view.members] for publish in machine.published]


def test_members_that_are_not_heard_may_have_a_newer_view_until_their_lease_has_run_out() -> None:
    machine, view = restarted(3), view_of("a", "b", "c", generation=7)
    machine.on(hello("a", view), hello("b", view))
    lease_s = CLOCK_DRIFT * machine.config.lease_s
    machine.wait(lease_s - 2, silent=("c",))
    assert views(machine) == []
    machine.wait(4, silent=("c",))
    assert views(machine) == [["a", "b"]]


def test_a_member_that_is_proven_dead_is_not_waited_for() -> None:
    machine, view = restarted(3), view_of("a", "b", "c", generation=7)
    machine.on(hello("a", view), hello("b", view), ev.Lost("c"))
    assert views(machine) == [["a", "b"]]


def test_members_whose_lease_had_run_out_leave_their_view_and_wait_for_a_newer_one() -> None:
    """The coordinator before may have let others go on, who have not registered yet."""
    machine, old, newer = restarted(3), view_of("a", "b", generation=7), view_of("c", generation=9)
    commands = machine.on(hello("a", old, lapsed=True), hello("b", old, lapsed=True))
    assert [c.workers for c in commands if isinstance(c, ev.Pause)] == [("a",), ("b",)]
    machine.wait(5)
    assert views(machine) == []
    machine.on(hello("c", newer))
    assert machine.members == ["c"]
    machine.wait(CLOCK_DRIFT * machine.config.lease_s)
    assert machine.members == ["c", "a", "b"], "they join what went on"


def test_members_whose_lease_had_run_out_go_on_by_themselves_once_no_other_can() -> None:
    machine, old = restarted(2), view_of("a", "b", generation=7)
    machine.on(hello("a", old), hello("b", old, lapsed=True))
    machine.wait(CLOCK_DRIFT * machine.config.lease_s - 2)
    assert views(machine) == []
    machine.wait(5)
    assert views(machine)[0] == ["a", "b"]


def test_a_newer_view_that_is_adopted_takes_the_others_out_of_theirs() -> None:
    machine, old, newer = restarted(2), view_of("a", "b", generation=7), view_of("b", "c", generation=8)
    machine.on(hello("a", old))
    commands = machine.on(hello("c", newer))
    (pause,) = [c for c in commands if isinstance(c, ev.Pause)]
    assert (pause.generation, pause.workers) == (7, ("a",))


def test_a_coordinator_that_was_not_restarted_knows_what_became_of_the_view() -> None:
    """All were cut off from it for longer than a lease, and nothing happened meanwhile: nobody leaves."""
    machine = running("a", "b")
    view = machine.state.view
    assert view is not None
    machine.on(ev.Closed("a"), ev.Closed("b"))
    commands = machine.on(hello("a", view, lapsed=True), hello("b", view, lapsed=True))
    assert not any(isinstance(c, ev.Pause | ev.Publish) for c in commands)
    machine.wait(20, step=9)
    assert len(machine.published) == 1


def test_who_has_to_leave_is_told_again_if_the_connection_broke() -> None:
    machine, old = restarted(2), view_of("a", "b", generation=7)
    machine.on(hello("a", old), hello("b", old, lapsed=True), ev.Closed("b"))
    commands = machine.on(hello("b", old, lapsed=True))
    assert [c.workers for c in commands if isinstance(c, ev.Pause)] == [("b",)]
