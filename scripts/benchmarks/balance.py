"""Expert balancing: placement and token split on many loads, beside EPLB on the same loads in the same run.

- balance: sum over layers of the ideal time / sum over layers of the slowest rank's time. `same`: on the load planned
  for; `next`: the placement is one interval old; `_even`: every copy of an expert gets the same share; otherwise the
  split is optimal. `sticky`: planned on from the interval before, with the share of copies that a rank did not hold;
  `pinned`: so, with homes that may not move.
- `worst` is the worst single layer and interval. Everything is repeated for several seeds of the generated loads.
- uneven: ranks, nodes, slots and speeds that differ, against the best time that any placement could reach (`bound`).
- membership: copies fetched when ranks leave or join, the balance afterwards, and experts whose state nobody holds any
more.
- time: milliseconds per plan of 58 layers and per split of one layer.
The end-to-end run, balancing on and off, is `scripts/bench balance_run`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elastic_moe.plan.placement import LOST, Placement, Topology, plan_placement
from elastic_moe.plan.split import split_for_rank, split_tokens
from elastic_moe.plan.state.ownership import NONE, plan_ownership
from elastic_moe.types import Member, Unit, View
from scripts.benchmarks import common
from scripts.benchmarks.expert_loads import FAMILIES, eplb, generate, recorded
from scripts.benchmarks.placement_bound import least_time

Loads = NDArray[np.float64]
CELLS = [
    (64, 8, 72), (64, 16, 80), (64, 64, 128), (128, 16, 144), (128, 64, 192), (256, 8, 288), (256, 16, 288),
    (256, 64, 320),
    (256, 64, 512), (256, 256, 512),
]  # fmt: skip
FEW = [(64, 8, 64), (64, 8, 66), (64, 16, 72), (256, 64, 288), (256, 16, 264), (256, 256, 300), (256, 256, 384)]
SPLIT_TOKENS = 4096  # per rank and layer, for the timing


def topology(ranks: int, per_node: int = 8, speeds: Sequence[float] | None = None) -> Topology:
    """Equal nodes."""
    return Topology(tuple(f"node{rank // per_node}" for rank in range(ranks)), tuple(speeds or [1.0] * ranks))


def divided(slots: int, ranks: int) -> list[int]:
    """Slots of each rank, as equal as can be."""
    return [slots // ranks + (rank < slots % ranks) for rank in range(ranks)]


def times(load_LE: Loads, placement: Placement, speeds: Sequence[float]) -> Loads:
    """Slowest rank's time per layer with the optimal split, in tokens per unit of speed."""
    out = []
    for layer, load_E in enumerate(load_LE):
        counts_RE = np.zeros((len(speeds), len(load_E)), dtype=np.int64)
        counts_RE[0] = np.rint(load_E * 100)
        tokens_P = split_for_rank(counts_RE, placement, layer, 0, speeds).tokens_P
        load_R = np.bincount(placement.rank_of_slot, weights=tokens_P, minlength=len(speeds))
        out.append((load_R / np.asarray(speeds)).max() / 100)
    return np.array(out)


def even_times(load_LE: Loads, placement: Placement, ranks: int) -> Loads:
    """As `times`, for equal ranks, with the same share for every copy."""
    out = []
    for load_E, expert_P in zip(load_LE, placement.expert_of_slot, strict=True):
        copies_E = np.bincount(expert_P[expert_P >= 0], minlength=len(load_E))
        share_P = np.where(expert_P >= 0, (load_E / np.maximum(copies_E, 1))[expert_P], 0.0)
        out.append(np.bincount(placement.rank_of_slot, weights=share_P, minlength=ranks).max())
    return np.array(out)


def fetched(before: Placement, after: Placement) -> float:
    """Share of the copies whose rank did not hold the expert before."""
    new = total = 0
    for held_P, expert_P in zip(before.expert_of_slot, after.expert_of_slot, strict=True):
        had = set(zip(before.rank_of_slot.tolist(), held_P.tolist(), strict=True))
        have = [pair for pair in zip(after.rank_of_slot.tolist(), expert_P.tolist(), strict=True) if pair[1] >= 0]
        new += sum(pair not in had for pair in have)
        total += len(have)
    return new / total


def series(load: Loads, ranks: int, slots: int) -> dict[str, list[float]]:
    """All figures of one load in one cell, one entry per interval (and `worst` per layer)."""
    speeds = [1.0] * ranks
    where, each = topology(ranks), [slots // ranks] * ranks
    planners: dict[str, Callable[[Loads, Placement | None], Placement]] = {
        "eplb": lambda load_LE, _: eplb(load_LE, ranks, slots),
        "fresh": lambda load_LE, _: plan_placement(load_LE, where, each),
        "sticky": lambda load_LE, before: plan_placement(load_LE, where, each, before),
        "pinned": lambda load_LE, before: plan_placement(load_LE, where, each, before, home_moves=0),
    }
    out: dict[str, list[float]] = {}
    for name, planner in planners.items():
        before = None
        for interval, load_LE in enumerate(load):
            placement = planner(load_LE, before)
            ideal_L = load_LE.sum(axis=1) / ranks
            time_L = times(load_LE, placement, speeds)
            out.setdefault(f"{name}_same", []).append(float(ideal_L.sum() / time_L.sum()))
            out.setdefault(f"{name}_worst", []).append(float((ideal_L / time_L).min()))
            if interval + 1 < len(load):
                later = load[interval + 1]
                total = later.sum() / ranks
                out.setdefault(f"{name}_next", []).append(float(total / times(later, placement, speeds).sum()))
                even = even_times(later, placement, ranks).sum()
                out.setdefault(f"{name}_next_even", []).append(float(total / even))
            if before is not None and name != "fresh":
                out.setdefault(f"{name}_fetched", []).append(fetched(before, placement))
            before = placement
    return out


def merged(parts: Sequence[Mapping[str, list[float]]]) -> dict[str, float]:
    """Means over everything; the minimum of what is called worst; for what is called next also the standard error over
    the parts.
    """
    out: dict[str, float] = {}
    for key in parts[0]:
        values = [v for p in parts for v in p[key]]
        out[key] = round(min(values) if key.endswith("worst") else statistics.fmean(values), 4)
        if key.endswith("_next") and len(parts) > 1:
            spread = statistics.stdev(statistics.fmean(p[key]) for p in parts)
            out[f"{key}_error"] = round(spread / len(parts) ** 0.5, 4)
    return out


def uneven_cases(quick: bool) -> list[tuple[str, int, Topology, list[int]]]:
    """(name, experts, topology, slots): the named cases, and random ones."""

    def nodes(*sizes: int) -> tuple[str, ...]:
        return tuple(f"node{n}" for n, size in enumerate(sizes) for _ in range(size))

    even = lambda *sizes: Topology(nodes(*sizes), (1.0,) * sum(sizes))  # noqa: E731
    cases = [
        ("64 experts, 7 ranks, 64 slots", 64, even(7), [10] + [9] * 6),
        ("64 experts, 7 ranks, 70 slots", 64, even(7), [10] * 7),
        ("64 experts, 7 ranks, 72 slots", 64, even(7), [11, 11] + [10] * 5),
        ("64 experts, 12 ranks on 8 + 4, 72 slots", 64, even(8, 4), [6] * 12),
        ("128 experts, 15 ranks on 8 + 7, 150 slots", 128, even(8, 7), [10] * 15),
        ("256 experts, 60 ranks on 7 x 8 + 4, 300 slots", 256, even(8, 8, 8, 8, 8, 8, 8, 4), [5] * 60),
        ("64 experts, 16 ranks, node 2 at half speed", 64, Topology(nodes(8, 8), (1.0,) * 8 + (0.5,) * 8), [5] * 16),
        ("64 experts, 16 ranks, 6 and 4 slots", 64, even(8, 8), [6] * 8 + [4] * 8),
    ]
    rng = np.random.default_rng(7)
    for index in range(4 if quick else 40):
        experts, ranks = int(rng.choice([32, 64, 128, 256])), int(rng.integers(3, 49))
        sizes: list[int] = []
        while sum(sizes) < ranks:
            sizes.append(int(min(rng.integers(1, 9), ranks - sum(sizes))))
        base = -(-experts // ranks) + 1
        slots = (base + rng.integers(0, 3, ranks)).tolist()
        speeds = tuple(rng.choice([0.5, 0.8, 1.0, 1.0, 1.5], ranks).tolist())
        cases.append((f"random {index}", experts, Topology(nodes(*sizes), speeds), slots))
    return cases


def uneven(quick: bool) -> list[dict[str, Any]]:
    """Each case on every family: the worst layer's bound / time, and EPLB's where it runs."""
    rows = []
    for name, experts, where, slots in uneven_cases(quick):
        row: dict[str, Any] = {
            "case": name,
            "ranks": len(slots),
            "slots": sum(slots),
            "enough_slots": sum(slots) >= experts + len(slots) - 1,
        }
        for family in FAMILIES:
            load_LE = generate(family, experts, 0, 1)[0]
            placement = plan_placement(load_LE, where, slots)
            bound_L = np.array([least_time(load_E, slots, where.speeds) for load_E in load_LE])
            row[family] = round(float((bound_L / times(load_LE, placement, where.speeds)).min()), 4)
            if len(set(slots)) == len(set(where.speeds)) == 1:
                theirs = times(load_LE, eplb(load_LE, len(slots), sum(slots)), where.speeds)
                row[f"{family}_eplb"] = round(float((bound_L / theirs).min()), 4)
        rows.append(row)
    return rows


def membership(seeds: int) -> list[dict[str, Any]]:
    """Ranks leave or join: what is fetched, how balanced it is, whether any expert's state is gone."""
    cases = [
        ("64 experts, 8 -> 7 ranks", 64, [10] * 8, [0, 1, 2, LOST, 3, 4, 5, 6], [10] * 7),
        ("64 experts, 7 -> 8 ranks", 64, [10] * 7, list(range(7)), [10] * 8),
        ("64 experts, 16 -> 8 ranks, a node lost", 64, [10] * 16, [LOST] * 8 + list(range(8)), [10] * 8),
        ("64 experts, 12 on 8 + 4 -> 16 ranks", 64, [6] * 12, list(range(12)), [6] * 16),
        ("256 experts, 64 -> 56 ranks, a node lost", 256, [6] * 64,
         [*range(16), *[LOST] * 8, *range(16, 56)], [6] * 56),
    ]  # fmt: skip
    rows = []
    for name, experts, slots_before, rank_of, slots_after in cases:
        parts = []
        before_ranks, after_ranks = len(slots_before), len(slots_after)
        old_nodes = [rank // 8 for rank in range(before_ranks)]
        new_nodes = [rank // 8 for rank in range(after_ranks)]
        for old, new in enumerate(rank_of):
            if new != LOST:
                new_nodes[new] = old_nodes[old]
        where = Topology(tuple(f"node{n}" for n in new_nodes), (1.0,) * after_ranks)
        for family in FAMILIES:
            for seed in range(seeds):
                for load_LE in generate(family, experts, seed):
                    old = plan_placement(load_LE, topology(before_ranks), slots_before)
                    remap_ranks = old.remap_ranks(rank_of)
                    homes, gone = promoted(old, rank_of, old_nodes)
                    remap_ranks = Placement(remap_ranks.expert_of_slot, remap_ranks.rank_of_slot, homes)
                    new = plan_placement(load_LE, where, slots_after, remap_ranks)
                    ideal_L = load_LE.sum(axis=1) / after_ranks
                    time_L = times(load_LE, new, where.speeds)
                    parts.append(
                        {
                            "fetched": [fetched(remap_ranks, new)],
                            "balance": [float(ideal_L.sum() / time_L.sum())],
                            "balance_worst": [float((ideal_L / time_L).min())],
                            "state_lost": [float(gone)],
                        }
                    )
        rows.append({"case": name, **merged(parts)})
    return rows


def promoted(old: Placement, rank_of: Sequence[int], nodes: Sequence[int]) -> tuple[NDArray[np.int32], int]:
    """Homes after the loss, as a run has them: a lost home's mirror takes over.

    Also the experts without a living holder.
    """
    layers, experts = old.home.shape
    members = tuple(Member(f"w{rank}", f"node{node}", rank) for rank, node in enumerate(nodes))
    units = [Unit(f"{layer}.{e}", (), expert=e, moe_layer=layer) for layer in range(layers) for e in range(experts)]
    held = np.full((len(nodes), len(units)), NONE, dtype=np.uint8)
    owners = plan_ownership(units, View(1, members), held, 1, old.home)
    homes, gone = old.home.copy(), 0
    for index in range(len(units)):
        layer, expert = divmod(index, experts)
        holders = [int(owners.primary[index]), *(int(m) for m in owners.mirrors[index] if m >= 0)]
        living = [rank_of[rank] for rank in holders if rank_of[rank] != LOST]
        homes[layer, expert] = living[0] if living else LOST
        gone += not living
    return homes, gone


def timing(quick: bool) -> list[dict[str, Any]]:
    """Plans of 58 layers, and splits of eight layers one by one; the jobs take turns; medians, and of the splits the
    slowest layer's too.
    """
    rows = []
    for experts, ranks, slots in [
        (64, 8, 72),
        (256, 16, 288),
        (256, 64, 288),
        (256, 64, 320),
        (256, 64, 512),
        (256, 256, 512),
    ]:
        load_LE = generate("zipf1.0", experts, 0, 2, 58)
        where, each = topology(ranks), divided(slots, ranks)
        before = plan_placement(load_LE[0], where, each)
        rng = np.random.default_rng(0)
        counts_LRE = [rng.multinomial(SPLIT_TOKENS, load_E / load_E.sum(), size=ranks) for load_E in load_LE[1, :8]]
        jobs: dict[str, Callable[[], object]] = {
            "fresh_ms": partial(plan_placement, load_LE[0], where, each),
            "sticky_ms": partial(plan_placement, load_LE[1], where, each, before),
            "pinned_ms": partial(plan_placement, load_LE[1], where, each, before, home_moves=0),
        }
        if slots % ranks == 0:
            jobs["eplb_numpy_ms"] = partial(eplb, load_LE[0], ranks, slots)
        for layer, counts_RE in enumerate(counts_LRE):
            jobs[f"split {layer}"] = partial(split_for_rank, counts_RE, before, layer, 0)
        jobs["split_matrix_layer_ms"] = partial(split_tokens, counts_LRE[0], before, 0)
        took: dict[str, list[float]] = {name: [] for name in jobs}
        for _ in range(3 if quick else 15):
            for name, job in jobs.items():
                begin = time.perf_counter()
                job()
                took[name].append(1e3 * (time.perf_counter() - begin))
        median = {name: statistics.median(values) for name, values in took.items()}
        splits = [median.pop(f"split {layer}") for layer in range(len(counts_LRE))]
        median |= {"split_layer_ms": statistics.median(splits), "split_slowest_layer_ms": max(splits)}
        rows.append({"cell": f"{experts}/{ranks}/{slots}"} | {name: round(value, 3) for name, value in median.items()})
    return rows


def measure(quick: bool, seeds: int, directory: Path | None) -> dict[str, Any]:
    """The whole benchmark."""
    from_files = recorded(directory)
    cells: dict[str, Any] = {}
    for experts, ranks, slots in CELLS[:3] if quick else CELLS:
        by_family = {f: [series(generate(f, experts, seed), ranks, slots) for seed in range(seeds)] for f in FAMILIES}
        cells[f"{experts}/{ranks}/{slots}"] = {
            "all": merged([part for parts in by_family.values() for part in parts]),
            **{family: merged(parts) for family, parts in by_family.items()},
            **{n: merged([series(load, ranks, slots)]) for n, load in from_files.items() if load.shape[2] == experts},
        }
        mine = cells[f"{experts}/{ranks}/{slots}"]["all"]
        common.say(
            f"{experts}/{ranks}/{slots}: same {mine['fresh_same']:.4f} (EPLB {mine['eplb_same']:.3f}), "
            f"next {mine['fresh_next']:.3f} (EPLB {mine['eplb_next']:.3f})"
        )
    few: dict[str, Any] = {}
    for experts, ranks, slots in FEW:
        each = divided(slots, ranks)
        ratios = []
        for family in FAMILIES:
            for load_LE in generate(family, experts, 0):
                time_L = times(load_LE, plan_placement(load_LE, topology(ranks), each), [1.0] * ranks)
                ratios += [
                    least_time(load_E, each, [1.0] * ranks) / t for load_E, t in zip(load_LE, time_L, strict=True)
                ]
        few[f"{experts}/{ranks}/{slots}"] = {"mean": round(statistics.fmean(ratios), 4), "worst": round(min(ratios), 4)}
    common.say("uneven ranks and membership changes")
    return {
        "benchmark": "balance",
        "machine": common.machine(),
        "seeds": seeds,
        "cells": cells,
        "fewer_slots_bound_over_time": few,
        "uneven_bound_over_time": uneven(quick),
        "membership": membership(min(seeds, 5)),
        "time": timing(quick),
    }


if __name__ == "__main__":
    parser = common.arguments("balance", __doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=20, help="seeds of the generated loads")
    parser.add_argument(
        "--loads", type=Path, help="directory with further loads, *.npz with arrays [intervals, layers, experts]"
    )
    args = parser.parse_args()
    raise SystemExit(common.run(lambda: measure(args.quick, 1 if args.quick else args.seeds, args.loads), args.json))
