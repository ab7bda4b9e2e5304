"""The rules of membership, applied to what is known after every event: who is given up, which view comes next, when the run is over.

A *planned* view (join, drain) waits until every active member has entered the one before, and is entered at a step boundary. An *unplanned*
one (a death) interrupts. A view that fails though nobody died is *re-formed*: same members, next generation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from elastic_moe.config.schema import ElasticConfig
from elastic_moe.control.events import Command, End, Evict, LogEvent, Pause, Publish, Release
from elastic_moe.control.state import FAILED, FINISHED, FINISHING, RUNNING, WAITING, State
from elastic_moe.types import Member, View

START_GRACE_S = 30.0  # after the first worker is ready, wait this long for the target number
FINISH_GRACE_S = 10.0  # after the first worker finished, wait this long for the others to say so
REFORM_GRACE_S = 0.3  # a suspicion may be the first sign of a death; its closed connection arrives within this
ADOPTED_GRACE_S = 1.0  # after a restart: time to hear that an adopted view was entered
MAX_REFORMS = 20  # views in a row that failed although everyone lived

Decision = tuple[State, list[Command], str]


def apply_rules(state: State, now_s: float, config: ElasticConfig) -> Decision:
    """Apply the rules. Returns the state, the commands and why they were given."""
    if state.over:
        return state, [], ""
    state, commands = _give_up(state, now_s, config)
    for rule in (_finish, _start, _survive, _resume, _reform, _plan):
        decision = rule(state, now_s, config)
        if decision is not None:
            state, more, reason = decision
            return state, commands + more, reason
    return state, commands, commands[0].reason if commands and isinstance(commands[0], LogEvent) else ""


# --- who is given up --------------------------------------------------------------------------------------------------


def _give_up(state: State, now_s: float, config: ElasticConfig) -> tuple[State, list[Command]]:
    """Evict the silent, the hung, and those whose drain deadline has passed."""
    verdicts: dict[str, str] = {}
    for worker, record in state.records.items():
        if now_s - record.last_heard_s > config.heartbeat_timeout_s:
            verdicts[worker] = f"silent for {config.heartbeat_timeout_s:g} s"
        elif record.drain_s is not None and now_s > record.drain_s and not record.released:
            verdicts[worker] = "drain deadline passed"
    for worker in _hung(state, now_s, config):
        verdicts.setdefault(worker, f"no progress for {config.hang_timeout_s:g} s while others waited")
    commands: list[Command] = []
    for worker, reason in verdicts.items():
        member = state.records[worker].member
        commands += [LogEvent("worker_evicted", worker, member.node, member.pid, reason), Evict(worker, reason)]
        state = state.without(worker)
    return state, commands


def _hung(state: State, now_s: float, config: ElasticConfig) -> list[str]:
    """Members whose main thread stands still at the least advanced point, while others stand further on."""
    workers = state.view_workers
    if state.phase != RUNNING or not workers:
        return []
    marks = [state.records[w].last_progress for w in workers]
    if min(marks) == max(marks):
        return []
    return [
        w
        for w in workers
        if state.records[w].last_progress == min(marks)
        and now_s - state.records[w].last_progress_s > config.hang_timeout_s
    ]


# --- when the run is over ---------------------------------------------------------------------------------------------


def _finish(state: State, now_s: float, config: ElasticConfig) -> Decision | None:
    """Finishing members have all passed the last barrier, so nothing is lost if one of them goes without a word."""
    if state.phase == FINISHING:
        assert state.finishing_s is not None
        waiting = [w for w in state.view_workers if not state.records[w].finished]
        if waiting and now_s - state.finishing_s < FINISH_GRACE_S and state.suspected_s is None:
            return None
        return _end(state, FINISHED, state.reason if state.stopping else "all steps are committed")
    if state.stopping and state.phase == WAITING:
        return _end(state, FINISHED, state.reason)
    if state.phase == WAITING and state.waiting_s is not None and now_s - state.waiting_s > config.wait_below_min_s:
        reason = f"fewer than elastic.min_workers={config.min_workers} workers for {config.wait_below_min_s:g} s"
        return _end(state, FAILED, reason)
    if state.reforms > MAX_REFORMS:
        return _end(state, FAILED, f"{MAX_REFORMS} views in a row could not be entered")
    return None


def _end(state: State, phase: str, reason: str) -> Decision:
    releases: list[Command] = [Release(w) for w, record in state.records.items() if not record.finished]
    return (
        replace(state, phase=phase, reason=reason),
        [LogEvent(phase, reason=reason), *releases, End(phase, reason)],
        reason,
    )


# --- views ------------------------------------------------------------------------------------------------------------


def _start(state: State, now_s: float, config: ElasticConfig) -> Decision | None:
    """The first view, once the target number is ready, or enough are after a while."""
    if state.view is not None or state.phase != WAITING:
        return None
    if state.waiting_s is None:
        state = replace(state, waiting_s=now_s)
    ready = _joiners(state)
    since_s = [s for w in ready if (s := state.records[w].ready_s) is not None]
    enough = len(ready) >= min_workers(config) and now_s - min(since_s) >= START_GRACE_S
    if len(ready) < max(min_workers(config), min(state.target, max_workers(state, config))) and not enough:
        return state, [], ""
    members = [state.records[w].member for w in ready[: max_workers(state, config)]]
    return _publish(state, members, True, "start", now_s)


def _survive(state: State, now_s: float, config: ElasticConfig) -> Decision | None:
    """A member died: go on with the survivors at once, or hold if they are too few."""
    if state.view is None or state.phase != RUNNING or len(state.view_workers) == state.view.world_size:
        return None
    dead = [m.worker for m in state.view.members if m.worker not in state.records]
    reason = "lost " + ", ".join(dead)
    survivors = state.view_workers
    if len(survivors) >= min_workers(config):
        return _publish(state, _members(state, survivors, config), False, reason, now_s)
    reason += f"; {len(survivors)} left, waiting for elastic.min_workers={config.min_workers}"
    generation = state.view.generation
    state = replace(state, phase=WAITING, reason=reason, waiting_s=now_s, suspected_s=None)
    state, published, why = _resume(state, now_s, config) or (state, [], "")
    if published:
        return state, published, why
    return state, [LogEvent("pause", reason=reason), Pause(generation, survivors, reason)], reason


def _resume(state: State, now_s: float, config: ElasticConfig) -> Decision | None:
    """End a hold once survivors and newcomers together are enough."""
    if state.view is None or state.phase != WAITING:
        return None
    workers = (*state.view_workers, *_joiners(state))
    if len(workers) < min_workers(config):
        return None
    workers = workers[: max(max_workers(state, config), len(state.view_workers))]
    return _publish(state, _members(state, workers, config), False, "enough workers again", now_s)


def _reform(state: State, now_s: float, config: ElasticConfig) -> Decision | None:
    """Re-form a view that does not work although all its members live."""
    if state.view is None or state.phase != RUNNING:
        return None
    records = [state.records[w] for w in state.view_workers]
    reason, moved = "", False
    if state.suspected_s is not None:
        grace_s = min(REFORM_GRACE_S * 2.0**state.reforms, 10.0)
        answered = all(record.last_heard_s > state.suspected_s for record in records)
        reason = "a collective failed, all members live" if answered and now_s - state.suspected_s >= grace_s else ""
    elif state.adopted_s is not None and not state.all_entered and not any(record.missing for record in records):
        reason = (
            "the coordinator was lost while a view was entered" if now_s - state.adopted_s > ADOPTED_GRACE_S else ""
        )
    elif all(now_s - record.last_progress_s > config.hang_timeout_s for record in records):
        reason, moved = f"nobody progressed for {config.hang_timeout_s:g} s", True
    if not reason:
        return None
    members = _members(state, state.view_workers, config)
    return _publish(replace(state, reforms=state.reforms + 1), members, False, reason, now_s, keep_moved=not moved)


def _plan(state: State, now_s: float, config: ElasticConfig) -> Decision | None:
    """The next planned view: without those that have handed over, with those that must, and with newcomers."""
    if state.view is None or state.phase != RUNNING or not state.all_entered or state.suspected_s is not None:
        return None
    if state.stopping:
        return None
    handed_over = [m.worker for m in state.view.members if m.draining]
    staying = [w for w in state.view_workers if w not in handed_over]
    joiners = _joiners(state)
    oldest_s = min((s for w in joiners if (s := state.records[w].ready_s) is not None), default=now_s)
    leaving = [w for w in staying if state.records[w].drain_s is not None]
    if not leaving and now_s - oldest_s < config.join_settle_s:
        joiners = []
    joiners = joiners[: max(0, max_workers(state, config) - len(staying) + len(leaving))]
    members = _members(state, [*staying, *joiners], config)
    if tuple(members) == state.view.members or sum(not m.draining for m in members) < min_workers(config):
        return None
    causes = {
        "join": bool(joiners),
        "drain": any(m.draining for m in members),
        "release": bool(handed_over),
    }
    reason = ", ".join(cause for cause, holds in causes.items() if holds)
    state, commands, _ = _publish(state, members, True, reason, now_s)
    for worker in handed_over:
        member = state.records[worker].member
        commands += [LogEvent("worker_released", worker, member.node, member.pid, reason), Release(worker)]
        state = state.with_record(worker, released=True)
    return state, commands, reason


def _publish(
    state: State, members: Sequence[Member], planned: bool, reason: str, now_s: float, keep_moved: bool = False
) -> Decision:
    view = View(state.generation + 1, tuple(members))
    records = dict(state.records)
    for member in members:
        if not keep_moved:
            records[member.worker] = replace(records[member.worker], last_progress_s=now_s)
    recipients = [m.worker for m in members]
    if not planned:  # a released worker that waits in a collective of an older view must be interrupted too
        recipients += [w for w, record in records.items() if record.released]
    state = replace(
        state,
        phase=RUNNING,
        reason=reason,
        records=records,
        view=view,
        generation=view.generation,
        entered=frozenset(),
        adopted_s=None,
        suspected_s=None,
        waiting_s=None,
    )
    return state, [Publish(view, planned, reason, tuple(recipients))], reason


def _members(state: State, workers: Sequence[str], config: ElasticConfig) -> list[Member]:
    """Members in the order given; those that must leave are draining, the most urgent first, while enough stay active."""
    urgent = sorted(
        (w for w in workers if state.records[w].drain_s is not None), key=lambda w: state.records[w].drain_s or 0.0
    )
    spare = max(0, len(workers) - min_workers(config))
    draining = set(urgent[:spare])
    return [replace(state.records[w].member, draining=w in draining) for w in workers]


def _joiners(state: State) -> list[str]:
    """Workers that are ready and wait outside the view, in order of arrival."""
    return [
        w
        for w, record in state.records.items()
        if record.ready_s is not None and not record.released and record.drain_s is None and not state.in_view(w)
    ]


def min_workers(config: ElasticConfig) -> int:
    return max(1, config.min_workers)


def max_workers(state: State, config: ElasticConfig) -> int:
    return max(config.max_workers or state.target, min_workers(config))
