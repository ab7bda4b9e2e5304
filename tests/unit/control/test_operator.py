"""What an operator may ask of a run that goes on: a checkpoint, another number of workers, a pause."""

from __future__ import annotations

from elastic_moe.control import events as ev
from elastic_moe.control.state import FINISHED, RUNNING, WAITING
from tests.unit.control.test_machine import Machine, running


def of(kind: type, commands: list[ev.Command]) -> list[ev.Command]:
    return [c for c in commands if isinstance(c, kind)]


def test_a_checkpoint_is_asked_of_all_members_once() -> None:
    machine = running("a", "b")
    machine.wait(0.5, step=8)
    assert of(ev.Save, machine.on(ev.Checkpoint())) == [ev.Save(("a", "b"), 7)]
    machine = Machine(2)
    assert of(ev.Save, machine.on(ev.Checkpoint())) == [], "there is no state yet"


def test_fewer_workers_hand_over_and_are_released() -> None:
    machine = running("a", "b", "c", "d")
    commands = machine.on(ev.Scale(2))
    assert of(ev.Save, commands)
    assert machine.draining == ["c", "d"], "the newest"
    machine.enter()
    machine.wait(1)
    assert machine.members == ["a", "b"]
    machine.enter()
    machine.join("e")
    assert machine.members == ["a", "b"]
    assert ev.Release("e") in machine.on(ev.Tick()) or machine.state.records["e"].released
    machine.on(ev.Scale(3))
    machine.join("f")
    machine.wait(10)
    assert machine.members == ["a", "b", "f"]


def test_the_node_that_is_emptied_with_the_fewest_workers_is_left() -> None:
    machine = Machine(5)
    machine.join("a", "b", node="one")
    machine.join("c", node="two")
    machine.join("d", "e", node="three")
    machine.enter()
    machine.on(ev.Scale(4))
    assert machine.draining == ["c"]
    machine.enter()
    machine.on(ev.Scale(2))
    assert [w for w, record in machine.state.records.items() if record.drain_s is not None] == ["c", "d", "e"]


def test_workers_on_spot_machines_leave_first() -> None:
    machine = Machine(5)
    machine.join("a", "b", node="spot one", on_spot=True)
    machine.join("c", "d", node="kept")
    machine.join("e", node="kept too")
    machine.enter()
    machine.on(ev.Scale(3))
    assert machine.draining == ["a", "b"], "neither the newest nor the smallest node"
    machine.enter()
    machine.wait(1)
    machine.enter()
    machine.on(ev.Scale(2))
    assert machine.draining == ["e"]


def test_of_workers_that_wait_those_on_spot_machines_are_released() -> None:
    machine = running("a", "b")
    machine.join("c", on_spot=True)
    machine.join("d")
    assert machine.members == ["a", "b"], "newcomers are not yet in"
    machine.on(ev.Scale(3))
    machine.on(ev.Tick())
    assert [w for w, record in machine.state.records.items() if record.released] == ["c"]


def test_never_fewer_than_the_run_needs() -> None:
    machine = running("a", "b", "c", min_workers=2)
    machine.on(ev.Scale(1))
    assert machine.state.limit == 2
    assert machine.draining == ["c"]


def test_a_larger_number_lets_more_in() -> None:
    machine = running("a", "b")
    machine.join("c")
    machine.wait(10)
    assert machine.members == ["a", "b"], "the number at the start is the largest where none is configured"
    machine.on(ev.Scale(3))
    machine.wait(10)
    assert machine.members == ["a", "b", "c"]


def test_a_pause_is_a_saved_hold_without_an_end_of_its_own() -> None:
    machine = running("a", "b", wait_below_min_s=5.0)
    (hold,) = of(ev.Hold, machine.on(ev.SetPaused(True)))
    assert isinstance(hold, ev.Hold)
    generation = hold.view.generation
    assert machine.state.phase == WAITING
    machine.on(ev.Held("a", generation), ev.Held("b", generation))
    machine.join("c")
    machine.wait(20)
    assert machine.state.phase == WAITING, "neither a newcomer nor time ends it"
    assert of(ev.Hold, machine.on(ev.SetPaused(True))) == []
    machine.on(ev.SetPaused(False))
    assert machine.state.phase == RUNNING
    assert machine.members[:2] == ["a", "b"]


def test_a_paused_run_survives_a_death_and_can_be_stopped() -> None:
    machine = running("a", "b", "c")
    machine.on(ev.SetPaused(True))
    machine.on(ev.Lost("b"))
    assert machine.state.phase == WAITING
    generation = machine.state.generation
    machine.on(ev.Held("a", generation), ev.Held("c", generation), ev.Stop("enough"))
    assert machine.state.phase == FINISHED


def test_a_run_that_is_paused_before_it_begins_begins_after_the_pause() -> None:
    machine = Machine(2)
    machine.on(ev.SetPaused(True))
    machine.join("a", "b")
    machine.wait(5)
    assert machine.state.view is None
    machine.on(ev.SetPaused(False))
    assert machine.members == ["a", "b"]


def test_what_is_asked_after_the_end_changes_nothing() -> None:
    machine = running("a")
    machine.on(ev.Stop("enough"), ev.Finished("a"), ev.Left("a"))
    machine.wait(20)
    for wish in (ev.Checkpoint(), ev.Scale(1), ev.SetPaused(True)):
        assert machine.on(wish) == []
