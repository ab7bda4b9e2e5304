"""When experts move while the membership stays: a cost model over what the votes have shown, the same on every rank.

Replicas are re-planned from the load of recent steps; their weights are sent after every update anyway, so a change costs only the work of
changing over, which is measured. A home moves with its optimizer state, so its bytes are weighed against what balance it brings over
`balance.payback_steps`. Every decision is recorded with its estimates, and after it ran for a while with what then happened.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elastic_moe.config.schema import BalanceConfig
from elastic_moe.control.vote import VoteResult
from elastic_moe.plan.placement import Placement, Topology, plan_placement
from elastic_moe.plan.split import slowest_times
from elastic_moe.plan.state.ownership import Ownership, plan_ownership
from elastic_moe.plan.state.transfers import Transfer, plan_transfers
from elastic_moe.types import Unit, View

BACKWARD = 2.0  # an expert's backward pass takes this many times as long as its forward pass
KEEP = 0.8  # weight of the past in measured rates
LEAST_GAIN = 0.005  # of the experts' time: smaller gains are noise


@dataclass(frozen=True)
class Change:
    """A new placement that is to replace the present one.

    Attributes:
        placement: the new one.
        ownership: the new one where homes move, else None.
        transfers: of the homes that move, and their mirrors.
        estimate: what the decision rests on: seconds per step and in all, bytes, balance before and after.
        layers: MoE layers that change -> times of their slowest rank before and after, 1 is the mean.
    """

    placement: Placement
    ownership: Ownership | None
    transfers: tuple[Transfer, ...]
    estimate: dict[str, float | int]
    layers: dict[int, tuple[float, float]]


@dataclass
class _Rates:
    """Measured: seconds per expert row (forward and backward), publication bytes per second, seconds per change of placement."""

    row_s: float = 0.0
    bytes_per_s: float = 0.0
    switch_s: float = 0.0

    def update(self, vote: VoteResult) -> None:
        seen = vote.measures
        if seen.expert_rows:
            self.row_s = _mix(self.row_s, (1 + BACKWARD) * seen.expert_s / seen.expert_rows)
        if seen.publish_bytes and seen.publish_s:
            self.bytes_per_s = _mix(self.bytes_per_s, seen.publish_bytes / seen.publish_s)
        if seen.switch_s:
            self.switch_s = _mix(self.switch_s, seen.switch_s / max(vote.world_size, 1))


def _mix(old: float, new: float) -> float:
    return new if not old else KEEP * old + (1 - KEEP) * new


@dataclass
class _Watched:
    """A change under observation: its record, and the layers' times of the steps before and after it."""

    record: dict[str, Any]
    before: float
    after: list[float] = field(default_factory=list)


class Rebalancer:
    """Looks at each vote of one generation.

    Args:
        config: when to look, and what may move.
        view: the membership.
        units: all units.
        redundancy: mirrors per unit.
        placement, ownership: at the beginning.

    Attributes:
        placement, ownership: the present ones.
        finished: records of changes whose outcome is known, for the event log; taken away by the caller.
    """

    def __init__(
        self,
        config: BalanceConfig,
        view: View,
        units: Sequence[Unit],
        redundancy: int,
        placement: Placement,
        ownership: Ownership,
    ) -> None:
        self._config, self._view, self._units, self._redundancy = config, view, units, redundancy
        self.placement, self.ownership = placement, ownership
        self.finished: list[dict[str, Any]] = []
        self._speeds = [0.0 if m.draining else m.speed for m in view.members]
        self._topology = Topology(tuple(m.node for m in view.members), tuple(m.speed for m in view.members))
        self._slots = np.bincount(placement.rank_of_slot, minlength=view.world_size).tolist()
        self._rates, self._load_LE = _Rates(), np.zeros(0)
        self._looks, self._lasted = 0, 0
        self._watched: _Watched | None = None

    def propose(self, vote: VoteResult) -> Change | None:
        """Take in a step's vote, and say whether to change over now."""
        self._rates.update(vote)
        keep = 0.5 ** (1 / self._config.window)
        self._load_LE = vote.load_LE if not self._load_LE.size else keep * self._load_LE + (1 - keep) * vote.load_LE
        cost = self._expert_seconds(vote.layer_time_L)
        if self._watched is not None:
            self._watched.after.append(cost)
        self._lasted += 1
        every = self._config.every_steps
        if not every or vote.step % every:
            return None
        self._conclude()
        self._looks += 1
        now_L = slowest_times(self._load_LE, self.placement, self._speeds)
        change = self._replicas(now_L)
        if self._config.home_moves and self._looks % max(1, self._config.home_every_steps // every) == 0:
            best_L = now_L if change is None else self._times(change.placement)
            change = self._homes(now_L, best_L) or change
        if change is not None:
            self._lasted = 0
            self._watched = _Watched({"event": "rebalanced", "step": vote.step, "expected": change.estimate}, cost)
        return change

    def adopted(self, change: Change) -> None:
        """The change was carried out."""
        self.placement = change.placement
        self.ownership = change.ownership or self.ownership

    def _conclude(self) -> None:
        """Put what happened beside what was expected."""
        watched, self._watched = self._watched, None
        if watched is None or not watched.after:
            return
        after = float(np.mean(watched.after))
        measured = {"gain_s": watched.before - after, "switch_s": self._rates.switch_s, "steps": len(watched.after)}
        self.finished.append(watched.record | {"measured": measured})

    def _expert_seconds(self, time_L: NDArray[np.float64]) -> float:
        """Seconds that the slowest rank's experts take in a step, layer by layer."""
        mean_L = self._load_LE.sum(axis=1) / max(sum(self._speeds), 1e-9)
        return float(self._rates.row_s * (mean_L * time_L).sum())

    def _times(self, placement: Placement) -> NDArray[np.float64]:
        return slowest_times(self._load_LE, placement, self._speeds)

    def _estimate(
        self, now_L: NDArray[np.float64], then_L: NDArray[np.float64], steps: int, moved_bytes: int
    ) -> dict[str, float | int]:
        moving_s = moved_bytes / self._rates.bytes_per_s if self._rates.bytes_per_s else 0.0
        return {
            "gain_s": self._expert_seconds(now_L) - self._expert_seconds(then_L),
            "steps": steps,
            "cost_s": self._rates.switch_s + moving_s,
            "moved_bytes": moved_bytes,
            "balance_before": float(1 / now_L.mean()),
            "balance_after": float(1 / then_L.mean()),
        }

    def _pays(self, estimate: dict[str, float | int], now_L: NDArray[np.float64]) -> bool:
        enough = estimate["gain_s"] > LEAST_GAIN * self._expert_seconds(now_L)
        return enough and estimate["gain_s"] * estimate["steps"] > estimate["cost_s"]

    def _replicas(self, now_L: NDArray[np.float64]) -> Change | None:
        """Other replicas, homes as they are. They are taken to serve as long as the present ones have."""
        placement = plan_placement(self._load_LE, self._topology, self._slots, self.placement, home_moves=0)
        placement = _keep_unless_better(self.placement, placement, now_L)
        steps = min(max(self._config.every_steps, self._lasted), self._config.payback_steps)
        estimate = self._estimate(now_L, self._times(placement), steps, 0)
        if not self._pays(estimate, now_L):
            return None
        return Change(placement, None, (), estimate, self._changed(now_L, placement))

    def _changed(self, now_L: NDArray[np.float64], placement: Placement) -> dict[int, tuple[float, float]]:
        assert placement.time_L is not None
        differs_L = (placement.expert_of_slot != self.placement.expert_of_slot).any(axis=1)
        return {
            int(layer): (round(float(now_L[layer]), 4), round(float(placement.time_L[layer]), 4))
            for layer in np.flatnonzero(differs_L)
        }

    def _homes(self, now_L: NDArray[np.float64], best_L: NDArray[np.float64]) -> Change | None:
        """Homes too: what they bring beyond the replicas must pay for the bytes."""
        moves = self._config.home_moves
        placement = plan_placement(self._load_LE, self._topology, self._slots, self.placement, home_moves=moves)
        placement = _keep_unless_better(self.placement, placement, now_L)
        if np.array_equal(placement.home, self.placement.home):
            return None
        roles_RU = np.stack([self.ownership.role(rank) for rank in range(self._view.world_size)])
        ownership = plan_ownership(self._units, self._view, roles_RU, self._redundancy, placement.home)
        transfers = plan_transfers(roles_RU, ownership).transfers
        to_R = np.zeros(self._view.world_size, dtype=np.int64)
        for transfer in transfers:
            to_R[transfer.dst] += 4 * self._units[transfer.unit].state_numel
        estimate = self._estimate(best_L, self._times(placement), self._config.payback_steps, int(to_R.max()))
        if not self._pays(estimate, now_L):
            return None
        return Change(placement, ownership, transfers, estimate, self._changed(now_L, placement))


def _keep_unless_better(old: Placement, new: Placement, now_L: NDArray[np.float64]) -> Placement:
    """The new placement of those layers that it makes faster, the old one of the others."""
    assert new.time_L is not None
    better_L = new.time_L < now_L - 1e-3
    return Placement(
        np.where(better_L[:, None], new.expert_of_slot, old.expert_of_slot),
        new.rank_of_slot,
        np.where(better_L[:, None], new.home, old.home),
        new.node_of_rank,
        np.where(better_L, new.time_L, now_L),
    )


def moves_between(old: Placement | None, new: Placement) -> list[list[int]]:
    """[layer, expert, rank, what]: 1 a copy came, -1 a copy went, 2 the home came; of everything where there is no old one."""
    moves: list[list[int]] = []
    ranks = new.rank_of_slot.tolist()
    for layer, experts in enumerate(new.expert_of_slot.tolist()):
        have = {(e, r) for e, r in zip(experts, ranks, strict=True) if e >= 0}
        had: set[tuple[int, int]] = set()
        if old is not None:
            before = old.expert_of_slot[layer].tolist()
            had = {(e, r) for e, r in zip(before, old.rank_of_slot.tolist(), strict=True) if e >= 0}
        moves += [[layer, e, r, 1] for e, r in sorted(have - had)]
        moves += [[layer, e, r, -1] for e, r in sorted(had - have)]
        homes = new.home[layer].tolist()
        moves += [[layer, e, r, 2] for e, r in enumerate(homes) if old is None or old.home[layer, e] != r]
    return moves
