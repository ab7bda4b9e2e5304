"""Shares: how many sequences of a batch each rank computes, for ranks of unequal speed. Pure.

The last rank to end is to end as early as possible. Giving each further sequence to the rank that would end first with
it does that, and is D'Hondt's method of apportionment. All sums are exact, so every processor finds the same shares.

Where rows travel between ranks, all wait for one another in every micro-batch. So a rank with a smaller share has as
many micro-batches as the others, and smaller ones: else its full micro-batches would hold the others up, and it would
rest at the end. With whole micro-batches (`elastic.reproducible`) that cannot be helped.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from elastic_moe.types import View

ROUND_COST = 1 / 8  # of a full micro-batch's time: what a micro-batch costs however few sequences it has


@dataclass(frozen=True, slots=True)
class Speeds:
    """Speeds of the ranks relative to their mean; 0 for a rank that computes nothing.

    Attributes:
        sequences: in the model's layers outside of the routed experts.
        rows: in the routed experts.
    """

    sequences: tuple[float, ...]
    rows: tuple[float, ...]

    @classmethod
    def equal(cls, view: View) -> Speeds:
        """All active ranks have one speed."""
        speeds = tuple(0.0 if member.draining else 1.0 for member in view.members)
        return cls(speeds, speeds)


@dataclass(frozen=True, slots=True)
class Batching:
    """How a batch is computed.

    Attributes:
        global_batch: sequences of a step.
        micro_batch: most sequences that a rank computes at once.
        whole: shares are whole micro-batches, so what is computed at once does not depend on who is there.
        together: the ranks wait for one another in every micro-batch.
    """

    global_batch: int
    micro_batch: int
    whole: bool = False
    together: bool = True

    def sizes(self, share: int, longest: int) -> list[int]:
        """Sequences in each micro-batch of a rank; all ranks have equally many micro-batches, and some may be empty.

        Args:
            share: sequences of the rank.
            longest: sequences of the rank that has the most.
        """
        rounds = -(-longest // self.micro_batch)
        if self.whole:
            return [max(0, min(self.micro_batch, share - k * self.micro_batch)) for k in range(rounds)]
        return [share // rounds + (k < share % rounds) for k in range(rounds)]


def fastest_split(units: int, speeds: Sequence[float], fixed: float = 0.0) -> list[int]:
    """Units of work per rank such that the last rank to end ends as early as possible; of ranks that are as good, the
    lower one gets more.

    Each rank with a speed above 0 gets a unit if there are enough, however slow it is: without one it could not be
    measured.

    Args:
        units: in all.
        speeds: of each rank, in any common unit, at least one above 0; 0 gives no unit.
        fixed: work of each rank that does not depend on its share, in units.
    """
    assert all(speed >= 0 for speed in speeds), "a speed must not be negative"
    free = [rank for rank, speed in enumerate(speeds) if speed > 0]
    assert free, "at least one rank must have a positive speed"
    counts, rest, one_each = [0] * len(speeds), units, units >= len(free)
    while True:
        total = math.fsum(speeds[rank] for rank in free)
        work = rest + fixed * len(free)
        few = [rank for rank in free if work * speeds[rank] < (1 + fixed) * total] if one_each else []
        if not few:
            break
        for rank in few:
            counts[rank] = 1
        rest -= len(few)
        free = [rank for rank in free if not counts[rank]]
    for rank in free:
        counts[rank] = max(0, int(work * (speeds[rank] / total) - fixed))
    ends = [((counts[rank] + 1 + fixed) / speeds[rank], rank) for rank in free]
    heapq.heapify(ends)
    for _ in range(units - sum(counts)):
        rank = ends[0][1]
        counts[rank] += 1
        heapq.heapreplace(ends, ((counts[rank] + 1 + fixed) / speeds[rank], rank))
    return counts


def plan_shares(batching: Batching, speeds: Sequence[float]) -> list[int]:
    """Sequences per rank, the fastest way to compute a batch: by single sequences or by whole micro-batches.

    Args:
        batching: how the batch is computed.
        speeds: of each rank; 0 for one that computes nothing.
    """
    size, batch = batching.micro_batch, batching.global_batch
    whole: list[int] = []
    left = batch
    for count in fastest_split(-(-batch // size), speeds):
        whole.append(min(count * size, left))
        left -= whole[-1]
    if batching.whole:
        return whole
    single = fastest_split(batch, speeds)
    second_R = np.array([1 / speed if speed else 0.0 for speed in speeds])
    fixed = ROUND_COST * size * -(-max(single) // size)
    candidates = (single, fastest_split(batch, speeds, fixed), whole)
    return min(candidates, key=lambda shares: seconds_of(batching, shares, second_R))


def seconds_of(batching: Batching, shares: Sequence[int], second_R: NDArray[np.float64]) -> float:
    """Time until the last rank ends.

    Args:
        batching: how the batch is computed.
        shares: sequences of each rank.
        second_R: time that each rank takes for a sequence.
    """
    longest, fixed = max(shares), ROUND_COST * batching.micro_batch
    sizes_of = {share: batching.sizes(share, longest) for share in set(shares)}  # few differ
    if batching.together:
        slowest_of = {share: max(second_R[np.equal(shares, share)].tolist()) for share in sizes_of}
        rounds = zip(*([(n + fixed * (n > 0)) * slowest_of[s] for n in sizes_of[s]] for s in sizes_of), strict=True)
        return math.fsum(max(times) for times in rounds)
    sums = {share: math.fsum(n + fixed * (n > 0) for n in sizes) for share, sizes in sizes_of.items()}
    return max(sums[share] * second for share, second in zip(shares, second_R.tolist(), strict=True))


def work_of(batching: Batching, shares: Sequence[int]) -> NDArray[np.float64]:
    """What each rank's time is in proportion to, in sequences: its micro-batches' costs of their own are counted in."""
    longest, fixed = max(shares), ROUND_COST * batching.micro_batch
    sums = {s: math.fsum(n + fixed * (n > 0) for n in batching.sizes(s, longest)) for s in set(shares)}
    return np.array([sums[share] for share in shares])


def slices_of(shares: Sequence[int]) -> list[slice]:
    """The slice of the batch that each rank computes, one after another."""
    ends = np.cumsum(shares).tolist()
    return [slice(end - share, end) for end, share in zip(ends, shares, strict=True)]
