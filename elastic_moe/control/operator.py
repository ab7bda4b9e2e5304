"""Wishes of an operator for a run that goes on: a checkpoint now, another number of workers, a pause and its end. Pure.

A smaller number of workers is a drain of the surplus: they hand over their state, and no step is done twice. Workers on
spot machines go first. An autoscaler takes idle spot machines away and keeps a floor of others in any case, so that a
run that stayed on spot would pay for both. A pause is a hold (`control/holds.py`): the members save, keep their state,
and make no step until the end of the pause.
"""

from __future__ import annotations

from collections import Counter

from elastic_moe.config.schema import ElasticConfig
from elastic_moe.control.events import Checkpoint, Command, LogEvent, Release, Save, Scale, SetPaused
from elastic_moe.control.frozen import replace
from elastic_moe.control.holds import begin_hold, hold_s
from elastic_moe.control.state import RUNNING, State

Wish = Checkpoint | Scale | SetPaused


def take_wish(state: State, wish: Wish, now_s: float, config: ElasticConfig) -> tuple[State, list[Command]]:
    """Note a wish. One that is granted already changes nothing."""
    if state.over:
        return state, []
    match wish:
        case Checkpoint(reason):
            if state.phase != RUNNING:
                return state, []  # a hold saves what there is
            return state, [LogEvent("checkpoint_asked", reason=reason), Save(state.view_workers, state.step)]
        case Scale(workers, reason):
            limit = max(workers, config.min_workers, 1)
            if limit == state.limit:
                return state, []
            return replace(state, limit=limit), [LogEvent("scale", reason=f"{reason}: at most {limit} workers")]
        case SetPaused(paused, reason):
            if paused == state.paused:
                return state, []
            if paused:
                return replace(state, paused=True), []
            waiting_s = None if state.waiting_s is None else now_s  # the time of the pause counts for nothing
            return replace(state, paused=False, waiting_s=waiting_s), [LogEvent("resume", reason=reason)]


def obey(state: State, now_s: float, config: ElasticConfig) -> tuple[State, list[Command]]:
    """Begin what a wish asks for: the hold of a pause, or the drain of workers beyond the limit."""
    if state.view is None or state.phase != RUNNING or state.stopping:
        return state, []
    if state.paused:
        return begin_hold(state, state.view_workers, "paused by an operator", now_s, config)
    return _shrink(state, now_s, config) if state.limit else (state, [])


def _shrink(state: State, now_s: float, config: ElasticConfig) -> tuple[State, list[Command]]:
    """Give members beyond the limit a deadline, and release workers outside of the view for which there is no room."""
    staying = [w for w in state.view_workers if state.records[w].drain_s is None]
    waiting = [w for w, r in state.records.items() if not state.in_view(w) and not r.released and not r.bears_state]
    waiting.sort(key=lambda w: state.records[w].on_spot)
    until_s = now_s + max(config.drain_deadline_s, config.hang_timeout_s)
    commands: list[Command] = []
    for worker in _surplus(state, staying, len(staying) - state.limit):
        commands.append(_line("drain", state, worker))
        state = state.with_record(worker, drain_s=until_s, hold_s=hold_s(until_s, now_s))
    if commands:
        commands.append(Save(state.view_workers, state.step))
    for worker in waiting[max(0, state.limit - len(staying)) :]:
        commands += [_line("worker_released", state, worker), Release(worker)]
        state = state.with_record(worker, released=True)
    return state, commands


def _surplus(state: State, workers: list[str], count: int) -> list[str]:
    """So many of these workers: on spot first, then on the nodes that are emptied with the fewest, then the newest."""
    if count <= 0:
        return []
    node = {w: state.records[w].member.node for w in workers}
    stays = {node[w]: not state.records[w].on_spot for w in workers}
    size = Counter(node.values())
    newest = {n: max(i for i, w in enumerate(workers) if node[w] == n) for n in size}

    def place(index: int) -> tuple[bool, int, int, int]:
        on = node[workers[index]]
        return stays[on], size[on], -newest[on], -index

    return [workers[i] for i in sorted(range(len(workers)), key=place)[:count]]


def _line(event: str, state: State, worker: str) -> LogEvent:
    member = state.records[worker].member
    return LogEvent(event, worker, member.node, member.pid, f"scale: at most {state.limit} workers")
