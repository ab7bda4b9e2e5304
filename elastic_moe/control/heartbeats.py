"""Events that every member sends: heartbeats, and what all say when a view begins or breaks. Pure.

The rules take milliseconds if the members are a thousand. So they are not applied to each of these events: a heartbeat
changes one record, the heartbeats between two other events are taken in together, and of many members that say the same
only the first or the last matters. The tick applies the rules in any case.
"""

from __future__ import annotations

from collections.abc import Mapping

from elastic_moe.control.events import Entered, Event, Heartbeat, Suspect
from elastic_moe.control.frozen import replace
from elastic_moe.control.state import State

STALL_S = 2.0  # a longer gap between two events (ticks among them) means that the coordinator itself was stopped


def awaited(state: State, worker: str) -> bool:
    """Whether a rule waits for a sign of this worker, so that its heartbeat is more than a heartbeat."""
    return state.suspected_s is not None or state.records[worker].missing or worker in state.in_doubt


def one_of_many(before: State, state: State, event: Event) -> bool:
    """Whether all members send such an event, and others have come before it, or have to come, until a rule applies."""
    match event:
        case Suspect():
            return before.suspected_s is not None
        case Entered():
            return not state.all_entered
        case Heartbeat(worker):
            suspected_s = before.suspected_s
            if suspected_s is None or worker in before.in_doubt:
                return False
            members = state.view.members if state.view is not None else ()
            heard = (state.records[m.worker].last_heard_s for m in members if m.worker in state.records)
            return any(last_heard_s <= suspected_s for last_heard_s in heard)
        case _:
            return False


def is_routine(state: State, event: Heartbeat, now_s: float, resting: bool = False) -> bool:
    """Whether a heartbeat may be taken in with others, and later: no rule waits on it, or the rules are `resting`."""
    if event.worker not in state.records or (awaited(state, event.worker) and not resting):
        return False
    return _goes_on(state, now_s)


def repeats_suspicion(state: State, event: Suspect, now_s: float) -> bool:
    """Whether a suspicion says nothing new: its generation is suspected already, or over. It is a sign of life."""
    if event.worker not in state.records or state.view is None or not _goes_on(state, now_s):
        return False
    return state.suspected_s is not None or event.generation != state.view.generation


def _goes_on(state: State, now_s: float) -> bool:
    """Whether the coordinator has not been stopped; after that, silences are forgiven before anything else."""
    return state.ticked_s is not None and now_s - state.ticked_s <= STALL_S


def take_heartbeats(state: State, heard: Mapping[str, tuple[Heartbeat, float]]) -> State:
    """The state with signs of life in it: worker -> (newest heartbeat, time of its arrival).

    The cost is one copy of the table of workers for all of them, whatever the rules cost.
    """
    records, works = dict(state.records), False
    for worker, (event, now_s) in heard.items():
        record, progress = records[worker], (event.generation, event.step, event.progress)
        generation, before, _ = record.last_progress
        # The step falls where a view goes back to a checkpoint. Heartbeats come in order, so any change is progress.
        grew = event.generation >= generation and progress != record.last_progress
        works = works or (event.generation == generation == record.entered and 0 < before < event.step)
        records[worker] = replace(
            record,
            last_heard_s=now_s,
            missing=False,
            last_progress=progress if grew else record.last_progress,
            last_progress_s=now_s if grew else record.last_progress_s,
        )
    state = replace(state, records=records)
    step = max((event.step for event, _ in heard.values()), default=0) - 1
    return replace(state, step=max(state.step, step), reforms=0) if works or step > state.step else state
