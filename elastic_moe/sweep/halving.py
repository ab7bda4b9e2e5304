"""Asynchronous successive halving: trials that are behind at a rung end early, and leave their workers to others. Pure.

Rungs are numbers of steps, each `factor` times the one before. When a trial comes to a rung, its objective there is
compared with those of the trials that came before it, finished ones included. It goes on if it is among the best
1/factor of them. So nobody waits for others, and the first at a rung always goes on. This is the stopping form of ASHA
(Li et al., "A system for massively parallel hyperparameter tuning", arXiv 1810.05934); the paper's own form pauses
trials, and promotes them later.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field


def rungs_of(steps: int, first: int, factor: int) -> list[int]:
    """The rungs of a run of so many steps, in order; all lie before its end.

    Args:
        steps: of the run.
        first: steps of the first rung; 0: steps / factor^2.
        factor: of one rung over the one before.
    """
    rung = first or max(1, steps // factor**2)
    found: list[int] = []
    while rung < steps:
        found.append(rung)
        rung *= factor
    return found


@dataclass
class Rungs:
    """The objectives at each rung.

    Attributes:
        factor: one of so many trials goes on.
        larger: a larger objective is better.
        seen: objective by trial, by rung.
    """

    factor: int
    larger: bool = False
    seen: dict[int, dict[int, float]] = field(default_factory=dict[int, dict[int, float]])

    def note(self, trial: int, rung: int, value: float) -> None:
        """Keep the objective of a trial at a rung."""
        self.seen.setdefault(rung, {})[trial] = value

    def knows(self, trial: int, rung: int) -> bool:
        """Whether this trial was at this rung."""
        return trial in self.seen.get(rung, {})

    def behind(self, trial: int, rung: int) -> str:
        """A sentence about why a trial that is at this rung ends there; "" if it goes on."""
        values = self.seen[rung]
        own, place = values[trial], 1 + sum(self._better(other, values[trial]) for other in values.values())
        if not math.isfinite(own):
            return f"its objective is {own} at step {rung}"
        if place <= max(1, len(values) // self.factor):
            return ""
        return f"{place} of {len(values)} trials at step {rung}, of which one in {self.factor} goes on"

    def _better(self, one: float, other: float) -> bool:
        if not math.isfinite(one):
            return False
        return not math.isfinite(other) or (one > other if self.larger else one < other)


def due(rungs: Sequence[int], values: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """The rungs that a run has come to, with its objective there.

    Args:
        rungs: in order.
        values: step and objective, in order of steps.

    Returns:
        For each rung, the first objective at or after it.
    """
    found: list[tuple[int, float]] = []
    for rung in rungs:
        value = next((value for step, value in values if step >= rung), None)
        if value is not None:
            found.append((rung, value))
    return found
