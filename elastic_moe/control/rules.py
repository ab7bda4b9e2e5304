"""The rules of membership, applied to the state after every event: evictions, the next view, the end of the run.

A *planned* view (join, drain) is published once every active member has entered the view before, and is entered at a
step boundary. An *unplanned* view (a death) interrupts the step in flight. A view that fails although no member died is
*re-formed*: same members, next generation.
"""

from __future__ import annotations

from collections.abc import Sequence

from elastic_moe.config.schema import ElasticConfig
from elastic_moe.control import causes
from elastic_moe.control.doubt import (
    newer_view_may_exist,
    no_other_group_commits,
    others_hold_all,
    remove_hung,
    remove_in_doubt,
    waits_for_absent,
)
from elastic_moe.control.ending import RuleResult, finish
from elastic_moe.control.events import LogEvent, Publish, Release
from elastic_moe.control.frozen import replace
from elastic_moe.control.holds import begin_hold, leaves_soon, save_in_hold
from elastic_moe.control.links import (
    ask_joiners,
    check_members,
    cut_off,
    describe,
    linked,
    set_aside,
    wait_for_links,
    watch_members,
)
from elastic_moe.control.operator import obey
from elastic_moe.control.state import RUNNING, WAITING, State
from elastic_moe.types import Member, View

REFORMS_WITH_NEWCOMERS = 3  # views in a row that failed before newcomers are left out
START_GRACE_S = 30.0  # after the first worker is ready, wait this long for the target number
REFORM_GRACE_S = 0.3  # a suspicion may be the first sign of a death; its closed connection arrives within this
ADOPTED_GRACE_S = 1.0  # after a restart: time for the members to report that they have entered the adopted view


def apply_rules(state: State, now_s: float, config: ElasticConfig) -> RuleResult:
    """Apply the rules. Returns the state, the commands and their reason."""
    if state.over:
        return state, [], ""
    state, in_doubt = remove_in_doubt(state, now_s, config)
    state, hung = remove_hung(state, now_s, config)
    state, asked = ask_joiners(state, _candidates(state, now_s) if state.view is not None else [], now_s)
    state, watched = watch_members(state, now_s, config)
    state, obeyed = obey(state, now_s, config)
    commands = in_doubt + hung + asked + watched + obeyed
    for rule in (finish, _start, _survive, _resume, _reform, _retreat, _plan):
        result = rule(state, now_s, config)
        if result is not None:
            state, more, reason = result
            return state, commands + more, reason
    state, saved = save_in_hold(state, now_s, config)
    commands += saved
    return state, commands, commands[0].reason if commands and isinstance(commands[0], LogEvent) else ""


# --- views ------------------------------------------------------------------------------------------------------------


def _start(state: State, now_s: float, config: ElasticConfig) -> RuleResult | None:
    """Publish the first view: once the target number is ready, or after `START_GRACE_S` with enough workers."""
    if state.view is not None or state.phase != WAITING or state.paused:
        return None
    if state.waiting_s is None:
        state = replace(state, waiting_s=now_s)
    ready = _candidates(state, now_s)
    since_s = [s for w in ready if (s := state.records[w].ready_s) is not None]
    enough = len(ready) >= min_workers(config) and now_s - min(since_s) >= START_GRACE_S
    if len(ready) < max(min_workers(config), min(state.target, max_workers(state, config))) and not enough:
        return state, [], ""
    ready = ready[: max_workers(state, config)]
    if _lacking(state, ready, now_s, config):
        return state, [], ""
    return _publish(state, [state.records[w].member for w in ready], True, "start", now_s, causes.START)


def _survive(state: State, now_s: float, config: ElasticConfig) -> RuleResult | None:
    """A member died: go on with the survivors at once, or pause if they are too few."""
    if state.view is None or state.phase != RUNNING or len(state.view_workers) == state.view.world_size:
        return None
    dead = [m.worker for m in state.view.members if m.worker not in state.records]
    reason = "lost " + ", ".join(dead)
    survivors = state.view_workers
    lacking = _lacking(state, survivors, now_s, config)
    silent = [worker for worker in dead if worker in state.absent and state.absent[worker].silent]
    cause = causes.EVICTION if len(silent) == len(dead) else causes.DEATH
    if not lacking:
        return _publish(state, _members(state, survivors, config), False, reason, now_s, cause)
    reason += f"; {len(survivors)} left, waiting for {lacking}"
    resumed = _resume(replace(state, phase=WAITING, reason=reason, waiting_s=now_s), now_s, config, cause)
    if resumed is not None:
        return resumed
    state, commands = begin_hold(state, survivors, reason, now_s, config)
    return state, commands, reason


def _resume(state: State, now_s: float, config: ElasticConfig, cause: str = causes.PAUSE) -> RuleResult | None:
    """End a pause once survivors and newcomers together are enough."""
    if state.view is None or state.phase != WAITING or state.failing or state.paused:
        return None
    workers = (*state.view_workers, *_joiners(state, now_s))
    leaving = [w for w in workers if leaves_soon(state.records[w], now_s)]
    workers = workers[: max(max_workers(state, config), len(state.view_workers)) + len(leaving)]
    staying = [w for w in workers if w not in leaving]
    if _lacking(state, staying, now_s, config) or waits_for_absent(state, workers, now_s, config):
        return None
    return _publish(state, _members(state, workers, config), False, "enough workers again", now_s, cause)


def _reform(state: State, now_s: float, config: ElasticConfig) -> RuleResult | None:
    """Re-form a view that does not work although all its members live.

    Causes: a collective failed and every member has answered the probe; a restarted coordinator has adopted a view that
    is not entered; no member makes progress.
    """
    if state.view is None or state.phase != RUNNING or newer_view_may_exist(state, now_s):
        return None
    records = [state.records[w] for w in state.view_workers]
    reason, cause = "", causes.COLLECTIVE
    if state.suspected_s is not None:
        grace_s = min(REFORM_GRACE_S * 2.0**state.reforms, 10.0)
        answered = all(record.last_heard_s > state.suspected_s for record in records)
        reason = "a collective failed, all members live" if answered and now_s - state.suspected_s >= grace_s else ""
    elif state.adopted_s is not None and not state.all_entered and not any(record.missing for record in records):
        if now_s - state.adopted_s > ADOPTED_GRACE_S:
            reason, cause = "the coordinator was lost while a view was entered", causes.COORDINATOR
    elif all(now_s - record.last_progress_s > config.hang_timeout_s for record in records):
        reason, cause = f"nobody progressed for {config.hang_timeout_s:g} s", causes.HANG
    if not reason:
        return None
    state, commands, answered = check_members(state, now_s)
    if not answered:
        return state, commands, ""
    left_out, why = cut_off(state), "some members do not reach it"
    if left_out and not _may_go_without(state, left_out, now_s, config):
        if state.links is not None and now_s - state.links.since_s <= config.hang_timeout_s:
            return (*wait_for_links(state, now_s), reason)
        left_out = ()
    if not left_out:
        left_out, why = _left_out(state, now_s, config), "no view forms with it"
    reason += f"; {describe(state)}" if state.links is not None and state.links.broken else ""
    for worker in left_out:
        state, line = set_aside(state, worker, why, now_s)
        commands.append(line)
    staying = [w for w in state.view_workers if w not in left_out]
    reason += f", without {', '.join(left_out)}" if left_out else ""
    state = replace(state, reforms=0 if left_out else state.reforms + 1)
    members = _members(state, staying, config)
    state, published, _ = _publish(
        state, members, False, reason, now_s, cause, keep_progress=cause != causes.HANG, also=left_out
    )
    return state, commands + published, reason


def _may_go_without(state: State, left_out: Sequence[str], now_s: float, config: ElasticConfig) -> bool:
    """Whether the others can go on without these, and surely hold all state. After a long time they go on anyway."""
    staying = [w for w in state.view_workers if w not in left_out]
    if _lacking(state, staying, now_s, config):
        return False
    assert state.links is not None
    return others_hold_all(state, left_out, config) or now_s - state.links.since_s > config.hang_timeout_s


def _left_out(state: State, now_s: float, config: ElasticConfig) -> tuple[str, ...]:
    """Members to leave out of the next view, because the newest one does not form with them.

    After `REFORMS_WITH_NEWCOMERS` failures in a row, all newcomers are left out: the run falls back to the members of
    the last view that worked.
    """
    newcomers = tuple(w for w in state.view_workers if w not in state.worked)
    staying = [w for w in state.view_workers if w in state.worked]
    if state.reforms < REFORMS_WITH_NEWCOMERS or not staying or _lacking(state, staying, now_s, config):
        return ()
    return newcomers


def _retreat(state: State, now_s: float, config: ElasticConfig) -> RuleResult | None:
    """Hold before the deadline of members without which the run cannot go on, so that they save its state."""
    if state.view is None or state.phase != RUNNING or state.stopping:
        return None
    staying = [w for w in state.view_workers if not leaves_soon(state.records[w], now_s)]
    leaving = [w for w in state.view_workers if leaves_soon(state.records[w], now_s)]
    lacking = _lacking(state, staying, now_s, config, leaving) if leaving else ""
    if not lacking:
        return None
    reason = f"{', '.join(leaving)} must end soon; {len(staying)} stay, waiting for {lacking}"
    state, commands = begin_hold(state, state.view_workers, reason, now_s, config)
    return state, commands, reason


def _plan(state: State, now_s: float, config: ElasticConfig) -> RuleResult | None:
    """Publish the next planned view: without members that have handed over, with draining ones, and with newcomers."""
    if state.view is None or state.phase != RUNNING or not state.all_entered or state.suspected_s is not None:
        return None
    if state.stopping:
        return None
    handed_over = [m.worker for m in state.view.members if m.draining]
    staying = [w for w in state.view_workers if w not in handed_over]
    joiners = _joiners(state, now_s)
    oldest_s = min((s for w in joiners if (s := state.records[w].ready_s) is not None), default=now_s)
    leaving = [w for w in staying if state.records[w].drain_s is not None]
    if not leaving and now_s - oldest_s < config.join_settle_s:
        joiners = []
    joiners = joiners[: max(0, max_workers(state, config) - len(staying) + len(leaving))]
    members = _members(state, [*staying, *joiners], config)
    active = [m.worker for m in members if not m.draining]
    handing_over = [m.worker for m in members if m.draining]
    if tuple(members) == state.view.members or _lacking(state, active, now_s, config, handing_over):
        return None
    reasons = {
        causes.JOIN: bool(joiners),
        causes.DRAIN: any(m.draining for m in members),
        causes.RELEASE: bool(handed_over),
    }
    present = [cause for cause, holds in reasons.items() if holds]
    reason = ", ".join(present)
    state, commands, _ = _publish(state, members, True, reason, now_s, causes.gravest(present))
    for worker in handed_over:
        member = state.records[worker].member
        commands += [LogEvent("worker_released", worker, member.node, member.pid, reason), Release(worker)]
        state = state.with_record(worker, released=True)
    return state, commands, reason


def _publish(
    state: State,
    members: Sequence[Member],
    planned: bool,
    reason: str,
    now_s: float,
    cause: str,
    keep_progress: bool = False,
    also: Sequence[str] = (),
) -> RuleResult:
    """The state with a new view of these members, and the command to send it.

    Args:
        state: the state before.
        members: the new view's members, in rank order.
        planned: the view may wait for a step boundary.
        reason: cause of the view, as a sentence.
        now_s: monotonic seconds.
        cause: the same as one of `causes.CAUSES`.
        keep_progress: the view does not count as progress of its members, so a hung one is found without delay.
        also: workers outside the view whose collectives it ends.
    """
    view = View(state.generation + 1, tuple(members))
    records = dict(state.records)
    for member in members:
        if not keep_progress:
            records[member.worker] = replace(records[member.worker], last_progress_s=now_s)
    recipients = [*(m.worker for m in members), *also]
    if not planned:  # a released worker that waits in a collective of an older view must be interrupted too
        recipients += [w for w, record in records.items() if record.released]
    state = replace(
        state,
        phase=RUNNING,
        reason=reason,
        records=records,
        view=view,
        open_views=(*state.open_views, view),
        generation=view.generation,
        entered=frozenset(),
        adopted_s=None,
        suspected_s=None,
        links=None,
        waiting_s=None,
        saving=frozenset(),
        hold_save=None,
    )
    return state, [Publish(view, planned, reason, tuple(recipients), cause)], reason


def _members(state: State, workers: Sequence[str], config: ElasticConfig) -> list[Member]:
    """Members in the given order. Those with a deadline drain, the earliest first, while enough others stay active."""
    urgent = sorted(
        (w for w in workers if state.records[w].drain_s is not None), key=lambda w: state.records[w].drain_s or 0.0
    )
    spare = max(0, len(workers) - min_workers(config))
    draining = set(urgent[:spare])
    members = (state.records[w].member for w in workers)
    return [m if m.draining == (m.worker in draining) else replace(m, draining=not m.draining) for m in members]


def _joiners(state: State, now_s: float) -> list[str]:
    """Candidates whose links are proven."""
    return linked(state, _candidates(state, now_s))


def _candidates(state: State, now_s: float) -> list[str]:
    """Workers that are ready and wait outside the view, in order of arrival, less those that have to stay there."""
    members = {m.worker for m in state.view.members} if state.view else set[str]()
    return [
        w
        for w, record in state.records.items()
        if record.ready_s is not None
        and not record.released
        and record.drain_s is None
        and record.aside_until_s <= now_s
        and w not in members
        and not _in_backoff(state, record.member.node, now_s)
    ]


def _in_backoff(state: State, node: str, now_s: float) -> bool:
    return node in state.backoff and now_s < state.backoff[node].until_s


def _lacking(
    state: State, workers: Sequence[str], now_s: float, config: ElasticConfig, handing_over: Sequence[str] = ()
) -> str:
    """The condition that keeps these workers, with those that hand over, from going on as a view; "" if they can."""
    if len(workers) < min_workers(config):
        return f"elastic.min_workers={config.min_workers}"
    slots = [state.records[w].member.slots for w in workers]
    if all(slots) and sum(slots) < state.slots_needed:
        return f"workers with {state.slots_needed} expert slots together: these have {sum(slots)}"
    if not no_other_group_commits(state, (*workers, *handing_over), now_s, config):
        return f"the lease of workers that may still commit to run out (elastic.lease_s={config.lease_s:g})"
    return ""


def min_workers(config: ElasticConfig) -> int:
    """Smallest number of active members with which the run goes on."""
    return max(1, config.min_workers)


def max_workers(state: State, config: ElasticConfig) -> int:
    """Largest number of members that a view may have."""
    return max(state.limit or config.max_workers or state.target, min_workers(config))
