"""Loss spikes: steps whose loss or gradient norm lies far above those of the steps before. Pure.

A step is a spike if one of the two exceeds the mean of the last `WINDOW` steps by `SIGMAS` standard deviations. This is
the rule of OLMo-core's `SkipStepOptimizer` (https://github.com/allenai/OLMo-core). Every rank has the same history and
sums it exactly, so all decide alike. A rank that joins takes the history over with the last vote; state that is read
from storage comes without one.

With `optim.spike=rollback` the run goes back to a checkpoint and leaves out the batches from there to the spike's
(PaLM, https://arxiv.org/abs/2204.02311, section 5.1). `DataPosition` says which batch a step computes.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

WINDOW = 128  # steps
SIGMAS = 6.0
FEWEST = WINDOW // 2  # steps before which nothing is a spike
ROLLBACKS = 3  # times that a run may go back without coming `FEWEST` steps beyond its latest spike


@dataclass(frozen=True, slots=True)
class DataPosition:
    """Which batch of the endless sequence of batches a step computes.

    Attributes:
        skipped: batches that were left out so far.
        go_on_at: the first batch after a spike, if the run has yet to go back because of it; else -1.
    """

    skipped: int = 0
    go_on_at: int = -1

    def batch_of(self, step: int) -> int:
        """The batch, 0, 1, 2, ..., of a step, 1, 2, 3, ..."""
        return step - 1 + self.skipped

    def after_spike(self, step: int) -> DataPosition:
        """This step was a spike, and the run is to go back."""
        return DataPosition(self.skipped, self.batch_of(step) + 1)

    def back_at(self, step: int, skipped: int) -> DataPosition:
        """The run goes on from the state of this step, which was reached with so many batches left out."""
        return DataPosition(max(skipped, self.go_on_at - step))

    @staticmethod
    def agreed(positions: Sequence[DataPosition]) -> DataPosition:
        """The position of ranks that share a timeline: one of them may not know of the spike yet."""
        return DataPosition(max(p.skipped for p in positions), max(p.go_on_at for p in positions))


class SpikeGuard:
    """The history of one run."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, float]] = deque(maxlen=WINDOW)

    def is_spike(self, loss: float, grad_norm: float) -> bool:
        """Whether a step with these values is a spike; both are finite."""
        if len(self._seen) < FEWEST:
            return False
        losses, norms = zip(*self._seen, strict=True)
        return _exceeds(loss, losses) or _exceeds(grad_norm, norms)

    def add(self, loss: float, grad_norm: float) -> None:
        """A step was committed. Spikes count too, so that a lasting change of the data becomes the new measure."""
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self._seen.append((loss, grad_norm))

    def pack(self) -> NDArray[np.float64]:
        """The history as a vector of a fixed size."""
        packed = np.full((WINDOW, 2), math.nan)
        if self._seen:
            packed[: len(self._seen)] = list(self._seen)
        return packed.ravel()

    def load(self, packed: NDArray[np.float64]) -> None:
        """Take over the history that another rank has packed."""
        self.clear()
        for loss, grad_norm in packed.reshape(WINDOW, 2).tolist():
            self.add(loss, grad_norm)

    def clear(self) -> None:
        self._seen.clear()


class RollbackCount:
    """How often a run has gone back because of spikes without getting on since.

    Steps that are only made again do not count: with rare checkpoints they are many, however hopeless the run is.
    """

    def __init__(self) -> None:
        self._count, self._spiked = 0, -1

    def after_update(self, step: int) -> None:
        """A step was committed with its update."""
        if step >= self._spiked + FEWEST:
            self._count = 0

    def after_spike(self, step: int) -> bool:
        """A step was a spike, and the run is to go back. Returns whether it still may."""
        self._count, self._spiked = self._count + 1, max(self._spiked, step)
        return self._count <= ROLLBACKS


def _exceeds(value: float, before: tuple[float, ...]) -> bool:
    """Whether the value lies far above those before; the sums are exact, whatever their order."""
    mean = math.fsum(before) / len(before)
    deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in before) / (len(before) - 1))
    return value > mean + SIGMAS * deviation
