"""The vote that ends a step: each quantity that the ranks agree on, declared once. Pure, numpy only.

Every rank fills in a `Ballot`. An all-reduce sums the ballots; completing it is the commit (DESIGN.md section 3). Each
rank makes the same `VoteResult` from the sums. A rank that missed the sums receives the result by a broadcast.

The fields of these dataclasses are the layout of both messages: `pack` and `unpack` follow their order. A field is a
number (float, int or bool), another dataclass, or an array whose axes are named by letters.

Axes: L MoE layers, E experts, R ranks of the view, N nodes between which no rows travel; 1 where they do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from typing import Any, NamedTuple, TypeVar, cast, get_type_hints

import numpy as np
from numpy.typing import NDArray

from elastic_moe.control.goodput import idle_of_step
from elastic_moe.plan.shares import Speeds
from elastic_moe.types import ModelStats, View

T = TypeVar("T")


def _array(axes: str) -> Any:
    """A field that holds a float64 array with these axes."""
    return field(metadata={"axes": axes})


@dataclass(frozen=True, slots=True)
class Measures:
    """Costs of the expert layers, for the rebalancing cost model. In a ballot: of this rank; in a result: summed.

    Attributes:
        expert_s: seconds of the experts' forward passes in this step.
        expert_rows: rows that those passes computed.
        cross_node_rows: rows that were sent to another node.
        publish_s: seconds of the last publication of weights.
        publish_bytes: bytes that it brought to the rank from others.
        switch_s: seconds of the change of placement before this step, 0 if there was none.
        wait_s: seconds that the rank waited in collectives up to the vote.
    """

    expert_s: float
    expert_rows: float
    cross_node_rows: float
    publish_s: float
    publish_bytes: float
    switch_s: float
    wait_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """Seconds of each rank's own work in the step up to the vote, waits for others left out. A rank fills in its own
    elements.

    Attributes:
        dense_s_R: forward and backward passes, but for the routed experts where rows travel to them.
        expert_s_R: both passes of the routed experts where rows travel to them, else 0.
        data_s_R: reading the micro-batches.
        exchange_s_R: adding up, packing and unpacking gradients, for the primaries and for the mirrors.
        checkpoint_s_R: since the vote before, in which training stood still for a checkpoint.
    """

    dense_s_R: NDArray[np.float64] = _array("R")
    expert_s_R: NDArray[np.float64] = _array("R")
    data_s_R: NDArray[np.float64] = _array("R")
    exchange_s_R: NDArray[np.float64] = _array("R")
    checkpoint_s_R: NDArray[np.float64] = _array("R")

    @property
    def busy_s_R(self) -> NDArray[np.float64]:
        """Seconds of the step in which each rank worked up to the vote."""
        return self.dense_s_R + self.expert_s_R + self.data_s_R + self.exchange_s_R


@dataclass(frozen=True, slots=True, kw_only=True)
class Sums:
    """Quantities that are summed over the ranks. They are in a ballot and in the result.

    Attributes:
        ce_sum: cross-entropy summed over tokens, in nats.
        tokens: number of target tokens.
        grad_square: sum of squares of the reduced gradients, over the units whose primary is the rank. 0 if not finite.
        nonfinite: ranks whose loss, own gradients or reduced gradients are not finite.
        reconfigure: ranks that know of a newer view.
        stop: ranks that were asked to stop.
        save: ranks that want a checkpoint of this step.
        stats: statistics of the model.
        measures: costs of the expert layers.
        load_LE: tokens routed to each expert of each MoE layer.
    """

    ce_sum: float
    tokens: float
    grad_square: float
    nonfinite: float
    reconfigure: float
    stop: float
    save: float
    stats: ModelStats
    measures: Measures
    load_LE: NDArray[np.float64] = _array("LE")

    @property
    def loss(self) -> float:
        """Mean cross-entropy per token."""
        return self.ce_sum / max(self.tokens, 1.0)

    @property
    def finite(self) -> bool:
        """Whether the gradients of every rank are finite. If not, the step is committed without an update."""
        return self.nonfinite == 0

    @property
    def grad_norm(self) -> float:
        """Global norm of the mean loss's gradient before clipping; rounding to fp32 hides the order of the fp64 sum."""
        return float(np.float32(np.sqrt(self.grad_square) / max(self.tokens, 1.0)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Ballot(Sums):
    """One rank's contribution to the vote; after the all-reduce, the sum of the contributions.

    Attributes:
        nonfinite_R: 1 for a rank whose loss, or own gradients of the dense part, are not finite: it is a cause, while
            the reduced gradients show the outcome. A rank fills in its own element.
        expert_rows_R: rows that each rank's experts computed. A rank fills in its own element.
        slowest_LN: rows of each node's slowest rank over its speed, see `ExpertStatistics`. One rank of the node fills
            them in.
        spent: seconds of each rank's own work.
    """

    nonfinite_R: NDArray[np.float64] = _array("R")
    expert_rows_R: NDArray[np.float64] = _array("R")
    slowest_LN: NDArray[np.float64] = _array("LN")
    spent: Spent

    @property
    def nonfinite_ranks(self) -> tuple[int, ...]:
        """Ranks whose own numbers are not finite; none when finite numbers became infinite in their sum."""
        return tuple(np.flatnonzero(self.nonfinite_R).tolist())

    @property
    def all_reconfigure(self) -> bool:
        """Whether every rank knows of a newer view. Only then may all of them leave this one."""
        return self.reconfigure == len(self.expert_rows_R)

    def layer_times(self, speeds: Sequence[float]) -> NDArray[np.float64]:
        """Time of the slowest rank for its expert rows over the mean, float64[L]; 1 is perfect.

        Args:
            speeds: as for `balance`.
        """
        mean_L = self.load_LE.sum(axis=1) * max(speeds) / math.fsum(speeds)
        slowest_L = self.slowest_LN.max(axis=1)
        return np.where((mean_L > 0) & (slowest_L > 0), slowest_L / np.maximum(mean_L, 1e-9), 1.0)

    def balance(self, speeds: Sequence[float]) -> float:
        """Mean over longest time that the ranks take for their expert rows; 1 is perfect balance.

        Args:
            speeds: relative speed of each rank, in rows; 0 for a rank that is not active.
        """
        able = [(float(rows), speed) for rows, speed in zip(self.expert_rows_R, speeds, strict=True) if speed > 0]
        longest = max(rows / speed for rows, speed in able)
        return math.fsum(rows for rows, _ in able) / math.fsum(speed for _, speed in able) / longest if longest else 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class VoteResult(Sums):
    """The result of a step's vote, equal on every rank.

    Attributes:
        step: the step that it commits.
        generation: generation of the view that voted.
        world_size: active ranks of that view.
        balance: mean over longest time of the active ranks for their expert rows; 1 is perfect balance.
        spike: the loss or the gradient's norm lies far above those before, and `optim.spike` says to skip that.
        imbalance_s, straggler_s: idle time of the mean rank, see `goodput.idle_of_step`.
        layer_time_L: time of the slowest rank for its expert rows over the mean, per MoE layer.
    """

    step: int
    generation: int
    world_size: int
    balance: float
    spike: bool
    imbalance_s: float = 0.0
    straggler_s: float = 0.0
    layer_time_L: NDArray[np.float64] = _array("L")

    @property
    def updates(self) -> bool:
        """Whether the step has an update."""
        return self.finite and not self.spike


class Wishes(NamedTuple):
    """One rank's wishes, as it votes.

    Attributes:
        reconfigure: it knows of a newer view.
        stop: it was asked to stop.
        save: it wants a checkpoint of this step.
    """

    reconfigure: bool = False
    stop: bool = False
    save: bool = False


@dataclass(frozen=True, slots=True)
class VoteShape:
    """Lengths of the axes."""

    layers: int
    experts: int
    ranks: int = 0
    nodes: int = 1

    def of(self, axes: str) -> tuple[int, ...]:
        """Shape of an array with these axes."""
        lengths = {"L": self.layers, "E": self.experts, "R": self.ranks, "N": self.nodes}
        return tuple(lengths[axis] for axis in axes)


def result_of(total: Ballot, step: int, view: View, spike: bool, speeds: Speeds | None = None) -> VoteResult:
    """The result of a vote.

    Args:
        total: the sum of all ballots.
        step: the step that was voted on.
        view: the view that voted.
        spike: the step is to have no update, because its loss or gradient is a spike.
        speeds: that were in use; None for equal ones.
    """
    active, measures, rows = view.active_ranks, total.measures, (speeds or Speeds.equal(view)).rows
    layer_time_L = total.layer_times(rows)
    imbalance_s, straggler_s = idle_of_step(
        total.spent.busy_s_R[list(active)],
        measures.wait_s / view.world_size,
        measures.expert_s / len(active),
        layer_time_L,
    )
    sums = {item.name: getattr(total, item.name) for item in fields(Sums)}
    return VoteResult(
        **sums,
        step=step,
        generation=view.generation,
        world_size=len(active),
        balance=total.balance(rows),
        spike=spike,
        imbalance_s=imbalance_s,
        straggler_s=straggler_s,
        layer_time_L=layer_time_L,
    )


def pack(record: Any) -> NDArray[np.float64]:
    """A record of this file as one float64 vector."""
    parts: list[NDArray[np.float64]] = []
    for item in fields(record):
        value = getattr(record, item.name)
        parts.append(pack(value) if is_dataclass(value) else np.ravel(np.asarray(value, dtype=np.float64)))
    return np.concatenate(parts)


def packed_size(kind: type[Any], shape: VoteShape) -> int:
    """Elements of a packed record of this kind."""
    hints = _hints(kind)
    sizes = 0
    for item in fields(kind):
        nested = is_dataclass(hints[item.name])
        sizes += (
            packed_size(hints[item.name], shape) if nested else int(np.prod(shape.of(item.metadata.get("axes", ""))))
        )
    return sizes


def unpack(kind: type[T], vector: NDArray[np.float64], shape: VoteShape) -> T:
    """Inverse of `pack`. The arrays are copies.

    Args:
        kind: class of the record.
        vector: what `pack` returned, or a sum of such vectors.
        shape: lengths of the axes in it.
    """
    hints = _hints(kind)
    values: dict[str, Any] = {}
    start = 0
    for item in fields(cast(Any, kind)):
        hint, axes = hints[item.name], item.metadata.get("axes")
        if is_dataclass(hint):
            stop = start + packed_size(cast(type[Any], hint), shape)
            values[item.name] = unpack(cast(type[Any], hint), vector[start:stop], shape)
        elif axes is not None:
            stop = start + int(np.prod(shape.of(axes)))
            values[item.name] = vector[start:stop].reshape(shape.of(axes)).copy()
        else:
            stop = start + 1
            values[item.name] = hint(vector[start])
        start = stop
    assert start == len(vector), "a vector of another shape"
    return kind(**values)


@cache
def _hints(kind: type[Any]) -> Mapping[str, Any]:
    """Field name -> type."""
    return get_type_hints(kind)
