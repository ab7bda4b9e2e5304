"""A time that no placement into the given slots beats: what a plan may be measured against.

Two ranks that share an expert, directly or through others, are in one component. A component of m ranks needs m - 1 of
its slots for the copies that join them, so of the x = slots - experts spare slots it uses u >= m - 1, and its other
slots hold one expert each. One that holds a set A of hot experts therefore has at least s(m) - u experts, s(m) being
the slots of the m smallest ranks, and at best the others are the lightest of all: (1) m z >= load(A) + light(s(m) - u -
|A|). Two bounds follow, for equal ranks; unequal ones have a weaker one.

- Together: the least u for which some m allows (1) is what A costs. However the hottest experts are divided into
  components, the sum of what these cost is at most x. Exact in A, but only the thirteen hottest experts can be looked
  at.
- Alone: let c(e) be the least u with which load(e) + light(s m - u - 2) <= m z for some real m <= u + 1, where s is the
  smallest rank's slots, and light is linear between whole numbers and 0 below 0. Then the sum of c over all experts is
  at most x, because over the experts of one component it is at most its u. If it were more, take c'(e) <= c(e) of sum u
  + 1, and A where c' > 0. With c' - 1 spare slots e does not fit: load(e) + light(s m(e) - c'(e) - 1) > m(e) z for
  every m(e) <= c'(e). Let the m(e) sum to m so that all s m(e) - c'(e) - 1 have the same sign (they sum to s m - u - 1
  - |A|). Light is convex, so light(s m - u - |A|) is at least the sum of theirs, and load(A) + light(s m - u - |A|) > m
  z contradicts (1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from elastic_moe.plan.compiled import compiled

_HOTTEST = 13  # experts whose divisions are tried; time grows with 3 to this power


def least_time(load_E: NDArray[np.float64], slots: Sequence[int], speeds: Sequence[float]) -> float:
    """In load per unit of speed. Not every bound is reached by a placement."""
    time = _enough_copies(load_E, slots, speeds)
    if len(set(speeds)) == 1:
        time = max(time, _components(load_E, slots) / speeds[0])
    return time


def _first_that(fits: Callable[[float], bool], low: float, high: float) -> float:
    """The least time that fits, from below."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return low


def _enough_copies(load_E: NDArray[np.float64], slots: Sequence[int], speeds: Sequence[float]) -> float:
    """The mean, and copies enough that each expert fits on that many of the fastest ranks."""
    best_speed = np.cumsum(sorted(speeds, reverse=True))

    def fits(time: float) -> bool:
        need_E = np.searchsorted(best_speed, load_E / time * (1 - 1e-12)) + 1
        return need_E.sum() <= sum(slots) and need_E.max() <= len(speeds)

    return _first_that(fits, float(load_E.sum() / sum(speeds)), float(load_E.max() / best_speed[0] + load_E.sum()))


def _components(load_E: NDArray[np.float64], slots: Sequence[int]) -> float:
    heavy_E = np.sort(load_E)[::-1].copy()
    light_E = np.concatenate([[0.0], np.cumsum(heavy_E[::-1])])
    slots_M = np.concatenate([[0], np.cumsum(np.sort(slots))]).astype(np.int64)
    spare = int(sum(slots)) - len(load_E)
    costs = [partial(_alone, heavy_E, light_E, min(slots), spare)]
    most = min(_HOTTEST, len(load_E))
    costs.extend(partial(_together, heavy_E, light_E, slots_M, spare, hottest) for hottest in range(1, most + 1))
    least = float(load_E.sum() / len(slots))
    for cost in costs:
        if cost(least) > spare:
            least = _first_that(lambda time, cost=cost: cost(time) <= spare, least, float(load_E.sum()))
    return least


@compiled
def _alone(heavy_E: NDArray[np.float64], light_E: NDArray[np.float64], slots: int, spare: int, time: float) -> int:
    """The sum of c over all experts; more than `spare` if it is more."""
    total, most = 0, 0  # beyond `most` others a further one brings a rank's slot more than a rank's time
    while most < len(heavy_E) and slots * (light_E[most + 1] - light_E[most]) <= time:
        most += 1
    for expert in range(len(heavy_E)):
        used = -1
        fits = False
        while not fits and total + used <= spare:
            used += 1
            ranks = min(used + 1.0, (most + used + 2) / slots)
            others = min(round(max(0.0, slots * ranks - used - 2)), len(heavy_E) - 1)
            fits = heavy_E[expert] + light_E[others] <= ranks * time * (1 + 1e-12)
        total += used
        if used == 0 or total > spare:
            break
    return total


@compiled
def _together(
    heavy_E: NDArray[np.float64],
    light_E: NDArray[np.float64],
    slots_M: NDArray[np.int64],
    spare: int,
    hottest: int,
    time: float,
) -> int:
    """The fewest spare slots with which these experts take no longer than `time`, over all their divisions into
    components.
    """
    sets = 1 << hottest
    alone, best = np.full(sets, spare + 1), np.full(sets, spare + 1)
    for chosen in range(1, sets):
        load, size = 0.0, 0
        for expert in range(hottest):
            if chosen >> expert & 1:
                load += heavy_E[expert]
                size += 1
        for used in range(spare + 1):
            for ranks in range(1, min(used + 1, len(slots_M) - 1) + 1):
                others = min(max(0, slots_M[ranks] - used - size), len(heavy_E) - size)
                if load + light_E[others] <= ranks * time * (1 + 1e-12):
                    alone[chosen] = used
                    break
            if alone[chosen] <= spare:
                break
    best[0] = 0
    for chosen in range(1, sets):
        first = chosen & -chosen
        rest = chosen ^ first
        others = rest
        while True:
            best[chosen] = min(best[chosen], alone[others | first] + best[rest ^ others])
            if others == 0:
                break
            others = (others - 1) & rest
    return best[sets - 1]
