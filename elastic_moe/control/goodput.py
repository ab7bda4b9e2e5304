"""Goodput: what the workers' time went into, as values. Pure. `booking.py` fills them from a run's records.

Every second of every worker, from being placed on its node to its end, is booked to one cause. The terms are those of
the field: *goodput* is the share of all seconds that went into training, and the *effective training time ratio* (ETTR)
also counts the waits that belong to a step. MTTR and MTBF are the mean times to recover and between failures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

TRAINING = "training"
REDONE = "redone"
RECOVERING = "recovering"
WAITING = "waiting"
START = "start"
CHECKPOINT = "checkpoint"
EVALUATION = "evaluation"
IMBALANCE = "imbalance"
STRAGGLERS = "stragglers"

TIME_CAUSES = {
    TRAINING: "Steps that were made for the first time, communication included.",
    REDONE: "Steps that were made again, and the part of a step that a failure cut off.",
    RECOVERING: "From a failure, or from the last step before a planned view, until steps go on; and handing over.",
    WAITING: "The run had too few workers, or an operator had paused it.",
    START: "From a worker's placement until its first view is entered.",
    CHECKPOINT: "Training stood still for a checkpoint.",
    EVALUATION: "Evaluations, and the sample at the end.",
    IMBALANCE: "Idle within a step, because other ranks had more rows for their experts.",
    STRAGGLERS: "Idle within a step, because other ranks were slower with an even share.",
}
"""Cause -> its meaning, in the order in which they are shown."""

BACKWARD = 3.0  # time of a forward and a backward pass over that of the forward pass: the backward has two products
NO_PRICE = 0.0
DEFAULT = "default"  # price of nodes whose own kind has none


@dataclass(frozen=True, slots=True)
class Goodput:
    """The books of a run at one time, all its starts together.

    Attributes:
        worker_s: cause -> seconds of workers.
        node_s: kind of node -> seconds in which a node of this kind had at least one of the run's workers.
        up_s: seconds in which at least one worker lived.
        failures: workers that died or were evicted, and starts that ended without a word.
        repairs, repair_s: recoveries from failures, and their seconds: from the last step before until steps go on.
    """

    worker_s: Mapping[str, float]
    node_s: Mapping[str, float]
    up_s: float
    failures: int
    repairs: int
    repair_s: float

    @property
    def total_s(self) -> float:
        """Seconds of all workers."""
        return sum(self.worker_s.values())

    @property
    def goodput(self) -> float:
        """Share of the workers' seconds that went into training; 0 before there are any."""
        return self._share(TRAINING)

    @property
    def ettr(self) -> float:
        """Effective training time ratio: share of the workers' seconds in steps that were made for the first time."""
        return self._share(TRAINING, IMBALANCE, STRAGGLERS)

    @property
    def mttr_s(self) -> float | None:
        """Mean time to recover; None without a recovery."""
        return self.repair_s / self.repairs if self.repairs else None

    @property
    def mtbf_s(self) -> float | None:
        """Mean time between failures; None without a failure."""
        return self.up_s / self.failures if self.failures else None

    def cost(self, prices: Mapping[str, float]) -> float | None:
        """The price of the nodes' time; None where a kind of node has no price. `prices`: see `price_of`."""
        known = {kind: price_of(kind, prices) for kind in self.node_s}
        if not known or NO_PRICE in known.values():
            return None
        return sum(known[kind] * seconds / 3600 for kind, seconds in self.node_s.items())

    def _share(self, *causes: str) -> float:
        total_s = self.total_s
        return sum(self.worker_s[cause] for cause in causes) / total_s if total_s else 0.0


def price_of(kind: str, prices: Mapping[str, float]) -> float:
    """Price of an hour of a node; 0 if it is not known.

    Args:
        kind: market type and node group, such as "spot/g6e-workers"; either may be missing.
        prices: `cluster.price_per_hour`: by kind, node group or market type, the most exact name first; else "default".
    """
    market, _, group = kind.rpartition("/")
    return next((prices[name] for name in (kind, group, market, DEFAULT) if prices.get(name)), NO_PRICE)


def node_kind(market: str, group: str) -> str:
    """The kind of a node for its price: market type ("spot", "on-demand") and node group, as far as they are known."""
    return "/".join(filter(None, (market, group)))


def as_record(books: Goodput, prices: Mapping[str, float]) -> dict[str, Any]:
    """The books as plain values; `metrics/schema.py` declares them (GOODPUT_KEYS, less `time` and `step`)."""
    return {
        "worker_s": {cause: round(books.worker_s[cause], 3) for cause in TIME_CAUSES},
        "total_s": round(books.total_s, 3),
        "goodput": round(books.goodput, 5),
        "ettr": round(books.ettr, 5),
        "failures": books.failures,
        "mttr_s": _rounded(books.mttr_s),
        "mtbf_s": _rounded(books.mtbf_s),
        "node_s": {kind: round(seconds, 3) for kind, seconds in sorted(books.node_s.items())},
        "cost": _rounded(books.cost(prices)),
    }


def idle_of_step(
    busy_s_R: NDArray[np.float64], wait_s: float, expert_s: float, layer_time_L: NDArray[np.float64]
) -> tuple[float, float]:
    """Idle time of the mean rank within a step: for the imbalance of the experts, and for stragglers.

    A rank waits at every layer for the one with the most rows. That much follows from the rows and the time that a row
    takes. The rest of the idle time is seen at the vote: the slowest rank worked so much longer than the mean.

    Args:
        busy_s_R: seconds that each active rank worked up to the vote, waits in collectives left out.
        wait_s: seconds that the mean rank waited in collectives.
        expert_s: seconds of the mean rank's experts in the forward passes.
        layer_time_L: rows of the slowest rank over the mean, per MoE layer.
    """
    uneven = float(layer_time_L.mean()) - 1.0 if layer_time_L.size else 0.0
    imbalance_s = min(BACKWARD * expert_s * max(0.0, uneven), wait_s)
    idle_s = float(busy_s_R.max() - busy_s_R.mean()) if busy_s_R.size else 0.0
    return imbalance_s, max(0.0, min(idle_s, wait_s) - imbalance_s)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
