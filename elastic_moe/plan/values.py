"""The values that placement and token split share: the ranks' topology, and which expert sits in which slot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LOST = -1  # in a previous placement's home


@dataclass(frozen=True, slots=True)
class Topology:
    """Node (fault domain) and relative speed of every rank."""

    nodes: tuple[str, ...]
    speeds: tuple[float, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Placement:
    """Attributes:
    expert_of_slot: int32[L, P], EMPTY for a slot without expert; within a rank homes come first, then replicas.
    rank_of_slot: int32[P], non-decreasing.
    home: int32[L, E], rank.
    node_of_rank: int32[R], nodes by number; None: all ranks are on one node.
    time_L: the slowest rank's time on the load planned for, per layer, with an optimal split; 1 is the mean. None: unknown.
    """

    expert_of_slot: NDArray[np.int32]
    rank_of_slot: NDArray[np.int32]
    home: NDArray[np.int32]
    node_of_rank: NDArray[np.int32] | None = None
    time_L: NDArray[np.float64] | None = None

    def remap_ranks(self, rank_of: Sequence[int]) -> Placement:
        """What is left of this placement under a new membership.

        Args:
            rank_of: new rank of each old one; LOST for a rank that is gone.
        """
        rank_of_R = np.asarray(rank_of, dtype=np.int32)
        return Placement(self.expert_of_slot, rank_of_R[self.rank_of_slot], rank_of_R[self.home])

    def slots_of(self, rank: int) -> slice:
        """Slots of one rank."""
        start, stop = np.searchsorted(self.rank_of_slot, [rank, rank + 1])
        return slice(int(start), int(stop))
