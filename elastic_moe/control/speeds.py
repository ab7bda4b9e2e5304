"""Measured speeds: which share of the work each rank gets, and who is a straggler. A pure function of the votes.

Every vote brings what each rank's own work took (`vote.Spent`). From them a `SpeedRule` estimates each rank's time per
sequence and per row (`meter.py`), and proposes other shares where a step would become clearly shorter. All ranks see
the same votes and compute the same numbers from them, so all decide alike, at the same step, and no message is needed
beyond the vote. A rank keeps its speed unless it differs by more than noise: on equal machines nothing moves.

A new view begins with the speeds that its members had (`agreed`). Legend: R active ranks, P phases.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from elastic_moe.control.meter import Floats, Meter, lower_median
from elastic_moe.control.vote import Ballot
from elastic_moe.plan.shares import Batching, Speeds, plan_shares, seconds_of, work_of
from elastic_moe.types import View

WARM_UP = 2  # first steps of a view: memory is new, and kernels are chosen
MIN_GAIN = 0.02  # of the time that the ranks compute; for less, shares stay
OTHER_WORK = 0.1  # relative change of a share from which on a rank's time per sequence is measured anew
STRAGGLES, RECOVERED = 1.5, 1.25  # times the others' time for equal work: from here on, and no longer
CONFIRMED = 2  # blocks in a row that must agree on who is a straggler
RECENT = 4  # blocks in which a straggler is looked for
PHASES = ("compute", "data", "exchange", "checkpoint")
SCALE = 1 << 20  # speeds travel as whole numbers of this part of the mean speed


class MemberSpeed(NamedTuple):
    """What a worker knows of its own speed, as it tells when it enters a view: whole numbers.

    Attributes:
        sequences, rows: its speeds in `SCALE`; 0 before its first view.
        straggles: 1 + the phase in which it is a straggler, 0 if it is none.
    """

    sequences: int = 0
    rows: int = 0
    straggles: int = 0


class Straggler(NamedTuple):
    """A rank becomes a straggler, or is one no longer.

    Attributes:
        rank: of the view.
        begins: whether it becomes one.
        factor: its time for equal work over that of the others.
        phase: of `PHASES`, in which it loses most.
    """

    rank: int
    begins: bool
    factor: float
    phase: str


@dataclass(frozen=True)
class Adjustment:
    """Other speeds and shares, from the next step on.

    Attributes:
        speeds: of the ranks.
        shares: sequences of each rank.
        before_s, after_s: seconds of the ranks' computing in a step, as estimated.
    """

    speeds: Speeds
    shares: list[int]
    before_s: float
    after_s: float


def agreed(view: View, known: Sequence[MemberSpeed]) -> Speeds:
    """The speeds with which a view begins. A newcomer is taken for the mean of its node, or else of all.

    Args:
        view: the membership.
        known: what each rank knows of itself.
    """
    active = view.active_ranks

    def of(values: Sequence[int]) -> tuple[float, ...]:
        told = [rank for rank in active if values[rank] > 0]
        by_node: dict[str, list[int]] = {}
        for rank in told:
            by_node.setdefault(view.members[rank].node, []).append(values[rank])
        mean = sum(values[rank] for rank in told) / len(told) if told else float(SCALE)
        speeds = [0.0] * view.world_size
        for rank in active:
            near = by_node.get(view.members[rank].node)
            speeds[rank] = float(values[rank]) or (sum(near) / len(near) if near else mean)
        return _relative(speeds)

    return Speeds(of([one.sequences for one in known]), of([one.rows for one in known]))


class SpeedRule:
    """The rule in one view.

    Args:
        view: the membership.
        batching: how a batch is computed.
        speeds: with which the view begins.
        adapts: whether it proposes other shares; it looks for stragglers in any case.
        straggles: `MemberSpeed.straggles` of each rank.

    Attributes:
        speeds: that are in use.
        shares: sequences of each rank.
        news: who became a straggler, or is one no longer; the caller empties the list.
    """

    def __init__(
        self, view: View, batching: Batching, speeds: Speeds, adapts: bool = True, straggles: Sequence[int] = ()
    ) -> None:
        self._active, self._batching, self._adapts = np.array(view.active_ranks), batching, adapts
        self.speeds, self.shares = speeds, plan_shares(batching, speeds.sequences)
        self.news: list[Straggler] = []
        self._straggles = {r: straggles[r] - 1 for r in view.active_ranks if straggles and straggles[r]}
        self._suspects: dict[int, int] = {}  # rank -> blocks in a row that contradict what is said of it
        self._work_R = work_of(batching, self.shares)[self._active]
        ones_R = np.ones(len(self._active))
        self._sequence, self._row = (Meter(1 / np.array(s)[self._active]) for s in (speeds.sequences, speeds.rows))
        self._data, self._exchange = Meter(ones_R), Meter(ones_R)
        self._rows = 0.0  # of the last step
        self._saves: deque[Floats] = deque(maxlen=2)  # seconds of a checkpoint, spread over the steps before it
        self._skip, self._since_save = WARM_UP, 0

    def member(self, rank: int) -> MemberSpeed:
        """What this rank is to know of itself."""
        sequences, rows = (round(speeds[rank] * SCALE) for speeds in (self.speeds.sequences, self.speeds.rows))
        return MemberSpeed(sequences, rows, 1 + self._straggles.get(rank, -1))

    def resize(self, sequences: int) -> None:
        """The next vote is of a batch of so many sequences. Costs are per sequence, so what is measured stays."""
        if sequences != self._batching.global_batch:
            self._batching = replace(self._batching, global_batch=sequences)
            self.shares = plan_shares(self._batching, self.speeds.sequences)
            self._work_R = work_of(self._batching, self.shares)[self._active]
            self._drop_blocks()

    def observe(self, total: Ballot) -> Adjustment | None:
        """Take a step's vote in. Returns other shares when they pay; they are to be used from the next step on."""
        if len(self._active) < 2:
            return None
        spent = total.spent
        self._since_save += 1
        if spent.checkpoint_s_R.any():
            self._saves.append(spent.checkpoint_s_R[self._active] / self._since_save)
            self._since_save = 0
        if self._skip:
            self._skip -= 1
            return None
        rows_R = total.expert_rows_R[self._active]
        with np.errstate(divide="ignore", invalid="ignore"):
            self._sequence.add(spent.dense_s_R[self._active] / self._work_R)
            if self._batching.together:
                self._row.add(spent.expert_s_R[self._active] / rows_R)
        self._data.add(spent.data_s_R[self._active])
        if not self._exchange.add(spent.exchange_s_R[self._active]):
            return None
        self._rows = math.fsum(rows_R.tolist())
        self._find_stragglers()
        return self._adjust() if self._adapts else None

    def _adjust(self) -> Adjustment | None:
        """Other speeds and shares, if a step becomes shorter by enough."""
        sequence_R = self._sequence.differing()
        row_R = self._row.differing() if self._batching.together else None
        if sequence_R is None and row_R is None:
            return None
        now_s, now_rows_s = self._step_s(self.shares, sequence_R), self._rows_s(self._row.cost_R, row_R)
        shares, after_s, rows_after_s = self.shares, now_s, now_rows_s
        sequences, rows = self.speeds.sequences, self.speeds.rows
        if sequence_R is not None:
            sequences = self._spread(sequence_R)
            shares = plan_shares(self._batching, sequences)
            after_s = self._step_s(shares, sequence_R)
        if row_R is not None:
            rows = self._spread(row_R)
            rows_after_s = self._rows_s(row_R, row_R)
        least_s = MIN_GAIN * (now_s + now_rows_s)
        others = sequence_R is not None and now_s - after_s > least_s
        other_rows = row_R is not None and now_rows_s - rows_after_s > least_s
        if not others and not other_rows:
            return None
        if others and sequence_R is not None:
            before_R = self._work_R
            self._work_R = work_of(self._batching, shares)[self._active]
            self._sequence.accept(sequence_R, np.abs(self._work_R / before_R - 1) > OTHER_WORK)
        if other_rows and row_R is not None:
            self._row.accept(row_R, np.abs(row_R / self._row.cost_R - 1) > OTHER_WORK)
        sequences = sequences if others else self.speeds.sequences
        rows = (rows if other_rows else self.speeds.rows) if self._batching.together else sequences
        self.speeds, self.shares = Speeds(sequences, rows), shares if others else self.shares
        self._drop_blocks()
        self._skip = 1
        gain_s = (now_s - after_s if others else 0.0) + (now_rows_s - rows_after_s if other_rows else 0.0)
        return Adjustment(self.speeds, self.shares, now_s + now_rows_s, now_s + now_rows_s - gain_s)

    def _drop_blocks(self) -> None:
        """The steps since the last blocks were of other work."""
        for meter in (self._sequence, self._row, self._data, self._exchange):
            meter.drop_block()

    def _step_s(self, shares: Sequence[int], cost_R: Floats | None) -> float:
        """Seconds of the layers outside of the experts; `cost_R`: None for the costs in use."""
        everyone_R = np.zeros(len(shares))
        everyone_R[self._active] = self._sequence.cost_R if cost_R is None else cost_R
        return seconds_of(self._batching, shares, everyone_R)

    def _rows_s(self, used_R: Floats, cost_R: Floats | None) -> float:
        """Seconds of the experts, with rows divided for the costs `used_R`; `cost_R`: None for the costs in use."""
        if not self._batching.together:
            return 0.0
        slowest = max(((used_R if cost_R is None else cost_R) / used_R).tolist())
        return self._rows * slowest / math.fsum((1 / used_R).tolist())

    def _spread(self, cost_R: Floats) -> tuple[float, ...]:
        """Speeds of all ranks from the costs of the active ones."""
        speeds = [0.0] * len(self.shares)
        for rank, cost in zip(self._active.tolist(), cost_R.tolist(), strict=True):
            speeds[rank] = 1 / cost
        return _relative(speeds)

    def _find_stragglers(self) -> None:
        """Compare what the ranks need for equal work, phase by phase."""
        ranks = len(self._active)
        compute_R = self._sequence.mean(RECENT) * (math.fsum(self._work_R.tolist()) / ranks)
        if self._batching.together:
            compute_R = compute_R + np.nan_to_num(self._row.mean(RECENT)) * (self._rows / ranks)
        saves = list(self._saves)
        save_R = np.minimum(*saves) if len(saves) == 2 else np.zeros(ranks)
        phases_PR = np.nan_to_num([compute_R, self._data.mean(RECENT), self._exchange.mean(RECENT), save_R])
        total_R = ((phases_PR[0] + phases_PR[1]) + phases_PR[2]) + phases_PR[3]
        factor_R = total_R / max(lower_median(total_R), 1e-12)
        says = set(self._active[factor_R >= STRAGGLES].tolist())
        says |= self._straggles.keys() & set(self._active[factor_R >= RECOVERED].tolist())
        wrong = says.symmetric_difference(self._straggles)
        self._suspects = {rank: self._suspects.get(rank, 0) + 1 for rank in sorted(wrong)}
        for rank in [rank for rank, blocks in self._suspects.items() if blocks >= CONFIRMED]:
            del self._suspects[rank]
            at = int(np.searchsorted(self._active, rank))
            begins = rank not in self._straggles
            if begins:
                lost_P = [float(phase_R[at]) - lower_median(phase_R) for phase_R in phases_PR]
                self._straggles[rank] = lost_P.index(max(lost_P))
            phase = self._straggles[rank] if begins else self._straggles.pop(rank)
            self.news.append(Straggler(rank, begins, float(factor_R[at]), PHASES[phase]))


def _relative(speeds: Sequence[float]) -> tuple[float, ...]:
    """Speeds over the mean of those above 0."""
    mean = math.fsum(speeds) / max(1, sum(speed > 0 for speed in speeds))
    return tuple(speed / mean for speed in speeds)
