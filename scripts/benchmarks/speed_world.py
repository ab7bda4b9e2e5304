"""Ranks of given speeds in virtual time, whose shares follow `control.speeds.SpeedRule`. No process, no clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from elastic_moe.control.speeds import Adjustment, SpeedRule
from elastic_moe.control.vote import Ballot, Measures, Spent
from elastic_moe.plan.shares import Batching, Speeds, plan_shares, seconds_of, work_of
from elastic_moe.types import Member, ModelStats, View

Floats = NDArray[np.float64]
EXPERTS_PART = 0.5  # of the time of an average rank that its experts take, where rows travel


def view_of(ranks: int) -> View:
    """Four ranks on each node."""
    return View(1, tuple(Member(f"w{r}", f"n{r // 4}", r) for r in range(ranks)))


def ballots(spent: dict[str, Floats], rows_R: Floats) -> Ballot:
    """The sum of the ballots of a step in which the ranks took these times."""
    measures = Measures(0, 0, 0, 0, 0, 0)
    return Ballot(
        ce_sum=0.0, tokens=1, grad_square=0.0, nonfinite=0.0, reconfigure=0.0, stop=0.0, save=0.0,
        stats=ModelStats(), measures=measures, load_LE=np.zeros((1, 1)), nonfinite_R=np.zeros(len(rows_R)),
        expert_rows_R=rows_R, slowest_LN=np.zeros((1, 1)), spent=Spent(**spent),
    )  # fmt: skip


@dataclass
class SpeedWorld:
    """A run in virtual time.

    Args:
        speed_R: true speed of each rank.
        batching: how a batch is computed.
        noise: relative standard deviation of a rank's time in a step.
        lasting: share of a step's noise that the next one keeps (autoregressive), below 1.
        fixed: time of a step that does not shrink with the share, over that of an even share.
        seed: of the noise.

    Attributes:
        step: made so far.
        changes: step -> change of shares.
        rule_s: seconds of real time that the rule took in each step.
    """

    speed_R: Floats
    batching: Batching
    noise: float = 0.1
    lasting: float = 0.0
    fixed: float = 0.0
    seed: int = 0
    step: int = 0
    changes: dict[int, Adjustment] = field(default_factory=dict)
    rule_s: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._random = np.random.default_rng(self.seed)
        self._noise_2R = np.zeros((2, len(self.speed_R)))
        self.view = view_of(len(self.speed_R))
        self.rule = SpeedRule(self.view, self.batching, Speeds.equal(self.view))

    def run(self, steps: int, at_step: Callable[[int], None] = lambda step: None) -> None:
        """Make steps; `at_step` is called before each."""
        ranks, mean_work = len(self.speed_R), self.batching.global_batch / len(self.speed_R)
        kept, new = self.lasting, np.sqrt(1 - self.lasting**2)
        for _ in range(steps):
            self.step += 1
            at_step(self.step)
            self._noise_2R = kept * self._noise_2R + new * self._random.standard_normal((2, ranks))
            slow_2R = np.maximum(1 + self.noise * self._noise_2R, 0.3) / self.speed_R
            dense_R = (work_of(self.batching, self.rule.shares) / mean_work + self.fixed) * slow_2R[0]
            rows_R = 1000.0 * ranks * np.array(self.rule.speeds.rows) / sum(self.rule.speeds.rows)
            part = EXPERTS_PART if self.batching.together else 0.0
            zeros = np.zeros(ranks)
            spent = {"dense_s_R": (1 - part) * dense_R, "expert_s_R": part * rows_R / 1000 * slow_2R[1]}
            spent |= {"data_s_R": zeros, "exchange_s_R": zeros, "checkpoint_s_R": zeros}
            total = ballots(spent, rows_R)
            began_s = time.perf_counter()
            change = self.rule.observe(total)
            self.rule_s.append(time.perf_counter() - began_s)
            if change is not None:
                self.changes[self.step] = change

    def efficiency(self) -> float:
        """Time that ranks of these speeds would take without rounding, over that of the present shares, noise aside."""
        return self._efficiency(self.rule.shares)

    def even_efficiency(self) -> float:
        """The same with even shares."""
        return self._efficiency(plan_shares(self.batching, Speeds.equal(self.view).sequences))

    def _efficiency(self, shares: list[int]) -> float:
        ideal_s = work_of(self.batching, shares).sum() / self.speed_R.sum()
        return float(ideal_s / seconds_of(self.batching, shares, 1 / self.speed_R))
