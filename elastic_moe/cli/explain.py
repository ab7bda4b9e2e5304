"""Which expert is on which rank, and why it moved: `elastic-moe explain RUN [--layer L [--expert E]] [--step S]`.

The file only formats; `metrics.expert_history` reads the records.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence

from elastic_moe.errors import UserError
from elastic_moe.metrics.expert_history import (
    COPY_CAME,
    COPY_WENT,
    HOME_CAME,
    LoadRecord,
    PlacementRecord,
    load_share,
    read_history,
)

MOST_LOADED = 4  # experts of a layer that the overview names
NODE_LETTERS = 12  # of a node's id, enough to tell nodes apart


def overview(history: Sequence[PlacementRecord], loads: Sequence[LoadRecord]) -> Iterator[str]:
    """Every change of placement, and the most loaded experts of each layer."""
    now = history[-1]
    layers = now.layers()
    experts = len(now.home) // max(len(layers), 1)
    yield f"{len(layers)} MoE layers, {experts} experts each, {len(now.ranks)} ranks, as of step {now.step}."
    yield "changes of placement (copies that came, homes that moved):"
    for record in history:
        copies = sum(move.kind == COPY_CAME for move in record.moves)
        homes = sum(move.kind == HOME_CAME for move in record.moves)
        yield f"  step {record.step:6d}  {copies:5d} copies  {homes:4d} homes   {record.reason}"
    yield "layer  copies  most loaded experts (load over the mean: home + replicas)"
    for layer in layers:
        experts_of_layer = now.experts(layer)
        tokens = loads[-1].tokens[layer] if loads else [0] * len(experts_of_layer)
        most = sorted(experts_of_layer, key=lambda expert: -tokens[expert])[:MOST_LOADED]
        text = ", ".join(
            f"{expert} ({_share(loads, layer, expert, now.step)}: "
            f"{now.home[layer, expert]} + {now.replicas(layer, expert)})"
            for expert in most
        )
        yield f"{layer:5d}  {sum(len(now.copies[layer, expert]) for expert in experts_of_layer):6d}  {text}"


def of_layer(history: Sequence[PlacementRecord], loads: Sequence[LoadRecord], layer: int) -> Iterator[str]:
    """Every expert of a layer: load, home, replicas, and its last change."""
    now = history[-1]
    yield f"MoE layer {layer} at step {now.step}: expert, load over the mean, home, replicas, last change"
    for expert in now.experts(layer):
        changes = [record for record in history if any(move[:2] == (layer, expert) for move in record.moves)]
        last = f"step {changes[-1].step}: {changes[-1].reason}" if changes else "where it began"
        home = _rank(now, now.home[layer, expert])
        replicas = ", ".join(map(str, now.replicas(layer, expert))) or "-"
        yield f"{expert:6d}  {_share(loads, layer, expert, now.step):>5}  {home}  [{replicas}]  {last}"


def of_expert(
    history: Sequence[PlacementRecord], loads: Sequence[LoadRecord], layer: int, expert: int
) -> Iterator[str]:
    """Every move of one expert through the run."""
    words = {COPY_CAME: "a copy came to", COPY_WENT: "the copy went from", HOME_CAME: "the home moved to"}
    first, now = history[0], history[-1]
    yield f"MoE layer {layer}, expert {expert}: began with its home at {_rank(first, first.home[layer, expert])}"
    for record in history:
        for move in record.moves:
            if (move.layer, move.expert) != (layer, expert):
                continue
            load = f"load {_share(loads, layer, expert, record.step)} of the mean"
            text = f"  step {record.step}: {words[move.kind]} {_rank(record, move.rank)}; {load}; {record.reason}"
            if layer in record.layer_times:
                before, after = record.layer_times[layer]
                text += f"; the layer's slowest rank from {before:.3f} to {after:.3f} of the mean"
            yield text
    replicas = ", ".join(_rank(now, rank) for rank in now.replicas(layer, expert))
    yield f"  now: home at {_rank(now, now.home[layer, expert])}, replicas: {replicas or 'none'}"


def _rank(record: PlacementRecord, rank: int) -> str:
    """A rank with its worker and node."""
    if rank >= len(record.ranks):
        return f"rank {rank}"
    worker, node = record.ranks[rank]
    return f"rank {rank} ({worker}{' on ' + node[:NODE_LETTERS] if node else ''})"


def _share(loads: Sequence[LoadRecord], layer: int, expert: int, step: int) -> str:
    share = load_share(loads, layer, expert, step)
    return "?" if share is None else f"{share:.2f}"


def explain(run: str, layer: int | None = None, expert: int | None = None, step: int | None = None) -> Iterator[str]:
    """The lines of text about a run.

    Args:
        run: the run directory.
        layer: index among the MoE layers; None for all.
        expert: index within the layer; None for all.
        step: the last step to take into account; None for the end.

    Raises:
        UserError: the run has no such record, layer or expert.
    """
    history, loads = read_history(run)
    if step is not None:
        history = [record for record in history if record.step <= step]
    if not history:
        raise UserError(f"{run}: no placement is recorded{'' if step is None else f' up to step {step}'}.")
    if expert is not None and layer is None:
        raise UserError("--expert needs --layer too.")
    layers = history[-1].layers()
    if layer is not None and layer not in layers:
        raise UserError(f"--layer {layer}: the MoE layers are 0 to {layers[-1]}.")
    if layer is None:
        return overview(history, loads)
    if expert is None:
        return of_layer(history, loads, layer)
    if expert not in history[-1].experts(layer):
        raise UserError(f"--expert {expert}: layer {layer} has no such expert.")
    return of_expert(history, loads, layer, expert)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="elastic-moe explain", description="Which expert is on which rank, and why it moved."
    )
    parser.add_argument("run", help="the run directory")
    parser.add_argument("--layer", type=int, help="index among the MoE layers")
    parser.add_argument("--expert", type=int, help="with --layer: the moves of one expert")
    parser.add_argument("--step", type=int, help="as of this step; default: the end")
    options = parser.parse_args(arguments)
    try:
        text = "\n".join(explain(options.run, options.layer, options.expert, options.step))
    except UserError as error:
        print(f"elastic_moe: {error}", file=sys.stderr)
        return 2
    try:
        print(text, flush=True)
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
