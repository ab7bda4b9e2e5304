"""Members in doubt: dead, silent, cut off, or slow. Pure.

Only proof makes a member dead at once: its process or its node was reported gone. A closed connection and silence are
no proof. A member in doubt is removed after a patience; at once if its connection has closed and a collective failed
too. The patience is short where nothing can be lost, because others hold copies of all its units. Where its state may
be the last, or where so many fall silent that rather the coordinator is cut off, the run waits for longer and says so.

A member that was removed without proof becomes *absent*. If its process lives, it registers again and is taken in with
its state (`machine._hello`). Until its lease has run out, its old view might still commit, so no view is published
that has no member in common with it.
"""

from __future__ import annotations

from collections.abc import Sequence

from elastic_moe.config.schema import ElasticConfig
from elastic_moe.control.events import Command, Disconnect, Evict, LogEvent
from elastic_moe.control.frozen import replace
from elastic_moe.control.links import is_refused
from elastic_moe.control.state import FINISHING, RUNNING, Backoff, State, WorkerRecord
from elastic_moe.types import View

CLOSED_GRACE_S = 1.0  # a living worker whose connection was cut has registered again within this
CLOCK_DRIFT = 1.02  # a worker's clock may be slower than the coordinator's by this factor
FIRST_STEPS = 2  # a member that dies within so many steps of its first counts as one that never worked
PATIENT_FAILURES = 2  # deaths of such members in a row that a node may have without a pause
FIRST_BACKOFF_S, MAX_BACKOFF_S = 5.0, 300.0  # the pause doubles with every further death
MEMORY_S = 600.0  # a node's deaths are forgotten so long after its pause


def remove_in_doubt(state: State, now_s: float, config: ElasticConfig) -> tuple[State, list[Command]]:
    """Remove members and other workers whose patience is over, and tell of those that are waited for."""
    in_doubt = [w for w in state.view_workers if _is_in_doubt(state, w, now_s, config)]
    last = bool(in_doubt) and not others_hold_all(state, in_doubt, config)
    if state.in_doubt and not last:  # some of those that were waited for are back: the others get a patience anew
        records = dict(state.records)
        for worker in state.in_doubt.intersection(in_doubt):
            closed_s = None if records[worker].closed_s is None else now_s
            records[worker] = replace(records[worker], last_heard_s=now_s, closed_s=closed_s)
        state = replace(state, records=records)
    commands: list[Command] = []
    patient_ones = frozenset(in_doubt) if last else frozenset[str]()
    for worker, record in list(state.records.items()):
        patient = worker in patient_ones
        if record.closed_s is not None:
            patience_s = config.heartbeat_timeout_s if patient else CLOSED_GRACE_S
            silent_s, reason = now_s - record.closed_s, "connection closed"
        else:
            patience_s = config.hang_timeout_s if patient else config.heartbeat_timeout_s
            silent_s, reason = now_s - record.last_heard_s, f"silent for {patience_s:g} s"
        at_once = record.closed_s is not None and (
            state.phase == FINISHING
            or is_refused(state, worker)
            or (state.suspected_s is not None and not last and state.in_view(worker))
        )  # its peers lost it too; the cheap questions come first, for this runs over all workers
        if silent_s > patience_s or at_once:
            member = record.member
            name = "worker_evicted" if record.closed_s is None else "worker_lost"
            commands += [LogEvent(name, worker, member.node, member.pid, reason), Disconnect(worker)]
            state = state.unproven(worker, now_s)
    waited_for = frozenset(w for w in patient_ones if w in state.records)
    if waited_for and not state.in_doubt:
        reason = f"no sign of {', '.join(sorted(waited_for))}, whose state may be the last: waiting for them"
        commands.append(LogEvent("members_in_doubt", reason=reason))
    return replace(state, in_doubt=waited_for), commands


def remove_hung(state: State, now_s: float, config: ElasticConfig) -> tuple[State, list[Command]]:
    """Evict hung members, and workers whose drain deadline has passed, for good."""
    reasons = {
        worker: "drain deadline passed"
        for worker, record in state.records.items()
        if record.drain_s is not None and now_s > record.drain_s and not record.released
    }
    for worker in _hung(state, now_s, config):
        reasons.setdefault(worker, f"no progress for {config.hang_timeout_s:g} s while others waited")
    commands: list[Command] = []
    for worker, reason in reasons.items():
        member = state.records[worker].member
        commands += [LogEvent("worker_evicted", worker, member.node, member.pid, reason), Evict(worker, reason)]
        state = state.unproven(worker, now_s)  # its lease counts until its death is reported
        state = replace(state, removed=state.removed | {worker})
    return state, commands


def no_other_group_commits(state: State, workers: Sequence[str], now_s: float, config: ElasticConfig) -> bool:
    """Whether no older view can commit once these workers are in a view of their own.

    A commit needs the vote of every member, so an older view is over once one of its members votes no more in it: one
    of these workers is among them and leaves it; one is proven to be dead, or has entered a later view; or the lease of
    one has run out.

    """
    if newer_view_may_exist(state, now_s):
        return False
    mine = set(workers)
    return not any(mine.isdisjoint(m.worker for m in view.members) for view in open_views(state, now_s, config))


def newer_view_may_exist(state: State, now_s: float) -> bool:
    """Whether a coordinator that was restarted may not know the newest view.

    Those that it has not heard of yet may form one, in which they commit until their leases have run out.
    """
    return now_s < state.fence_s and (state.view is None or bool(state.unheard) or bool(state.lapsed))


def open_views(state: State, now_s: float, config: ElasticConfig) -> tuple[View, ...]:
    """Those of the views of which a step may still be committed.

    A view that is over stays so: a worker whose lease had run out leaves its view before it is taken in again.
    """
    return tuple(
        view
        for view in state.open_views
        if not any(_is_over(state, view, m.worker, now_s, config) for m in view.members)
    )


def _is_over(state: State, view: View, worker: str, now_s: float, config: ElasticConfig) -> bool:
    """Whether a member of an older view can surely not vote in it any more."""
    if worker in state.records:
        return state.records[worker].entered > view.generation
    away = state.absent.get(worker)
    return away is None or now_s > away.last_heard_s + CLOCK_DRIFT * config.lease_s


def waits_for_absent(state: State, workers: Sequence[str], now_s: float, config: ElasticConfig) -> bool:
    """Whether a paused run should wait a little for absent workers, since the first of them are back.

    Without them some units might have no copy. They had the same reason to be silent, so they come back together.
    """
    returned_s = [s for w in workers if (s := state.records[w].ready_s) is not None and state.records[w].incarnation]
    if not returned_s or not any(away.bears_state for away in state.absent.values()):
        return False
    missing = sum(w not in workers for w in state.worked)
    return missing > config.redundancy and now_s - max(returned_s) < config.heartbeat_timeout_s


def note_death(state: State, worker: str, now_s: float) -> tuple[State, list[Command]]:
    """Remember on its node that a member died before it made a step. After some of these, later workers have to wait.

    A member that dies later than that shows that its node works, and clears the memory.
    """
    record = state.records[worker]
    node = record.member.node
    if not state.in_view(worker):
        return state, []
    if record.joined_step is not None and record.last_progress[1] > record.joined_step + FIRST_STEPS:
        return replace(state, backoff={n: b for n, b in state.backoff.items() if n != node}), []
    known = state.backoff.get(node)
    failures = 1 if known is None or now_s > known.until_s + MEMORY_S else known.failures + 1
    extra = failures - PATIENT_FAILURES
    pause_s = min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2.0 ** (extra - 1)) if extra > 0 else 0.0
    state = replace(state, backoff={**state.backoff, node: Backoff(failures, now_s + pause_s)})
    if not pause_s:
        return state, []
    reason = f"{failures} workers in a row died before they made a step: no worker of the node joins for {pause_s:g} s"
    return state, [LogEvent("node_backoff", worker, node, record.member.pid, reason)]


def _is_in_doubt(state: State, worker: str, now_s: float, config: ElasticConfig) -> bool:
    """Whether a member gives no sign. Several that fall silent together reach the time-out one after another."""
    record = state.records[worker]
    return record.closed_s is not None or now_s - record.last_heard_s > config.heartbeat_timeout_s / 2


def others_hold_all(state: State, in_doubt: Sequence[str], config: ElasticConfig) -> bool:
    """Whether every unit surely has a living copy on a member that is not in doubt.

    Each unit has `elastic.redundancy` mirrors, on other nodes than its owner where there are several. They are made
    anew when a view is entered, so members lost since the last view that worked count too.
    """
    holders = {w for w in in_doubt if state.records[w].bears_state}
    if not holders or state.phase == FINISHING:
        return True  # at the end, the last step is committed and saved by all
    sound = [w for w in state.view_workers if w not in holders and state.records[w].bears_state]
    if not sound or config.redundancy == 0:
        return False
    lost = sum(w not in state.records for w in state.worked)  # their copies may not have been made anew yet
    nodes = {state.records[w].member.node for w in holders}
    elsewhere = any(state.records[w].member.node not in nodes for w in sound)
    return len(holders) + lost <= config.redundancy or (lost == 0 and len(nodes) == 1 and elsewhere)


def _hung(state: State, now_s: float, config: ElasticConfig) -> list[str]:
    """Members whose main thread stands still at the least advanced point, while another member has come further."""
    workers = state.view_workers
    if state.phase != RUNNING or not workers:
        return []
    points = [_point(state.records[w]) for w in workers]
    least = min(points)
    if least == max(points):
        return []
    last = [state.records[w] for w, point in zip(workers, points, strict=True) if point == least]
    return [record.member.worker for record in last if now_s - record.last_progress_s > config.hang_timeout_s]


def _point(record: WorkerRecord) -> tuple[int, int, int]:
    """How far a member has come, comparable with the others. Until it has entered its view, its step may still fall."""
    generation, step, progress = record.last_progress
    return generation, step if record.entered >= generation else -1, progress
