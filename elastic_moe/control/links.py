"""Links between workers: who reaches whom, who is asked, and who is left out. Pure.

A link is *proven* when one of two workers has connected to the other, which has connected back (`runtime/links.py`). A
worker joins a view once its links to all members, and to all that join with it, are proven. When a view does not work
although its members live, they try one another. The coordinator then leaves out few members with which the rest is
connected, instead of guessing. A worker whose connection has closed and whose port refuses connections is dead.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from itertools import takewhile

from elastic_moe.config.schema import ElasticConfig
from elastic_moe.control.events import CheckLinks, Command, Links, LogEvent
from elastic_moe.control.frozen import replace
from elastic_moe.control.state import RUNNING, LinkCheck, State

ASIDE_S = 10.0  # a worker with which no view forms stays outside for so long, and twice as long each further time
MAX_ASIDE_S = 300.0
ANSWER_S = 15.0  # for the answers to a check; a worker bounds its own part more narrowly
AGAIN_S = 2.0  # between two checks of the same links
STALL_FRACTION = 1 / 8  # of elastic.hang_timeout_s: after a standstill of a member so long, all try one another
WITNESSES = 2  # members that try the port of one whose connection has closed

Pair = tuple[str, str]


def cover(pairs: Collection[Pair], newcomers: Collection[str], order: Sequence[str]) -> tuple[str, ...]:
    """The workers to leave out so that no broken link is left: a vertex cover, chosen greedily.

    Each round takes the worker with the most broken links; among equals a newcomer, then the one that most reports
    name, then the last in `order`. At the end, those that turned out not to be needed stay after all.

    Args:
        pairs: (worker that reports, worker that it does not reach).
        newcomers: workers that were in no view that worked.
        order: all workers.
    """
    reports = Counter([there for _, there in pairs])
    links = {frozenset(pair) for pair in pairs}
    place = {worker: index for index, worker in enumerate(order)}
    broken: set[frozenset[str]] = links
    chosen: list[str] = []
    while broken:
        degree = Counter([worker for pair in broken for worker in pair])
        worst = max(degree, key=lambda w: (degree[w], w in newcomers, reports[w], place.get(w, -1)))
        chosen.append(worst)
        broken = {pair for pair in broken if worst not in pair}
    for worker in list(chosen):
        if all(pair - {worker} <= set(chosen) for pair in links if worker in pair):
            chosen.remove(worker)
    return tuple(chosen)


def set_aside(state: State, worker: str, why: str, now_s: float) -> tuple[State, LogEvent]:
    """The state in which a worker stays outside of views for a while, and the line about it."""
    record = state.records[worker]
    pause_s = min(MAX_ASIDE_S, ASIDE_S * 2.0**record.aside)
    line = f"{why}; it stays outside for {pause_s:g} s"
    state = state.with_record(worker, aside_until_s=now_s + pause_s, aside=record.aside + 1, reached=frozenset())
    return state, LogEvent("worker_set_aside", worker, record.member.node, record.member.pid, line)


# --- newcomers --------------------------------------------------------------------------------------------------------


def linked(state: State, joiners: Sequence[str]) -> list[str]:
    """Those of the joiners whose links to all members, and to one another, are proven."""
    members, accepted = _reachable(state, state.view_workers), set[str]()
    found: list[str] = []
    for worker in joiners:
        if not state.records[worker].member.address[1]:
            found.append(worker)  # it tells no address: it is taken at its word
        elif not _unproven(state, worker, members, accepted):
            found.append(worker)
            accepted.add(worker)
    return found


def ask_joiners(state: State, joiners: Sequence[str], now_s: float) -> tuple[State, list[Command]]:
    """Let joiners try their links that are not proven."""
    commands: list[Command] = []
    if not joiners:
        return state, commands
    members, others = _reachable(state, state.view_workers), _reachable(state, joiners)
    for worker in joiners:
        record = state.records[worker]
        if not record.member.address[1] or now_s < record.ask_again_s:
            continue
        if missing := _unproven(state, worker, members, others - {worker}):
            state, command = _ask(state, (worker,), sorted(missing))
            state = state.with_record(worker, ask_again_s=now_s + ANSWER_S)
            commands.append(command)
    return state, commands


def _reachable(state: State, workers: Iterable[str]) -> frozenset[str]:
    """Workers that have told an address."""
    return frozenset(w for w in workers if state.records[w].member.address[1])


def _unproven(state: State, worker: str, members: frozenset[str], joiners: Collection[str]) -> list[str]:
    """Members to which the worker has proven no link, and other joiners where neither of the two has."""
    reached = state.records[worker].reached
    others = [w for w in joiners if w not in reached and worker not in state.records[w].reached]
    return [*(members - reached), *others]


def _ask(state: State, workers: Sequence[str], peers: Sequence[str]) -> tuple[State, CheckLinks]:
    state = replace(state, checks=state.checks + 1)
    return state, CheckLinks(tuple(workers), state.checks, tuple(state.records[w].member for w in peers))


def take_links(state: State, event: Links, now_s: float, config: ElasticConfig) -> tuple[State, list[Command]]:
    """Take a worker's report about its links in. Of two newcomers without a link, the later one has to wait."""
    known = [w for w in (*event.silent, *event.refused) if w in state.records]
    before = set(takewhile(lambda w: w != event.worker, state.records)) | set(state.view_workers)
    blamed = [w for w in known if w in before and _lives(state, w, w in event.refused, now_s, config)]
    for worker in event.refused:
        state = state.with_record(worker, refused_s=now_s)
    record = state.records[event.worker]
    check = state.links
    if check is not None and event.check == check.number:
        pairs = frozenset((event.worker, w) for w in known)
        check = replace(check, answered=check.answered | {event.worker}, broken=check.broken | pairs)
        return replace(state, links=check), []
    if state.in_view(event.worker):
        return state, []
    reached = (record.reached | set(event.reached)) - set(known)
    state = state.with_record(event.worker, reached=reached, ask_again_s=now_s + (AGAIN_S if known else 0.0))
    if not blamed:
        return state, []
    state, line = set_aside(state, event.worker, f"it cannot reach {_names(state, blamed)}", now_s)
    return state, [line]


def _lives(state: State, worker: str, refused: bool, now_s: float, config: ElasticConfig) -> bool:
    """Whether a worker that was not reached surely lives, so that the link is to blame and not the worker."""
    record = state.records[worker]
    if record.closed_s is not None or now_s - record.last_heard_s > max(1.0, 2 * config.heartbeat_s):
        return False
    return not refused or (record.refused_s is not None and record.refused_s < record.last_heard_s)


def _names(state: State, workers: Iterable[str]) -> str:
    return ", ".join(f"{w} ({state.records[w].member.node})" for w in workers)


# --- members ----------------------------------------------------------------------------------------------------------


def ask_witnesses(state: State, worker: str) -> tuple[State, list[Command]]:
    """Let some members try the port of one whose connection has closed."""
    others = [w for w in state.view_workers if w != worker and state.records[w].closed_s is None]
    others = [w for w in others if state.records[w].member.address[1]][:WITNESSES]
    if not others or not state.records[worker].member.address[1]:
        return state, []
    state, command = _ask(state, others, [worker])
    return state, [command]


def is_refused(state: State, worker: str) -> bool:
    """Whether a worker's port has refused connections since its own connection closed, so that its process is dead."""
    record = state.records[worker]
    return record.closed_s is not None and record.refused_s is not None and record.refused_s >= record.closed_s


def check_members(state: State, now_s: float) -> tuple[State, list[Command], bool]:
    """Let all members try one another, unless they do already. The last value: all have answered, or had the time."""
    members = sorted(_reachable(state, state.view_workers), key=state.view_workers.index)
    if len(members) < 2:
        return state, [], True
    check = state.links
    if check is None:
        state, command = _ask(state, members, members)
        return replace(state, links=LinkCheck(state.checks, now_s, now_s)), [command], False
    return state, [], check.answered >= set(members) or now_s - check.asked_s > ANSWER_S


def _check_again(state: State, now_s: float) -> tuple[State, list[Command]]:
    """A new check of all members, if the last one was some time ago."""
    if state.links is None or now_s - state.links.asked_s < AGAIN_S:
        return state, []
    since_s = state.links.since_s
    state, commands, _ = check_members(replace(state, links=None), now_s)
    if state.links is not None:
        state = replace(state, links=replace(state.links, since_s=since_s, told=True))
    return state, commands


def watch_members(state: State, now_s: float, config: ElasticConfig) -> tuple[State, list[Command]]:
    """Suspect a view in which a member stands still and links are broken: a cut link makes no collective fail."""
    if state.view is None or state.phase != RUNNING or state.suspected_s is not None:
        return state, []
    patience_s = config.hang_timeout_s * STALL_FRACTION
    if not any(now_s - state.records[w].last_progress_s > patience_s for w in state.view_workers):
        return state if state.links is None else replace(state, links=None), []
    if state.links is not None and now_s - state.links.asked_s > max(patience_s, ANSWER_S):
        state = replace(state, links=None)
    state, commands, answered = check_members(state, now_s)
    if answered and state.links is not None and state.links.broken:
        reason = "a member stands still, and links are broken"
        return replace(state, suspected_s=now_s), [*commands, LogEvent("suspect", reason=reason)]
    return state, commands


def cut_off(state: State) -> tuple[str, ...]:
    """Members to leave out so that the rest is connected, after the last check of links."""
    if state.links is None or not state.links.broken:
        return ()
    members = state.view_workers
    pairs = [pair for pair in state.links.broken if set(pair) <= set(members)]
    return cover(pairs, set(members) - state.worked, members)


def wait_for_links(state: State, now_s: float) -> tuple[State, list[Command]]:
    """Wait for broken links, and try them again and again."""
    assert state.links is not None
    reason = f"{describe(state)}, and the others cannot go on without them: waiting for the links"
    told: list[Command] = [] if state.links.told else [LogEvent("members_in_doubt", reason=reason)]
    state = replace(state, links=replace(state.links, told=True))
    state, commands = _check_again(state, now_s)
    return state, told + commands


def describe(state: State, limit: int = 4) -> str:
    """The broken links of the last check, as words."""
    broken = sorted(state.links.broken) if state.links is not None else []
    words = [f"{a} does not reach {b}" for a, b in broken[:limit]]
    return ", ".join([*words, f"and {len(broken) - limit} more"] if len(broken) > limit else words)
