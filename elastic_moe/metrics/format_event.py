"""The lines that a driver prints while a run goes on: one for each event that a person wants to know of."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_WARNINGS = (
    *("worker_lost", "worker_evicted", "worker_set_aside", "members_in_doubt", "node_backoff", "pause"),
    *("checkpoint_failed", "not_finite", "loss_spike", "state_repaired", "state_damaged", "worker_faulty"),
    *("sample_failed", "rolled_back", "storage_unavailable", "straggler"),
)


def format_event(event: dict[str, Any]) -> str | None:
    """One line about an event of events.jsonl, or None for an event of no interest."""
    step = f"step {event.get('step', 0)}"
    match event["event"]:
        case "worker_lost" | "worker_evicted":
            return f"{step}: lost the worker with process id {event.get('pid')}: {_short(event.get('reason', ''))}"
        case "entered" if event["generation"] > 1:
            lost = event.get("lost_steps", 0)
            return (
                f"{step}: {event['world_size']} workers go on, re-formed in {event['total_s']:.2f} s, "
                f"{lost or 'no'} committed step{'' if lost == 1 else 's'} lost"
            )
        case "view" if event["generation"] > 1 and event["planned"]:
            return f"{step}: {_short(event['reason'])}"
        case "worker_readmitted":
            return f"{step}: the worker with process id {event.get('pid')} is back, with its state"
        case "worker_set_aside" | "members_in_doubt" | "node_backoff" | "planner_compiles" | "collectives":
            return f"{step}: {_short(event.get('reason', ''))}"
        case "resume" | "scale" | "checkpoint_asked":
            return f"{step}: {event['event'].replace('_', ' ')}: {_short(event.get('reason', ''))}"
        case "pause":
            return f"{step}: waiting: {_short(event.get('reason', ''))}"
        case "checkpoint_failed":
            return f"{step}: the checkpoint failed: {event.get('reason')}"
        case "not_finite":
            workers = ", ".join(_short(worker) for worker in event["workers"])
            return f"{step}: no update, gradients were not finite{f' on worker {workers}' if workers else ''}"
        case "loss_spike":
            values = f"{format_loss(event['loss'])}, gradient norm {event['grad_norm']:.3g}"
            return f"{step}: no update, a spike: loss {values}"
        case "state_repaired":
            units, worker = len(event["units"]), _short(event["workers"][0])
            return f"{step}: wrong state of {units} unit(s) on worker {worker}, node {event['nodes'][0]}: repaired"
        case "state_damaged" | "state_unclear":
            return f"{step}: state of {len(event['units'])} unit(s) is damaged: {_short(event['reason'])}"
        case "worker_faulty":
            return f"{step}: worker {_short(event['worker'])} on node {event.get('node')}: {event['reason']}"
        case "straggler" | "straggler_recovered":
            begins, who = event["event"] == "straggler", f"rank {event['rank']} on node {_short(event['nodes'][0])}"
            times = f"{event['factor']:.1f} times as long as others ({event['phase']})"
            return f"{step}: {who} {'takes' if begins else 'is no straggler any more:'} {times}"
        case "speeds":
            return f"{step}: shares follow measured speeds: {_shares(event['shares'])} sequences"
        case "sample_failed":
            return f"{step}: no sample: {event.get('reason')}"
        case "evaluated":
            losses = event.get("val_losses", {})
            by_corpus = ", ".join(f"{Path(name).name} {format_loss(loss)}" for name, loss in losses.items())
            return f"{step}: validation loss {format_loss(event['val_loss'])}{by_corpus and f' ({by_corpus})'}"
        case _:
            return None


def _shares(shares: list[int]) -> str:
    """Shares of all ranks, or of many ranks the smallest and the largest one."""
    return ", ".join(map(str, shares)) if len(shares) <= 16 else f"{min(shares)} to {max(shares)}"


def level_of(event: dict[str, Any]) -> str:
    """How grave an event is, in the terms of a log."""
    name = event["event"]
    if name in ("failed", "state_unclear"):
        return "error"
    return "warning" if name in _WARNINGS else "info"


def format_loss(loss: float | None) -> str:
    """A loss with four digits; files have null for a loss that is not finite."""
    return "not finite" if loss is None else f"{loss:.4f}"


def _short(reason: str) -> str:
    """The sentence with ids of 32 hexadecimal digits cut to their first eight."""
    return re.sub(r"\b([0-9a-f]{8})[0-9a-f]{24}\b", r"\1", reason)
