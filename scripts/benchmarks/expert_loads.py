"""Expert loads for the balancing benchmark, and the baseline: EPLB, written anew from its description.

Families, each [intervals, layers, experts], a million tokens per interval and layer:
- zipfA: popularity rank ** -A; between intervals 5 % of the experts exchange their popularity, and every count has 10 %
noise;
- lognorm: exp(0.8 x), x a first-order autoregression with coefficient 0.9.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from elastic_moe.plan.placement import Placement

FAMILIES = ("zipf0.6", "zipf1.0", "zipf1.4", "lognorm")
TOKENS = 1_000_000


def generate(family: str, experts: int, seed: int, intervals: int = 5, layers: int = 3) -> NDArray[np.float64]:
    """Loads of one family, [intervals, layers, experts]; deterministic."""
    rng = np.random.default_rng([seed, experts, FAMILIES.index(family)])
    out = np.empty((intervals, layers, experts))
    for layer in range(layers):
        popularity = rng.permutation(np.arange(1, experts + 1) ** -float(family[4:] if family != "lognorm" else 0))
        state = rng.standard_normal(experts)
        for interval in range(intervals):
            if family == "lognorm":
                if interval:
                    state = 0.9 * state + np.sqrt(1 - 0.9**2) * rng.standard_normal(experts)
                weight = np.exp(0.8 * state)
            else:
                if interval:
                    chosen = rng.choice(experts, max(2, round(0.05 * experts)), replace=False)
                    popularity[chosen] = popularity[rng.permutation(chosen)]
                weight = popularity * np.exp(0.1 * rng.standard_normal(experts))
            out[interval, layer] = np.rint(weight / weight.sum() * TOKENS)
    return out


def recorded(directory: Path | None) -> dict[str, NDArray[np.float64]]:
    """Loads in `*.npz` files: arrays [intervals, layers, experts]; long recordings of single steps are summed to 20
    intervals.
    """
    loads: dict[str, NDArray[np.float64]] = {}
    for path in sorted(directory.glob("*.npz")) if directory else []:
        with np.load(path) as arrays:
            for key, values in arrays.items():
                array = np.asarray(values, dtype=np.float64)
                if len(array) > 40:
                    per = len(array) // 20
                    array = array[: 20 * per].reshape(20, per, *array.shape[1:]).sum(axis=1)
                loads[f"{path.stem}:{key}"] = array
    return loads


def eplb(load_LE: NDArray[np.float64], ranks: int, slots: int) -> Placement:
    """EPLB's global policy: the expert with most load per copy gets the next copy; copies, heaviest first, go to the
    least loaded rank that has a slot. It needs slots that divide by ranks, and does not keep two copies of an expert
    apart.
    """
    layers, experts = load_LE.shape
    assert slots % ranks == 0, "EPLB needs the same number of slots on every rank"
    expert_LP = np.empty((layers, slots), np.int32)
    for layer, load_E in enumerate(load_LE):
        copies_E = np.ones(experts)
        items = list(range(experts))
        for _ in range(slots - experts):
            items.append(int((load_E / copies_E).argmax()))
            copies_E[items[-1]] += 1
        share = (load_E / copies_E)[items]
        on_rank: list[list[int]] = [[] for _ in range(ranks)]
        load_R = np.zeros(ranks)
        for index in np.argsort(-share, kind="stable").tolist():
            full_R = np.array([len(held) == slots // ranks for held in on_rank])
            rank = int(np.where(full_R, np.inf, load_R).argmin())
            on_rank[rank].append(items[index])
            load_R[rank] += share[index]
        expert_LP[layer] = np.concatenate([np.array(held) for held in on_rank])
    rank_P = np.repeat(np.arange(ranks, dtype=np.int32), slots // ranks)
    return Placement(expert_LP, rank_P, np.zeros((layers, experts), np.int32))
