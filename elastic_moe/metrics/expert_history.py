"""Reads experts.jsonl: the rank of every expert after each change, the cause of the change, and the experts' loads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from elastic_moe.metrics.records import read_events, read_expert_records

COPY_CAME, COPY_WENT, HOME_CAME = 1, -1, 2  # kinds of moves in experts.jsonl


class Move(NamedTuple):
    """A copy or a home of one expert that changed its rank.

    Attributes:
        layer: index among the MoE layers.
        expert: index within the layer.
        rank: the rank that got or lost it.
        kind: COPY_CAME, COPY_WENT or HOME_CAME.
    """

    layer: int
    expert: int
    rank: int
    kind: int


@dataclass(frozen=True)
class PlacementRecord:
    """The ranks of all experts after a step.

    Attributes:
        step: committed step from which on this holds.
        ranks: (worker, node) of each rank.
        home: (layer, expert) -> rank.
        copies: (layer, expert) -> ranks, the home's among them.
        reason: cause of the change, as a sentence.
        moves: differences to the record before, between workers: a worker's rank may change with the membership.
        layer_times: layer -> expected times of the slowest rank before and after; 1 is the mean.
    """

    step: int
    ranks: tuple[tuple[str, str], ...]
    home: dict[tuple[int, int], int]
    copies: dict[tuple[int, int], set[int]]
    reason: str
    moves: tuple[Move, ...] = ()
    layer_times: dict[int, tuple[float, float]] = field(default_factory=dict[int, tuple[float, float]])

    def layers(self) -> list[int]:
        """Indices of the MoE layers."""
        return sorted({layer for layer, _ in self.home})

    def experts(self, layer: int) -> list[int]:
        """Indices of a layer's experts."""
        return sorted(expert for at, expert in self.home if at == layer)

    def replicas(self, layer: int, expert: int) -> list[int]:
        """Ranks that have a copy of an expert beside its home."""
        return sorted(self.copies[layer, expert] - {self.home[layer, expert]})


@dataclass(frozen=True)
class LoadRecord:
    """Tokens of every expert, tokens[layer][expert], summed over the `steps` steps that end with `step`."""

    step: int
    steps: int
    tokens: list[list[int]]


def read_history(run_dir: str | Path) -> tuple[list[PlacementRecord], list[LoadRecord]]:
    """A run's placements and loads, in order.

    Raises:
        UserError: the directory has no record of experts.
    """
    records = read_expert_records(run_dir)
    views = [event for event in read_events(run_dir) if event.get("event") == "view"]
    reasons = {view.get("generation"): str(view.get("reason", "")) for view in views}
    placements: list[PlacementRecord] = []
    loads: list[LoadRecord] = []
    for record in records:
        if record["event"] == "expert_load":
            loads.append(LoadRecord(record["step"], record["steps"], record["load"]))
        elif record["event"] == "placement":
            placements.append(_next(placements[-1] if placements else None, record, reasons))
    return placements, loads


def load_share(loads: Sequence[LoadRecord], layer: int, expert: int, step: int) -> float | None:
    """An expert's tokens over its layer's mean.

    The loads are those of the record that covers the step, else of the last record. Returns None without records.
    """
    covering = next((record for record in loads if record.step >= step), loads[-1] if loads else None)
    if covering is None:
        return None
    tokens = covering.tokens[layer]
    return tokens[expert] * len(tokens) / max(sum(tokens), 1)


def _next(before: PlacementRecord | None, record: dict[str, Any], reasons: dict[Any, str]) -> PlacementRecord:
    """The placement that a record leads to. That of a new membership is complete, others are changes to `before`."""
    home: dict[tuple[int, int], int] = {}
    copies: dict[tuple[int, int], set[int]] = {}
    times: dict[int, tuple[float, float]] = {}
    if record["cause"] == "membership" or before is None:
        ranks = tuple((worker, node) for worker, node in record.get("ranks", []))
        reason = reasons.get(record.get("generation")) or "a new membership"
    else:
        ranks, home = before.ranks, dict(before.home)
        copies = {key: set(held) for key, held in before.copies.items()}
        expected = record.get("expected", {})
        gain_ms, cost_ms = 1e3 * expected.get("gain_s", 0), 1e3 * expected.get("cost_s", 0)
        reason = f"load: {gain_ms:.2f} ms a step expected, for {cost_ms:.2f} ms"
        times = {int(layer): (old, new) for layer, (old, new) in record.get("layers", {}).items()}
    for move in record["moves"]:
        layer, expert, rank, kind = move
        if kind == HOME_CAME:
            home[layer, expert] = rank
        elif kind == COPY_CAME:
            copies.setdefault((layer, expert), set()).add(rank)
        else:
            copies[layer, expert].discard(rank)
    moves = () if before is None else tuple(_moves(before, ranks, home, copies))
    return PlacementRecord(int(record["step"]), ranks, home, copies, reason, moves, times)


def _moves(
    before: PlacementRecord,
    ranks: tuple[tuple[str, str], ...],
    home: dict[tuple[int, int], int],
    copies: dict[tuple[int, int], set[int]],
) -> list[Move]:
    """Moves between workers since `before`, by the ranks that the workers have now."""
    rank_of = {worker: rank for rank, worker in enumerate(ranks)}
    now_R = [rank_of.get(worker, -1) for worker in before.ranks]  # -1: the worker has gone
    moves: list[Move] = []
    for key in sorted(home):
        had = {now_R[rank] for rank in before.copies.get(key, set())} - {-1}
        moves += [Move(*key, rank, COPY_CAME) for rank in sorted(copies[key] - had)]
        moves += [Move(*key, rank, COPY_WENT) for rank in sorted(had - copies[key])]
        if key in before.home and now_R[before.home[key]] != home[key]:
            moves.append(Move(*key, home[key], HOME_CAME))
    return moves
