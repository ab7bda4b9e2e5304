"""Rebalancing: a change of placement while the membership stays. A cost model on votes, so every rank decides alike.

Replicas are planned from the load of recent steps. Their weights are published after every update anyway, so a change
of replicas costs only the seconds of changing over, which are measured. A home moves together with its optimizer state:
its bytes must pay for themselves within `balance.payback_steps`. Each decision is recorded with its estimates; at the
next proposal, the measurements of the steps in between are added. Pure, numpy only.

Legend: L MoE layers, E experts, R ranks, U units. A layer's time is that of its slowest rank; 1 is the mean of the
ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elastic_moe.config.schema import BalanceConfig
from elastic_moe.control.look import Look, joined, layers_of, look_at
from elastic_moe.control.vote import VoteResult
from elastic_moe.plan.placement import Placement, Topology
from elastic_moe.plan.shares import Speeds
from elastic_moe.plan.state.ownership import Ownership, plan_ownership
from elastic_moe.plan.state.transfers import Transfer, plan_transfers
from elastic_moe.types import Unit, View

BACKWARD_RATIO = 2.0  # time of an expert's backward pass over that of its forward pass
PAST_WEIGHT = 0.8  # weight of the past in the averages of measured rates
MIN_GAIN = 0.005  # of the experts' time; a smaller gain is noise
LOOK_WORK = 1 << 17  # ranks times slots of the layers that one step looks at: a few milliseconds of planning
STATE_BYTES = 4  # per element of a unit's state, which is fp32

Estimate = dict[str, float | int]  # the keys are declared with the event `rebalanced`
LookArguments = tuple[NDArray[np.float64], Placement, Topology, list[int], list[float], int]


@dataclass(frozen=True)
class Change:
    """A new placement that is to replace the present one.

    Attributes:
        placement: the new placement.
        ownership: the new ownership if homes move, else None.
        transfers: state that moves to new homes and their mirrors.
        estimate: the reasons of the decision: seconds per step and in all, bytes, balance before and after.
        layers: MoE layers that change -> their times before and after.
    """

    placement: Placement
    ownership: Ownership | None
    transfers: tuple[Transfer, ...]
    estimate: Estimate
    layers: dict[int, tuple[float, float]]


@dataclass
class _Rates:
    """Averages of measurements, 0 before the first one.

    Attributes:
        row_s: seconds per row of an expert, forward and backward.
        bytes_per_s: bytes per second of the publication of weights.
        switch_s: seconds of a change of placement.
    """

    row_s: float = 0.0
    bytes_per_s: float = 0.0
    switch_s: float = 0.0

    def update(self, vote: VoteResult) -> None:
        """Add a step's measurements. A quantity that was not measured keeps its average."""
        measures = vote.measures
        if measures.expert_rows:
            self.row_s = _average(self.row_s, (1 + BACKWARD_RATIO) * measures.expert_s / measures.expert_rows)
        if measures.publish_bytes and measures.publish_s:
            self.bytes_per_s = _average(self.bytes_per_s, measures.publish_bytes / measures.publish_s)
        if measures.switch_s:
            self.switch_s = _average(self.switch_s, measures.switch_s / max(vote.world_size, 1))


def _average(old: float, new: float) -> float:
    """Exponential average that begins with the first value."""
    return new if not old else PAST_WEIGHT * old + (1 - PAST_WEIGHT) * new


@dataclass
class _Trial:
    """A change whose estimate is compared with measurements.

    Attributes:
        step: the vote on which the change was proposed.
        expected: its estimate.
        before_s: seconds of the experts in that step.
        after_s: seconds of the experts in each step since.
    """

    step: int
    expected: Estimate
    before_s: float
    after_s: list[float] = field(default_factory=list[float])

    def outcome(self, switch_s: float) -> dict[str, Any]:
        """The event `rebalanced`: the estimate beside the measurements."""
        gain_s = self.before_s - float(np.mean(self.after_s))
        measured = {"gain_s": gain_s, "switch_s": switch_s, "steps": len(self.after_s)}
        return {"event": "rebalanced", "step": self.step, "expected": self.expected, "measured": measured}


class Rebalancer:
    """Proposes changes of placement from the votes of one generation.

    A look at all layers takes longer than a step allows if the ranks are many. A step then begins a look at some
    layers, which goes on beside the next step and is taken there. The proposal follows when all layers have had their
    turn.

    Args:
        config: steps between proposals, and limits of what may move.
        view: the membership.
        units: all units.
        redundancy: mirrors per unit.
        placement: the first one.
        ownership: the first one.
        speeds: of the ranks at first; None for equal ones.

    Attributes:
        placement: the present one.
        ownership: the present one.
        finished: events `rebalanced` of changes with measurements, for the event log; the caller empties the list.
    """

    def __init__(
        self,
        config: BalanceConfig,
        view: View,
        units: Sequence[Unit],
        redundancy: int,
        placement: Placement,
        ownership: Ownership,
        speeds: Speeds | None = None,
    ) -> None:
        self._config, self._view, self._units, self._redundancy = config, view, units, redundancy
        self.placement, self.ownership = placement, ownership
        self._fixed = placement.everywhere  # no row travels, whatever the load
        self.finished: list[dict[str, Any]] = []
        self.use((speeds or Speeds.equal(view)).rows)
        self._slots = np.bincount(placement.rank_of_slot, minlength=view.world_size).tolist()
        self._rates, self._load_LE = _Rates(), np.zeros(0)
        self._proposals = 0  # times that a change was considered
        self._looks: list[Look] = []  # at the first layers, since the last proposal
        self._ahead: Future[Look] | None = None  # at the next ones, in a thread: compiled loops let others run
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="look")  # has no thread before its first look
        num_layers, num_slots = placement.expert_of_slot.shape
        self._layers_per_look = min(num_layers, max(1, LOOK_WORK // (view.world_size * num_slots)))
        steps = config.every_steps * -(-num_layers // self._layers_per_look)  # of a whole look
        self._home_every = max(1, config.home_every_steps // max(steps, 1))  # proposals
        self._unchanged_steps = 0  # since the last change
        self._trial: _Trial | None = None

    def use(self, speeds: Sequence[float]) -> None:
        """Plan for these speeds from now on; in rows, 0 for a rank that computes nothing."""
        self._speeds = list(speeds)
        nodes = tuple(member.node for member in self._view.members)
        self._topology = Topology(nodes, tuple(speeds), self.placement.in_nodes)

    def propose(self, vote: VoteResult) -> Change | None:
        """Add a step's vote to the averages, and return a change if one is due and pays."""
        config = self._config
        experts_s = self._observe(vote)
        if self._fixed or not config.every_steps or vote.step % config.every_steps:
            return None
        look = self._look()
        if look is None:
            return None
        self._end_trial()
        self._proposals += 1
        change = self._change_replicas(look)
        if look.homes is not None:
            replicas_L = look.now_L if change is None else look.replicas_L
            change = self._change_homes(look, replicas_L) or change
        if change is not None:
            self._unchanged_steps = 0
            self._trial = _Trial(vote.step, change.estimate, experts_s)
        return change

    def accept(self, change: Change) -> None:
        """Make the change's placement and ownership the present ones."""
        self.placement = change.placement
        self.ownership = change.ownership or self.ownership

    def _observe(self, vote: VoteResult) -> float:
        """Add a step's vote to the averages and to the trial. Returns the seconds of the step's experts."""
        self._rates.update(vote)
        keep = 0.5 ** (1 / self._config.window)
        self._load_LE = vote.load_LE if not self._load_LE.size else keep * self._load_LE + (1 - keep) * vote.load_LE
        experts_s = self._expert_seconds(vote.layer_time_L)
        if self._trial is not None:
            self._trial.after_s.append(experts_s)
        self._unchanged_steps += 1
        return experts_s

    def _end_trial(self) -> None:
        """Record the outcome of the trial, if there is one with measurements."""
        trial, self._trial = self._trial, None
        if trial is not None and trial.after_s:
            self.finished.append(trial.outcome(self._rates.switch_s))

    def _expert_seconds(self, time_L: NDArray[np.float64]) -> float:
        """Seconds of a step in the experts of each layer's slowest rank, summed over the layers."""
        mean_L = self._load_LE.sum(axis=1) / max(sum(self._speeds), 1e-9)
        return float(self._rates.row_s * (mean_L * time_L).sum())

    def _look(self) -> Look | None:
        """Look at the next layers. Returns the whole look when all layers have had their turn, else None."""
        num_layers = len(self._load_LE)
        if self._layers_per_look == num_layers:
            return look_at(*self._next_layers())
        if self._ahead is not None:
            self._looks.append(self._ahead.result())
            self._ahead = None
            if sum(len(look.now_L) for look in self._looks) == num_layers:
                looks, self._looks = self._looks, []
                return joined(looks)
        self._ahead = self._pool.submit(look_at, *self._next_layers())
        return None

    def _next_layers(self) -> LookArguments:
        """What the next look is at: the next layers, with the load and the placement of now."""
        first = sum(len(look.now_L) for look in self._looks)
        layers = slice(first, first + self._layers_per_look)
        moves = self._config.home_moves if (self._proposals + 1) % self._home_every == 0 else 0
        old = layers_of(self.placement, layers)
        return self._load_LE[layers], old, self._topology, self._slots, self._speeds, moves

    def _estimate(
        self, before_L: NDArray[np.float64], after_L: NDArray[np.float64], steps: int, moved_bytes: int
    ) -> Estimate:
        """Gain and cost of a change.

        Args:
            before_L: layers' times without it.
            after_L: layers' times with it.
            steps: steps for which it is expected to last.
            moved_bytes: bytes of state that the rank with the most of them receives.
        """
        moving_s = moved_bytes / self._rates.bytes_per_s if self._rates.bytes_per_s else 0.0
        return {
            "gain_s": self._expert_seconds(before_L) - self._expert_seconds(after_L),
            "steps": steps,
            "cost_s": self._rates.switch_s + moving_s,
            "moved_bytes": moved_bytes,
            "balance_before": float(1 / before_L.mean()),
            "balance_after": float(1 / after_L.mean()),
        }

    def _gain_exceeds_cost(self, estimate: Estimate, now_L: NDArray[np.float64]) -> bool:
        """Whether the gain is more than noise, and more than the cost over the expected steps."""
        if estimate["gain_s"] <= MIN_GAIN * self._expert_seconds(now_L):
            return False
        return estimate["gain_s"] * estimate["steps"] > estimate["cost_s"]

    def _change_replicas(self, look: Look) -> Change | None:
        """Other replicas, with all homes in place. They are expected to last as long as the present ones have."""
        now_L, placement = look.now_L, look.replicas
        steps = min(max(self._config.every_steps, self._unchanged_steps), self._config.payback_steps)
        estimate = self._estimate(now_L, look.replicas_L, steps, 0)
        if not self._gain_exceeds_cost(estimate, now_L):
            return None
        return Change(placement, None, (), estimate, self._changed_layers(now_L, placement))

    def _change_homes(self, look: Look, replicas_L: NDArray[np.float64]) -> Change | None:
        """Other homes and replicas. The gain over a change of replicas alone must pay for the moved bytes.

        Args:
            look: at all layers, their homes included.
            replicas_L: layers' times after a change of replicas alone.
        """
        now_L, placement, homes_L = look.now_L, look.homes, look.homes_L
        if placement is None or homes_L is None or np.array_equal(placement.home, self.placement.home):
            return None
        if not self._gain_exceeds_cost(self._estimate(replicas_L, homes_L, self._config.payback_steps, 0), now_L):
            return None  # not even without the bytes, which take longer to plan
        roles_RU = self.ownership.roles(self._view.world_size)
        ownership = plan_ownership(self._units, self._view, roles_RU, self._redundancy, placement.home)
        transfers = plan_transfers(roles_RU, ownership).transfers
        moved_bytes = self._most_received_bytes(transfers)
        estimate = self._estimate(replicas_L, homes_L, self._config.payback_steps, moved_bytes)
        if not self._gain_exceeds_cost(estimate, now_L):
            return None
        return Change(placement, ownership, transfers, estimate, self._changed_layers(now_L, placement))

    def _most_received_bytes(self, transfers: Sequence[Transfer]) -> int:
        """Bytes of state that the rank with the most of them receives."""
        bytes_R = np.zeros(self._view.world_size, dtype=np.int64)
        for transfer in transfers:
            bytes_R[transfer.dst] += STATE_BYTES * self._units[transfer.unit].state_numel
        return int(bytes_R.max())

    def _changed_layers(self, now_L: NDArray[np.float64], placement: Placement) -> dict[int, tuple[float, float]]:
        """MoE layers with other experts in their slots -> their times before and after."""
        assert placement.time_L is not None
        differs_L = (placement.expert_of_slot != self.placement.expert_of_slot).any(axis=1)
        return {
            int(layer): (round(float(now_L[layer]), 4), round(float(placement.time_L[layer]), 4))
            for layer in np.flatnonzero(differs_L)
        }


def moves_between(old: Placement | None, new: Placement) -> list[list[int]]:
    """The moves from one placement to another, as experts.jsonl has them; all of `new` if there is no old placement.

    Returns:
        Per move [layer, expert, rank, kind]. The kind is 1 for a copy that came to the rank, -1 for a copy that left
        it, 2 for a home that came.
    """
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
