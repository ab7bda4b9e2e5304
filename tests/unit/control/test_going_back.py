"""A view that goes back to a checkpoint: the steps that its members report fall, and they get on all the same."""

from __future__ import annotations

from elastic_moe.control import events as ev
from tests.unit.control.test_machine import Machine, running

HANG_S = 10.0


def beat(machine: Machine, points: dict[str, tuple[int, int]], seconds: float = 0.5) -> None:
    """Let time pass. Every worker reports (step in the making, collectives completed) in the newest view."""
    machine.now_s += seconds
    generation = machine.state.generation
    machine.on(*(ev.Heartbeat(worker, generation, *point) for worker, point in points.items()), ev.Tick())


def lost_state() -> Machine:
    """Three workers at step 100. The third one dies with the last copy of a unit, and the others say where they are."""
    machine = running("a", "b", "c", hang_timeout_s=HANG_S)
    for step in range(1, 101):
        beat(machine, dict.fromkeys("abc", (step, 10 * step)))
    machine.on(ev.Lost("c"))
    beat(machine, {"a": (100, 2), "b": (100, 3)})
    return machine


def test_members_that_make_old_steps_again_do_not_hang() -> None:
    machine = lost_state()
    machine.enter()
    for step in range(10, 80):
        beat(machine, dict.fromkeys("ab", (step, 10 * step)))
    assert machine.members == ["a", "b"]
    assert len(machine.published) == 2


def test_who_hangs_on_the_way_back_is_removed_and_not_those_who_wait_for_it() -> None:
    machine = lost_state()
    for _ in range(30):
        beat(machine, {"a": (51, 9), "b": (100, 4)})
    assert machine.members == ["a"]
    assert [c.worker for c in machine.commands if isinstance(c, ev.Evict)] == ["c", "b"]


def test_a_view_that_makes_old_steps_again_works() -> None:
    machine = lost_state()
    machine.enter()
    beat(machine, {"a": (51, 9), "b": (51, 9)})
    machine.on(ev.Suspect("a", machine.state.generation, "reset"))
    for _ in range(4):
        beat(machine, {"a": (51, 9), "b": (51, 9)})
    assert machine.state.reforms == 1
    machine.enter()
    beat(machine, {"a": (51, 9), "b": (51, 9)})
    assert machine.state.reforms == 1, "no step was made in the new view"
    beat(machine, {"a": (52, 19), "b": (52, 19)})
    assert machine.state.reforms == 0
