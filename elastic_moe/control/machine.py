"""The membership state machine: `transition(state, event, now_s, config) -> (state, commands, reason)`.

Every event is first *observed*: it changes the state. Then the rules are applied to the state (`rules.apply_rules`).
A death is therefore answered in the call that reports it, and no rule depends on the event that revealed its condition.
The machine is pure: time is an argument. `_stale` alone drops messages about a generation that is not the newest.
"""

from __future__ import annotations

from collections.abc import Sequence

from elastic_moe.config.schema import ElasticConfig
from elastic_moe.control.adoption import ADOPTION_GAP, adopt, is_adoptable
from elastic_moe.control.doubt import note_death, open_views
from elastic_moe.control.events import (
    Checkpoint,
    Closed,
    Command,
    Drain,
    Entered,
    Event,
    Evict,
    Fail,
    Finished,
    Heartbeat,
    Held,
    Hello,
    Left,
    Links,
    LogEvent,
    Lost,
    NodeLost,
    Pause,
    Probe,
    Publish,
    Ready,
    Release,
    Save,
    Scale,
    SetPaused,
    Stop,
    StopAll,
    Suspect,
    Tick,
    Welcome,
)
from elastic_moe.control.frozen import replace
from elastic_moe.control.heartbeats import STALL_S, awaited, one_of_many, take_heartbeats
from elastic_moe.control.holds import end_soon, hold_s, take_held
from elastic_moe.control.links import ask_witnesses, take_links
from elastic_moe.control.operator import Wish, take_wish
from elastic_moe.control.rules import apply_rules
from elastic_moe.control.state import FINISHING, RUNNING, WAITING, State, WorkerRecord
from elastic_moe.types import Member

Observed = tuple[State, list[Command]]


def initial_state(target: int, fence_s: float = 0.0, slots_needed: int = 0) -> State:
    """A run that no worker has joined yet.

    Args:
        target: number of workers to start with.
        fence_s: until then, no view may start from storage; for a coordinator that was restarted.
        slots_needed: expert slots per MoE layer that the members must have together, where their number is limited.
    """
    return State(target=max(1, target), fence_s=fence_s, slots_needed=slots_needed)


def transition(
    state: State, event: Event, now_s: float, config: ElasticConfig
) -> tuple[State, tuple[Command, ...], str]:
    """Take in one event and decide.

    Args:
        state: the state before the event.
        event: the event.
        now_s: monotonic seconds.
        config: limits and timeouts.

    Returns:
        The new state, the commands to carry out in order, and their reason ("" when nothing was decided).
    """
    state = _forgive_stall(state, now_s)
    if isinstance(event, Heartbeat) and event.worker in state.records and not awaited(state, event.worker):
        return take_heartbeats(state, {event.worker: (event, now_s)}), (), ""  # the tick sees to the rest
    if not isinstance(event, Hello | Closed | Lost | NodeLost | Drain | Stop | Fail | Wish | Tick):
        if event.worker not in state.records:
            return state, (), f"{type(event).__name__} of unknown worker {event.worker}"
        state = state.with_record(event.worker, last_heard_s=now_s, missing=False)
        if _stale(state, event):
            return state, (), f"stale {type(event).__name__} of {event.worker}"
    before = state
    state, commands = _observe(state, event, now_s, config)
    if one_of_many(before, state, event):
        return state, tuple(commands), ""
    state, decided, reason = apply_rules(state, now_s, config)
    return state, (*commands, *decided), reason


def _forgive_stall(state: State, now_s: float) -> State:
    """If the coordinator itself was stopped for a while, no worker's silence in that time counts."""
    gap_s = 0.0 if state.ticked_s is None else now_s - state.ticked_s
    state = replace(state, ticked_s=now_s)
    if gap_s <= STALL_S:
        return state
    records = {
        w: replace(
            s,
            last_heard_s=s.last_heard_s + gap_s,
            last_progress_s=s.last_progress_s + gap_s,
            closed_s=None if s.closed_s is None else s.closed_s + gap_s,
        )
        for w, s in state.records.items()
    }
    return replace(state, records=records)


def _stale(state: State, event: Event) -> bool:
    """Whether the event speaks of a generation that is not the newest."""
    if isinstance(event, Suspect | Entered):
        return state.view is None or event.generation != state.view.generation
    return False


def _observe(state: State, event: Event, now_s: float, config: ElasticConfig) -> Observed:
    """The state with the event in it, and the commands that answer the event itself."""
    match event:
        case Hello():
            return _hello(state, event, now_s, config)
        case Ready(worker):
            if state.records[worker].ready_s is not None:
                return state, []
            return state.with_record(worker, ready_s=now_s), [_log_event(state, "worker_ready", worker)]
        case Heartbeat():
            return take_heartbeats(state, {event.worker: (event, now_s)}), []
        case Suspect(worker, _, error):
            line = _log_event(state, "suspect", worker, error)
            if state.suspected_s is not None:
                return state, [line]
            return replace(state, suspected_s=now_s, links=None), [line, Probe(state.view_workers)]
        case Links():
            return take_links(state, event, now_s, config)
        case Entered(worker, _):
            joined = state.records[worker].joined_step
            joined = state.step if joined is None else joined
            state = state.with_record(worker, last_progress_s=now_s, entered=event.generation, joined_step=joined)
            return _with_entered(state, worker), []
        case Held():
            return take_held(state, event, now_s)
        case Finished(worker):
            state = state.with_record(worker, finished=True)
            if state.phase == RUNNING:
                state = replace(state, phase=FINISHING, finishing_s=now_s)
            return state, [_log_event(state, "worker_finished", worker)]
        case Left(worker):
            return state.without(worker), [_log_event(state, "worker_left", worker)]
        case Closed(worker):
            return _closed(state, worker, now_s)
        case Lost(worker, reason):
            return _lost(state, [worker], reason, now_s)
        case NodeLost(node, reason):
            state = replace(state, draining_nodes={n: t for n, t in state.draining_nodes.items() if n != node})
            return _lost(state, [w for w, s in state.records.items() if s.member.node == node], reason, now_s)
        case Drain():
            return _drain(state, event, now_s, config)
        case Stop(reason):
            if state.stopping or state.over:
                return state, []
            state = end_soon(replace(state, stopping=True, reason=reason), now_s, config)
            return state, [LogEvent("stop", reason=reason), StopAll(state.view_workers)]
        case Fail(reason):
            if state.failing or state.over:
                return state, []
            return end_soon(replace(state, failing=reason), now_s, config), []
        case Checkpoint() | Scale() | SetPaused():
            return take_wish(state, event, now_s, config)
        case Tick():
            nodes = {n: until_s for n, until_s in state.draining_nodes.items() if now_s < until_s}
            return replace(state, draining_nodes=nodes, open_views=open_views(state, now_s, config)), []


def _hello(state: State, event: Hello, now_s: float, config: ElasticConfig) -> Observed:
    """Register a worker, unless it is to be turned away, and tell it the newest state of its view.

    A worker of an older view is taken in with its state: it leaves that view, and joins the next one.
    """
    worker = event.worker
    if worker in state.removed:
        return state, [Evict(worker, "no longer a member")]
    if state.over:
        return state, [Release(worker)]
    commands: list[Command] = []
    known = worker in state.records and not state.records[worker].missing and worker not in state.lapsed
    lapsed = event.lapsed and not known  # of a known one, this coordinator knows what became of its view
    if event.view is not None and is_adoptable(state, event):
        left = () if state.view is None else tuple(w for w in state.view_workers if event.view.rank_of(w) is None)
        if left and state.view is not None:
            commands.append(Pause(state.view.generation, left, "the run went on without them; they join again"))
        state = adopt(state, event, now_s, config)
        commands.append(LogEvent("adopted", reason=f"generation {state.generation - ADOPTION_GAP} of {worker}"))
    returns = False
    if worker not in state.records:
        until_s = state.draining_nodes.get(event.node)
        if until_s is not None:
            return state, [*commands, Release(worker)]
        member = Member(worker, event.node, event.pid, slots=event.slots, address=event.address)
        away = state.absent.get(worker)
        returns = away is not None
        record = WorkerRecord(
            member,
            now_s if event.ready else None,
            now_s,
            last_progress_s=now_s,
            incarnation=away.incarnation + 1 if away is not None else 0,
        )
        absent = {w: a for w, a in state.absent.items() if w != worker}
        state = replace(state, records={**state.records, worker: record}, absent=absent)
    record = state.records[worker]
    member, entered = replace(record.member, address=event.address), max(event.entered, record.entered)
    state = state.with_record(
        worker, member=member, entered=entered, on_spot=event.on_spot, last_heard_s=now_s, missing=False, closed_s=None
    )
    state = replace(state, step=max(state.step, event.step), unheard=state.unheard - {worker})
    commands += [Welcome(worker), _log_event(state, "worker_readmitted" if returns else "worker_connected", worker)]
    view = state.view
    if lapsed:
        state = replace(state, lapsed=state.lapsed | {worker})
    if event.view is not None and (lapsed or not state.in_view(worker)):
        generation = event.view.generation
        state = replace(state, generation=max(state.generation, generation))
        commands.append(Pause(generation, (worker,), "the run went on without it; it joins again with its state"))
    if view is not None and view.rank_of(worker) is not None:
        if event.entered == view.generation and not lapsed:
            state = _with_entered(state, worker)
        if event.view is None or event.view.generation < view.generation:
            commands.append(Publish(view, False, "re-registered", (worker,)))
        if state.phase == WAITING:
            commands.append(Pause(view.generation, (worker,), state.reason))
        if state.stopping:
            commands.append(StopAll((worker,)))
    return state, commands


def _with_entered(state: State, worker: str) -> State:
    """The state after a member has entered the newest view."""
    state = replace(state, entered=state.entered | {worker})
    assert state.view is not None
    if not state.all_entered:
        return state
    workers = frozenset(m.worker for m in state.view.members)
    still_open = tuple(v for v in state.open_views if workers.isdisjoint(m.worker for m in v.members))
    return replace(state, worked=workers, open_views=(*still_open, state.view))


def _closed(state: State, worker: str, now_s: float) -> Observed:
    """Note that a connection has closed. A member may come back; another worker registers anew."""
    record = state.records.get(worker)
    if record is None:
        return state, []
    if record.released or record.finished or state.over:
        return state.without(worker), [_log_event(state, "worker_left", worker, "connection closed")]
    line = _log_event(state, "worker_disconnected", worker, "connection closed")
    if not state.in_view(worker):
        return state.unproven(worker, now_s), [line]
    state, commands = ask_witnesses(state.with_record(worker, closed_s=now_s), worker)
    return state, [line, *commands]


def _lost(state: State, workers: Sequence[str], reason: str, now_s: float) -> Observed:
    """The state without these workers. A worker that had finished or was released has left as planned."""
    commands: list[Command] = []
    for worker in workers:
        record = state.records.get(worker)
        if record is None:
            state = state.without(worker)
            continue
        planned = record.released or record.finished or state.over
        commands.append(_log_event(state, "worker_left" if planned else "worker_lost", worker, reason))
        if not planned:
            commands.append(Evict(worker, reason))
            state, told = note_death(state, worker, now_s)
            commands += told
        state = state.without(worker)
    return state, commands


def _drain(state: State, event: Drain, now_s: float, config: ElasticConfig) -> Observed:
    """Give members a deadline and release other workers; a draining node takes no new worker for a while."""
    until_s = now_s + (event.deadline_s or config.drain_deadline_s)
    if event.node:
        state = replace(state, draining_nodes={**state.draining_nodes, event.node: until_s + config.drain_deadline_s})
    commands: list[Command] = []
    saves: list[Command] = []  # before anybody goes
    for worker, record in state.records.items():
        if worker != event.worker and (not event.node or record.member.node != event.node):
            continue
        commands.append(_log_event(state, "drain", worker, event.reason))
        if state.in_view(worker):
            sooner_s = until_s if record.drain_s is None else min(record.drain_s, until_s)
            state = state.with_record(worker, drain_s=sooner_s, hold_s=hold_s(sooner_s, now_s))
            saves = [Save(state.view_workers, state.step)]
        else:
            commands.append(Release(worker))
            state = state.with_record(worker, released=True)
    return state, commands + saves


def _log_event(state: State, event: str, worker: str, reason: str = "") -> LogEvent:
    """A line of the event log about a living worker."""
    member = state.records[worker].member
    return LogEvent(event, worker, member.node, member.pid, reason)
