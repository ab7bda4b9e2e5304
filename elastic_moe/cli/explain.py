"""Which expert sits where, and why it moved: `python -m elastic_moe.plan.explain RUN [--layer L [--expert E]] [--step S]`.

Reads a run directory's `experts.jsonl` (placements, loads) and `events.jsonl` (why the membership changed). Standard library only.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from elastic_moe.errors import UserError
from elastic_moe.run_dir import EVENTS, EXPERTS

CAME, WENT, HOME = 1, -1, 2  # what a recorded move says of a copy


@dataclass
class Placed:
    """The experts of a run at one step.

    Attributes:
        step: committed step after which this holds.
        ranks: (worker, node) of each rank.
        home: (layer, expert) -> rank.
        copies: (layer, expert) -> ranks.
        why: what brought it about, as a sentence.
        moves: [layer, expert, rank, what] against the placement before.
        layers: layer -> times of the slowest rank before and after, as expected; 1 is the mean.
    """

    step: int
    ranks: list[tuple[str, str]]
    home: dict[tuple[int, int], int]
    copies: dict[tuple[int, int], set[int]]
    why: str
    moves: list[tuple[int, int, int, int]]
    layers: dict[int, tuple[float, float]] = field(default_factory=dict[int, tuple[float, float]])

    def at(self, rank: int) -> str:
        """A rank with its worker and node."""
        if rank >= len(self.ranks):
            return f"rank {rank}"
        worker, node = self.ranks[rank]
        return f"rank {rank} ({worker}{' on ' + node[:12] if node else ''})"


@dataclass(frozen=True)
class Loads:
    """Tokens of every expert, [layer][expert], over the steps that end with `step`."""

    step: int
    steps: int
    tokens: list[list[int]]


def lines(path: Path) -> Iterator[dict[str, Any]]:
    """Whole lines of a file of JSON lines."""
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                yield json.loads(line)
            except ValueError:
                return


def read(run_dir: str | Path) -> tuple[list[Placed], list[Loads]]:
    """A run's placements and loads in order.

    Raises:
        UserError: the directory has no record of experts.
    """
    path = Path(run_dir) / EXPERTS
    if not path.exists():
        raise UserError(f"{run_dir}: there is no {EXPERTS}; is it the directory of a run (run.dir)?")
    reasons = {
        e.get("generation"): str(e.get("reason", "")) for e in lines(Path(run_dir) / EVENTS) if e.get("event") == "view"
    }
    history: list[Placed] = []
    loads: list[Loads] = []
    for event in lines(path):
        if event["event"] == "expert_load":
            loads.append(Loads(event["step"], event["steps"], event["load"]))
        elif event["event"] == "placement":
            history.append(_next(history[-1] if history else None, event, reasons))
    return history, loads


def _next(before: Placed | None, event: dict[str, Any], reasons: dict[Any, str]) -> Placed:
    step, moves = int(event["step"]), [tuple(move) for move in event["moves"]]
    if event["why"] == "membership" or before is None:
        reason = reasons.get(event.get("generation")) or "a new membership"
        now = Placed(step, [tuple(r) for r in event.get("ranks", [])], {}, {}, reason, [])
    else:
        expected = event.get("expected", {})
        why = f"load: {1e3 * expected.get('gain_s', 0):.2f} ms a step expected, for {1e3 * expected.get('cost_s', 0):.2f} ms"
        copies = {key: set(ranks) for key, ranks in before.copies.items()}
        now = Placed(step, before.ranks, dict(before.home), copies, why, [])
        now.layers = {int(layer): (times[0], times[1]) for layer, times in event.get("layers", {}).items()}
    for layer, expert, rank, what in moves:
        key = (layer, expert)
        if what == HOME:
            now.home[key] = rank
        elif what == CAME:
            now.copies.setdefault(key, set()).add(rank)
        else:
            now.copies[key].discard(rank)
    now.moves = _differences(before, now)
    return now


def _differences(before: Placed | None, now: Placed) -> list[tuple[int, int, int, int]]:
    """Moves between workers, not ranks: a worker's rank may change with the membership."""
    if before is None:
        return []
    rank_of = {worker: rank for rank, worker in enumerate(now.ranks)}
    then = [rank_of.get(worker, -1) for worker in before.ranks]
    moves: list[tuple[int, int, int, int]] = []
    for key in sorted(now.home):
        had = {then[rank] for rank in before.copies.get(key, set())} - {-1}
        moves += [(*key, rank, CAME) for rank in sorted(now.copies[key] - had)]
        moves += [(*key, rank, WENT) for rank in sorted(had - now.copies[key])]
        if key in before.home and then[before.home[key]] != now.home[key]:
            moves.append((*key, now.home[key], HOME))
    return moves


def share(loads: list[Loads], layer: int, expert: int, step: int) -> str:
    """An expert's tokens over the layer's mean, in the record that covers a step or the last one before."""
    known = [one for one in loads if one.step >= step] or loads[-1:]
    if not known:
        return "?"
    tokens = known[0].tokens[layer]
    return f"{tokens[expert] * len(tokens) / max(sum(tokens), 1):.2f}"


def overview(history: list[Placed], loads: list[Loads]) -> Iterator[str]:
    """What changed, change by change, and how each layer stands."""
    now = history[-1]
    layers = sorted({layer for layer, _ in now.home})
    yield f"{len(layers)} MoE layers, {len(now.home) // max(len(layers), 1)} experts each, {len(now.ranks)} ranks, as of step {now.step}."
    yield "changes of placement (copies that came, homes that moved):"
    for placed in history:
        came = sum(what == CAME for *_, what in placed.moves)
        homes = sum(what == HOME for *_, what in placed.moves)
        yield f"  step {placed.step:6d}  {came:5d} copies  {homes:4d} homes   {placed.why}"
    yield "layer  copies  most loaded experts (load over the mean: home + replicas)"
    for layer in layers:
        experts = [expert for at, expert in now.home if at == layer]
        tokens = loads[-1].tokens[layer] if loads else [0] * len(experts)
        hot = sorted(experts, key=lambda e: -tokens[e])[:4]
        text = ", ".join(
            f"{e} ({share(loads, layer, e, now.step)}: {now.home[layer, e]} + {sorted(now.copies[layer, e] - {now.home[layer, e]})})"
            for e in hot
        )
        yield f"{layer:5d}  {sum(len(now.copies[layer, e]) for e in experts):6d}  {text}"


def of_layer(history: list[Placed], loads: list[Loads], layer: int) -> Iterator[str]:
    """Every expert of a layer: load, home, replicas, and the last time that anything of it moved."""
    now = history[-1]
    yield f"MoE layer {layer} at step {now.step}: expert, load over the mean, home, replicas, last change"
    for expert in sorted(e for at, e in now.home if at == layer):
        last = [placed for placed in history if any(move[:2] == (layer, expert) for move in placed.moves)]
        when = f"step {last[-1].step}: {last[-1].why}" if last else "where it began"
        home = now.home[layer, expert]
        replicas = ", ".join(str(rank) for rank in sorted(now.copies[layer, expert] - {home})) or "-"
        yield f"{expert:6d}  {share(loads, layer, expert, now.step):>5}  {now.at(home)}  [{replicas}]  {when}"


def of_expert(history: list[Placed], loads: list[Loads], layer: int, expert: int) -> Iterator[str]:
    """One expert's way through the run."""
    words = {CAME: "a copy came to", WENT: "the copy went from", HOME: "the home moved to"}
    first = history[0]
    yield f"MoE layer {layer}, expert {expert}: began with its home at {first.at(first.home[layer, expert])}"
    for placed in history:
        for at, which, rank, what in placed.moves:
            if (at, which) == (layer, expert):
                times = placed.layers.get(layer)
                expected = (
                    f"; the layer's slowest rank from {times[0]:.3f} to {times[1]:.3f} of the mean" if times else ""
                )
                load = share(loads, layer, expert, placed.step)
                yield f"  step {placed.step}: {words[what]} {placed.at(rank)}; load {load} of the mean; {placed.why}{expected}"
    now = history[-1]
    replicas = ", ".join(now.at(rank) for rank in sorted(now.copies[layer, expert] - {now.home[layer, expert]}))
    yield f"  now: home at {now.at(now.home[layer, expert])}, replicas: {replicas or 'none'}"


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m elastic_moe.plan.explain", description="Which expert sits where, and why it moved."
    )
    parser.add_argument("run", help="the run directory")
    parser.add_argument("--layer", type=int, help="index among the MoE layers")
    parser.add_argument("--expert", type=int, help="with --layer: one expert's way")
    parser.add_argument("--step", type=int, help="as of this step; default: the end")
    args = parser.parse_args(arguments)
    try:
        history, loads = read(args.run)
        if args.step is not None:
            history = [placed for placed in history if placed.step <= args.step]
        if not history:
            raise UserError(
                f"{args.run}: no placement is recorded{'' if args.step is None else f' up to step {args.step}'}."
            )
        if args.expert is not None and args.layer is None:
            raise UserError("--expert wants --layer too.")
        layers = {layer for layer, _ in history[-1].home}
        if args.layer is not None and args.layer not in layers:
            raise UserError(f"--layer {args.layer}: the MoE layers are 0 to {max(layers)}.")
        if args.expert is not None and (args.layer, args.expert) not in history[-1].home:
            raise UserError(f"--expert {args.expert}: there is no such expert in layer {args.layer}.")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.layer is None:
        text = overview(history, loads)
    elif args.expert is None:
        text = of_layer(history, loads, args.layer)
    else:
        text = of_expert(history, loads, args.layer, args.expert)
    try:
        print("\n".join(text), flush=True)
    except BrokenPipeError:  # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
