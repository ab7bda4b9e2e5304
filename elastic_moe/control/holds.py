"""Holds: the run waits for workers, and its members keep the state. Before anything can happen to them, they save it.

A hold begins when too few members are left, shortly before the deadline of members without which the run could not go
on, and before the run fails although members live. The members form a group with a generation of its own, in which
they commit nothing: they agree on the committed step, write what they hold, and report. That happens once in a hold,
and again where it did not succeed: a member was lost or came back, the group broke, or another group might still have
committed. A storage that fails is tried again by the members themselves (`runtime/saver.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

from elastic_moe.config.schema import ElasticConfig
from elastic_moe.control.doubt import no_other_group_commits
from elastic_moe.control.events import Command, Held, Hold, LogEvent, Pause
from elastic_moe.control.frozen import replace
from elastic_moe.control.state import WAITING, HoldSave, State, WorkerRecord
from elastic_moe.types import INTERRUPTED, NOT_WHOLE, SAVED, View

LEAST_NOTICE_S = 10.0  # the run holds so long before a deadline, or a quarter of the notice if that is longer
MAX_TRIES = 8  # saves in one hold. Each takes a generation, and a restarted coordinator leaves ten free (ADOPTION_GAP)
MAX_BACKOFF_S = 60.0
TOLD = {
    NOT_WHOLE: "the members do not have all of the state together; it is saved when an absent worker brings the rest",
    INTERRUPTED: "the save in the hold was interrupted; it is tried again while the hold lasts",
}


def hold_s(until_s: float, now_s: float) -> float:
    """Time at which the run holds if it cannot go on without a member that has to end at `until_s`."""
    return until_s - max(LEAST_NOTICE_S, (until_s - now_s) / 4)


def leaves_soon(record: WorkerRecord, now_s: float) -> bool:
    """Whether the deadline of a worker is near."""
    return record.hold_s is not None and now_s >= record.hold_s


def begin_hold(
    state: State, workers: Sequence[str], reason: str, now_s: float, config: ElasticConfig
) -> tuple[State, list[Command]]:
    """The state in a hold, and the commands that begin it.

    Args:
        state: the state before, with a view.
        workers: the living members.
        reason: cause of the hold.
        now_s: monotonic seconds.
        config: limits and timeouts.
    """
    assert state.view is not None
    commands: list[Command] = [LogEvent("pause", reason=reason), Pause(state.view.generation, tuple(workers), reason)]
    state = replace(state, phase=WAITING, reason=reason, waiting_s=now_s, suspected_s=None, saving=frozenset())
    state = replace(state, hold_save=HoldSave(again_s=now_s), saving_until_s=now_s + config.hang_timeout_s)
    state, begun = save_in_hold(state, now_s, config)
    return state, commands + begun


def save_in_hold(state: State, now_s: float, config: ElasticConfig) -> tuple[State, list[Command]]:
    """Let the members of a hold save, if that is due and no other group may have a newer state."""
    save = state.hold_save
    if state.phase != WAITING or save is None or save.done or save.tries >= MAX_TRIES:
        return state, []
    holders = [w for w in state.view_workers if state.records[w].bears_state]
    lost = bool(state.saving) and not state.saving <= state.records.keys()
    back = save.tries > 0 and not state.saving and not save.members.issuperset(holders)
    due = save.again_s is not None and now_s >= save.again_s
    if not holders or not (lost or back or due):
        return state, []
    if not no_other_group_commits(state, state.view_workers, now_s, config):
        return state, []
    together = View(state.generation + 1, tuple(state.records[w].member for w in holders))
    save = replace(save, members=frozenset(holders), tries=save.tries + 1, again_s=None)
    state = replace(state, generation=together.generation, saving=save.members, hold_save=save)
    return state, [Hold(together, state.reason)]


def take_held(state: State, event: Held, now_s: float) -> tuple[State, list[Command]]:
    """A member reports that it is done with saving. What did not succeed is tried again, and told once."""
    save = state.hold_save
    if event.generation != state.generation or save is None:
        return state, []
    state = replace(state, saving=state.saving - {event.worker})
    if event.outcome == SAVED or save.done:
        return replace(state, hold_save=replace(save, done=True, again_s=None)), []
    again_s = now_s + min(MAX_BACKOFF_S, 2.0 ** (save.tries - 1)) if event.outcome == INTERRUPTED else None
    state = replace(state, hold_save=replace(save, again_s=again_s, told=True))
    told = LogEvent("checkpoint_failed", reason=TOLD.get(event.outcome, event.outcome))
    return state, [] if save.told else [told]


def end_soon(state: State, now_s: float, config: ElasticConfig) -> State:
    """The state once the end of the run is asked for: a hold whose state is not saved tries it at once."""
    save = state.hold_save
    if state.phase != WAITING or save is None or save.done:
        return state
    again_s = None if state.saving else now_s
    return replace(state, hold_save=replace(save, again_s=again_s), saving_until_s=now_s + config.hang_timeout_s)


def is_saving(state: State, now_s: float) -> bool:
    """Whether members of a hold still save, or soon try again, so that the end of the run waits for them."""
    save = state.hold_save
    if now_s >= state.saving_until_s or save is None:
        return False
    due = save.again_s is not None and save.tries < MAX_TRIES
    holders = any(state.records[w].bears_state for w in state.view_workers)
    return any(w in state.records for w in state.saving) or (due and holders)
