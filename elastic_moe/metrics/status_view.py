"""A run as a few lines of text: progress, members by node, what is missing, the last events."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import median
from typing import Any

from elastic_moe.metrics.format_event import format_event, format_loss
from elastic_moe.plan.batch_sizes import RunLength

EVENTS = 8  # shown
RATE_STEPS = 50  # the time left is estimated from so many of the last steps


def render(
    records: Sequence[Mapping[str, Any]],
    events: Sequence[dict[str, Any]],
    length: RunLength,
    live: Mapping[str, Any] | None,
    hosts: Mapping[str, tuple[str, str]],
    pending: int,
    now_s: float,
    goodput: Sequence[str] = (),
) -> str:
    """The view.

    Args:
        records: lines of metrics.jsonl.
        events: lines of events.jsonl.
        length: of the run.
        live: the coordinator's status; None if the run does not go on.
        hosts: host name and address of the nodes, by id.
        pending: workers for which Ray has no room.
        now_s: wall-clock seconds.
        goodput: lines about the workers' time.
    """
    last = records[-1] if records else {}
    step = int(last.get("step", 0))
    lines = [
        f"state       {_state(live, events)}",
        f"step        {step:,} of {length.steps:,}{_left(records, length, live)}",
    ]
    if last:
        pace = f", {last['tokens_per_s']:,.0f} tokens/s" if last.get("tokens_per_s") else ""
        lines.append(f"loss        {format_loss(last.get('loss'))}{pace}, {duration(now_s - last['time'])} ago")
    saved = next((event for event in reversed(events) if event["event"] == "checkpoint"), None)
    if saved:
        behind = step - saved["step"]
        lines.append(
            f"checkpoint  step {saved['step']:,}, {behind or 'no'} steps behind, {duration(now_s - saved['time'])} ago"
        )
    lines += [f"{'goodput' if index == 0 else '':12}{line}" for index, line in enumerate(goodput)]
    if live is not None:
        lines += _members(live, hosts, _stragglers(events))
        if pending:
            lines.append(f"pending     {pending} workers: Ray has no room for them yet")
    told = [(event, line) for event in events if (line := format_event(event))]
    if told:
        lines.append("events")
        lines += [f"  {time.strftime('%H:%M:%S', time.localtime(e['time']))}  {line}" for e, line in told[-EVENTS:]]
    return "\n".join(lines)


def _state(live: Mapping[str, Any] | None, events: Sequence[Mapping[str, Any]]) -> str:
    if live is None:
        last = next((e for e in reversed(events) if e["event"] in ("finished", "failed")), None)
        return f"{last['event']}: {last.get('reason', '')}" if last else "does not go on; its end was not recorded"
    limit = f", at most {live['limit']} workers" if live["limit"] else ""
    phase = "paused" if live["paused"] else live["phase"]
    why = f": {live['reason']}" if live["phase"] != "running" else ""
    return f"{phase}{why}, generation {live['generation']}, {live['world_size']} workers{limit}"


def _left(records: Sequence[Mapping[str, Any]], length: RunLength, live: Mapping[str, Any] | None) -> str:
    """The time left, from the pace of the last steps; a pause among them is no pace."""
    recent = records[-RATE_STEPS:]
    if live is None or live["phase"] != "running" or len(recent) < 2:
        return ""
    took_s = median(after["time"] - before["time"] for before, after in pairwise(recent))
    return f", {duration(took_s * length.left(int(recent[-1]['step'])))} left"


def _stragglers(events: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Worker -> what it loses, for those that were stragglers last."""
    found: dict[str, str] = {}
    for event in events:
        if event["event"] == "straggler":
            found[event["workers"][0]] = f" (straggler: {event['factor']:.1f} times as long, {event['phase']})"
        elif event["event"] == "straggler_recovered":
            found.pop(event["workers"][0], None)
    return found


def _members(live: Mapping[str, Any], hosts: Mapping[str, tuple[str, str]], stragglers: Mapping[str, str]) -> list[str]:
    by_node: dict[str, list[str]] = {}
    for rank, (worker, node, pid, draining) in enumerate(live["members"]):
        mark = " (leaves)" if draining else stragglers.get(worker, "")
        by_node.setdefault(node, []).append(f"{rank}: {worker[:8]}, process {pid}{mark}")
    lines = ["members"] if by_node else []
    for node, members in by_node.items():
        host = " ".join(hosts.get(node, ()))
        lines += [f"  node {node[:8]} {host}".rstrip(), *(f"    {member}" for member in members)]
    return lines


def duration(seconds: float) -> str:
    """A duration in its two largest units."""
    whole = max(0, round(seconds))
    for size, name, smaller, small in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // smaller
            return f"{whole // size} {name}" + (f" {rest} {small}" if rest else "")
    return f"{whole} s"
