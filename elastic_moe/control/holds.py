"""Holds: the run waits for workers, and its members keep the state. Before anything can happen to them, they save it.

A hold begins when too few members are left, shortly before the deadline of members without which the run could not go
on, and before the run fails although members live. The members form a group with a generation of its own, in which
they commit nothing: they agree on the committed step, write what they hold, and report. That happens once in a hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from elastic_moe.config.schema import ElasticConfig
from elastic_moe.control.events import Command, Hold, LogEvent, Pause
from elastic_moe.control.state import WAITING, State, WorkerRecord
from elastic_moe.types import View

LEAST_NOTICE_S = 10.0  # the run holds so long before a deadline, or a quarter of the notice if that is longer


def hold_s(until_s: float, now_s: float) -> float:
    """Time at which the run holds if it cannot go on without a member that has to end at `until_s`."""
    return until_s - max(LEAST_NOTICE_S, (until_s - now_s) / 4)


def leaves_soon(record: WorkerRecord, now_s: float) -> bool:
    """Whether the deadline of a worker is near."""
    return record.hold_s is not None and now_s >= record.hold_s


def begin_hold(
    state: State, workers: Sequence[str], reason: str, now_s: float, config: ElasticConfig, save: bool = True
) -> tuple[State, list[Command]]:
    """The state in a hold, and the commands that begin it.

    Args:
        state: the state before, with a view.
        workers: the living members.
        reason: cause of the hold.
        now_s: monotonic seconds.
        config: limits and timeouts.
        save: the members save their state; not where another group may have a newer one.
    """
    assert state.view is not None
    commands: list[Command] = [LogEvent("pause", reason=reason), Pause(state.view.generation, tuple(workers), reason)]
    state = replace(state, phase=WAITING, reason=reason, waiting_s=now_s, suspected_s=None, saving=frozenset())
    holders = [w for w in workers if state.records[w].bears_state]
    if save and holders:
        together = View(state.generation + 1, tuple(state.records[w].member for w in holders))
        commands.append(Hold(together, reason))
        state = replace(
            state,
            generation=together.generation,
            saving=frozenset(holders),
            saving_until_s=now_s + config.hang_timeout_s,
        )
    return state, commands


def is_saving(state: State, now_s: float) -> bool:
    """Whether members of a hold still save, so that the end of the run waits for them."""
    return now_s < state.saving_until_s and any(w in state.records for w in state.saving)
