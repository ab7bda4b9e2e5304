"""Every view says in one word what made it necessary, and a death is told from an eviction."""

from __future__ import annotations

import pytest

from elastic_moe.control import causes
from elastic_moe.control import events as ev
from tests.unit.control.test_machine import Machine


def started(**elastic: float) -> Machine:
    machine = Machine(3, **elastic)
    machine.join("a", "b", "c")
    machine.enter()
    machine.wait(1.0, step=3)
    assert [view.cause for view in machine.published] == [causes.START]
    return machine


@pytest.mark.parametrize("event", [ev.Lost("b", "killed"), ev.NodeLost("n-b", "gone"), ev.Closed("b")])
def test_a_death(event: ev.Event) -> None:
    machine = started()
    machine.on(event)
    machine.wait(10.0, silent=("b",), step=4)
    assert [view.cause for view in machine.published][1] == causes.DEATH


def test_a_death_that_a_waiting_worker_makes_up_for_at_once_is_a_death() -> None:
    machine = started(min_workers=3)
    machine.join("d")
    machine.on(ev.Lost("b", "killed"))
    assert [view.cause for view in machine.published] == [causes.START, causes.DEATH]


def test_silence_with_an_open_connection_is_an_eviction() -> None:
    machine = started()
    machine.wait(10.0, silent=("b",), step=4)
    assert [view.cause for view in machine.published] == [causes.START, causes.EVICTION]


def test_a_pause_a_join_and_a_drain() -> None:
    machine = started(min_workers=3)
    machine.on(ev.Lost("b", "killed"))
    assert machine.published[1:] == [], "too few are left"
    machine.join("d")
    machine.enter()
    machine.on(ev.Drain("", "n-a", 60.0, "spot"))
    machine.join("e")
    machine.wait(2.0, step=5)
    assert [view.cause for view in machine.published] == [causes.START, causes.PAUSE, causes.DRAIN]
    assert machine.published[2].reason == "join, drain"


def test_the_gravest() -> None:
    assert causes.gravest(("join", "death", "drain")) == "death"
    assert causes.gravest(()) == ""
