"""Loss spikes: steps whose loss or gradient norm lies far above those of the steps before. Pure.

A step is a spike if one of the two exceeds the mean of the last `WINDOW` steps by `SIGMAS` standard deviations. This is
the rule of OLMo-core's `SkipStepOptimizer` (https://github.com/allenai/OLMo-core). Every rank has the same history and
sums it exactly, so all decide alike. A rank that joins takes the history over with the last vote; state that is read
from storage comes without one.
"""

from __future__ import annotations

import math
from collections import deque

import numpy as np
from numpy.typing import NDArray

WINDOW = 128  # steps
SIGMAS = 6.0
FEWEST = WINDOW // 2  # steps before which nothing is a spike


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


def _exceeds(value: float, before: tuple[float, ...]) -> bool:
    """Whether the value lies far above those before; the sums are exact, whatever their order."""
    mean = math.fsum(before) / len(before)
    deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in before) / (len(before) - 1))
    return value > mean + SIGMAS * deviation
