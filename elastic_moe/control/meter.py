"""Estimates of what each rank needs for a piece of work, from noisy times of steps. Pure, numpy only.

The steps come in blocks of four, of which the mean of the middle two counts, so a single outlier does not. After each
block it is asked: does a rank differ from the cost in use in the last block, in the last two, the last four, or in all?
The last block shows a large change at once, all blocks show a small one in time. A difference counts only beyond
the noise of such a mean, which the spread in and between the blocks tells. So noise changes nothing, and a change that
was made from few steps is refined twice, when there are four and sixteen times as many.

Ranks whose costs agree within the noise get the same cost: the mean of many is better than each of them.

Sums are made in a fixed order of single operations, so all processors find the same numbers. Legend: R ranks, N blocks.
"""

from __future__ import annotations

import math
from collections import deque

import numpy as np
from numpy.typing import NDArray

BLOCK = 4  # steps
BLOCKS = 16  # that an estimate rests on at most
SCALES = (1, 2, 4, BLOCKS)  # blocks in which a difference is looked for
MIN_DIFFERENCE = 0.05  # less is no difference
ROUGH = 2.4  # over the number of steps: a smaller difference is not believed, for few steps do not show the noise
SIGMAS = 6.0  # standard deviations of an estimate; less is noise
RANGE = 2.06  # mean range of four normal values, in standard deviations
MIDDLE = 1.1  # standard deviation of the mean of the middle half of normal values over that of the mean
REFINE = 4  # times as many steps give an estimate that is twice as good
MERGE = 3.0  # standard deviations within which costs count as equal

Floats = NDArray[np.float64]


class Meter:
    """The costs of one kind of work.

    Args:
        cost_R: relative cost in use, of each rank.

    Attributes:
        cost_R: the cost in use, in measured units after the first block.
    """

    def __init__(self, cost_R: Floats) -> None:
        self.cost_R = cost_R
        self._steps: list[Floats] = []
        self._mids: deque[Floats] = deque(maxlen=BLOCKS)
        self._sigmas: deque[Floats] = deque(maxlen=BLOCKS)
        self._blocks_R = np.zeros(len(cost_R), dtype=np.int64)  # that count for each rank
        self._found_R = np.zeros(len(cost_R), dtype=np.int64)  # blocks that show the last difference; 0: there is none
        self._basis_R = np.full(len(cost_R), np.inf)  # blocks that the cost in use rests on; inf: it is not refined

    def add(self, value_R: Floats) -> bool:
        """A step's costs; not finite where there was no work. Returns whether a block is complete."""
        self._steps.append(value_R)
        if len(self._steps) < BLOCK:
            return False
        sorted_4R = np.sort(np.stack(self._steps), axis=0)
        self._steps.clear()
        mid_R = (sorted_4R[1] + sorted_4R[2]) / 2
        self._mids.append(mid_R)
        self._sigmas.append((sorted_4R[3] - sorted_4R[0]) / RANGE)
        self._blocks_R = np.where(np.isfinite(mid_R) & (mid_R > 0), np.minimum(self._blocks_R + 1, BLOCKS), 0)
        return True

    def drop_block(self) -> None:
        """The steps since the last block do not count."""
        self._steps.clear()

    def mean(self, blocks: int) -> Floats:
        """Mean cost of each rank in so many of the last blocks, fewer where fewer count; nan where there is none."""
        return _middle(np.stack(self._mids), np.minimum(self._blocks_R, blocks))

    def differing(self) -> Floats | None:
        """Costs of which some differ from those in use by more than noise, or are better known; None if none does.

        The scale of the costs in use is brought to what is measured.
        """
        measured_R = self._blocks_R > 0
        if not measured_R.any():
            return None
        mids_NR = np.stack(self._mids)
        all_R = _middle(mids_NR, self._blocks_R)
        ratio_R = all_R[measured_R] / self.cost_R[measured_R]
        self.cost_R = self.cost_R * lower_median(ratio_R)
        noise_R, between_R = self._noise(mids_NR, all_R)
        new_R, blocks_R = self.cost_R.copy(), np.zeros(len(all_R), dtype=np.int64)
        for scale in reversed(SCALES):  # the shortest one that shows a difference counts
            count_R = np.minimum(self._blocks_R, scale)
            mean_R = all_R if scale == BLOCKS else _middle(mids_NR, count_R)
            with np.errstate(divide="ignore", invalid="ignore"):
                steps_R = BLOCK * count_R
                error_R = MIDDLE * np.maximum(noise_R / np.sqrt(steps_R), between_R / np.sqrt(count_R))
                limit_R = np.maximum(MIN_DIFFERENCE, np.maximum(SIGMAS * error_R, ROUGH / steps_R))
                away_R = np.maximum(mean_R / self.cost_R, self.cost_R / mean_R) - 1
            if scale == BLOCKS:
                refined_R = (count_R >= REFINE * self._basis_R) & (away_R > error_R)
                new_R, blocks_R = np.where(refined_R, mean_R, new_R), np.where(refined_R, count_R, blocks_R)
            found_R = measured_R & (away_R > limit_R)
            new_R, blocks_R = np.where(found_R, mean_R, new_R), np.where(found_R, count_R, blocks_R)
        if not blocks_R.any():
            return None
        self._found_R = blocks_R
        with np.errstate(divide="ignore", invalid="ignore"):
            error_R = MIDDLE * np.maximum(noise_R / np.sqrt(BLOCK * blocks_R), between_R / np.sqrt(blocks_R))
        return _merged(self.cost_R, new_R, blocks_R > 0, MERGE * error_R)

    def accept(self, new_R: Floats, remeasured_R: NDArray[np.bool_]) -> None:
        """Use what `differing` returned.

        Args:
            new_R: the costs.
            remeasured_R: ranks that are to be measured anew, since they get other work.
        """
        changed_R = self._found_R > 0
        alone_R = changed_R & ~np.isin(new_R, self.cost_R)
        self._basis_R = np.where(changed_R, np.where(alone_R, self._found_R, np.inf), self._basis_R)
        self._blocks_R = np.where(changed_R, self._found_R, self._blocks_R)
        self.cost_R = new_R
        self.measure_anew(remeasured_R)

    def measure_anew(self, ranks_R: NDArray[np.bool_]) -> None:
        """The blocks of these ranks do not count any more."""
        self._blocks_R = np.where(ranks_R, 0, self._blocks_R)
        self.drop_block()

    def _noise(self, mids_NR: Floats, mean_R: Floats) -> tuple[Floats, Floats]:
        """Relative standard deviations of each rank's steps, and of its blocks. That of most ranks is the least."""
        with np.errstate(divide="ignore", invalid="ignore"):
            steps_R = np.nan_to_num(_middle(np.stack(self._sigmas), self._blocks_R) / mean_R, posinf=0.0)
            away_NR = np.abs(mids_NR / mean_R - 1)
        between_R = 1.48 * np.nan_to_num(_middle(away_NR, self._blocks_R), posinf=0.0)
        between_R = np.where(self._blocks_R >= 4, between_R, 0.0)  # of fewer blocks it says nothing
        return np.maximum(steps_R, lower_median(steps_R)), np.maximum(between_R, lower_median(between_R))


def lower_median(values_R: Floats) -> float:
    """The middle value, of two the lower one: of the costs of two ranks, that of the faster."""
    return float(np.sort(values_R)[(len(values_R) - 1) // 2])


def _middle(values_NR: Floats, count_R: NDArray[np.int64]) -> Floats:
    """Mean of the middle half of the last `count_R` values of each rank; nan of none."""
    blocks, ranks = values_NR.shape
    count_R = np.minimum(count_R, blocks)
    first_R, number_N1 = blocks - count_R, np.arange(blocks, dtype=np.int64)[:, None]
    sorted_NR = np.sort(np.where(number_N1 >= first_R, values_NR, np.inf), axis=0)
    sums_NR = np.cumsum(np.where(np.isfinite(sorted_NR), sorted_NR, 0.0), axis=0)  # one by one, on any processor
    low_R, high_R = count_R // 4, count_R - count_R // 4  # the middle ones are low_R up to, not with, high_R
    at_R = np.arange(ranks, dtype=np.int64)
    sum_R = sums_NR[np.maximum(high_R - 1, 0), at_R] - np.where(low_R > 0, sums_NR[np.maximum(low_R - 1, 0), at_R], 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(count_R > 0, sum_R / (high_R - low_R), np.nan)


def _merged(cost_R: Floats, new_R: Floats, changed_R: NDArray[np.bool_], limit_R: Floats) -> Floats:
    """The new costs; those that agree within their limits are equal, also to that of a rank that keeps its cost."""
    merged_R = new_R.copy()
    kept = np.unique(cost_R[~changed_R])
    order = np.flatnonzero(changed_R)[np.argsort(new_R[changed_R], kind="stable")].tolist()
    group: list[int] = []
    for rank in [*order, -1]:
        if group and (rank < 0 or new_R[rank] > new_R[group[0]] * (1 + 2 * limit_R[rank])):
            mean = math.fsum(new_R[group].tolist()) / len(group)
            near = kept[np.abs(kept / mean - 1).argsort(kind="stable")[:1]].tolist()
            limit = max(MIN_DIFFERENCE, float(limit_R[group].min()))
            merged_R[group] = near[0] if near and abs(near[0] / mean - 1) <= limit else mean
            group = []
        if rank >= 0:
            group.append(rank)
    return merged_R
