"""A look for better placements of some layers, whose results join to a look at all of them. Pure, numpy only.

Legend: L MoE layers, E experts. A layer's time is that of its slowest rank; 1 is the mean of the ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from elastic_moe.control.frozen import replace
from elastic_moe.plan.placement import Placement, Topology, plan_placement
from elastic_moe.plan.split import slowest_times

MIN_TIME_GAIN = 1e-3  # a layer keeps its placement if a new one makes it faster by less than this, in means


class Look(NamedTuple):
    """Layers as they are and as they could be.

    Attributes:
        now_L: their times.
        replicas, replicas_L: a placement with all homes in place, and its times.
        homes, homes_L: a placement in which homes move, and its times; None if homes are not looked at.
    """

    now_L: NDArray[np.float64]
    replicas: Placement
    replicas_L: NDArray[np.float64]
    homes: Placement | None
    homes_L: NDArray[np.float64] | None


def look_at(
    load_LE: NDArray[np.float64],
    old: Placement,
    topology: Topology,
    slots: Sequence[int],
    speeds: Sequence[float],
    home_moves: int,
) -> Look:
    """The best placements of these layers. Layers that gain nothing stay as they are.

    Args:
        load_LE: load of their experts.
        old: their present placement.
        topology: nodes and speeds of the ranks.
        slots: slots of each rank.
        speeds: relative speed per rank; 0 for a rank that computes nothing.
        home_moves: homes per layer that may move; 0 if homes are not looked at.
    """
    now_L = slowest_times(load_LE, old, speeds)
    old = replace(old, time_L=now_L)

    def plan(moves: int) -> tuple[Placement, NDArray[np.float64]]:
        new = plan_placement(load_LE, topology, slots, old, home_moves=moves)
        assert new.time_L is not None
        better_L = new.time_L < now_L - MIN_TIME_GAIN
        if not better_L.any():
            return old, now_L
        new = _chosen(better_L, new, old)
        return new, slowest_times(load_LE, new, speeds)

    replicas, replicas_L = plan(0)
    homes, homes_L = plan(home_moves) if home_moves else (None, None)
    return Look(now_L, replicas, replicas_L, homes, homes_L)


def joined(looks: Sequence[Look]) -> Look:
    """The look at all layers from looks at some of them, in order."""
    homes = [look.homes for look in looks if look.homes is not None]
    homes_L = [look.homes_L for look in looks if look.homes_L is not None]
    return Look(
        np.concatenate([look.now_L for look in looks]),
        _joined_placement([look.replicas for look in looks]),
        np.concatenate([look.replicas_L for look in looks]),
        _joined_placement(homes) if homes else None,
        np.concatenate(homes_L) if homes_L else None,
    )


def layers_of(placement: Placement, layers: slice) -> Placement:
    """Some layers of a placement."""
    time_L = None if placement.time_L is None else placement.time_L[layers]
    return replace(
        placement, expert_of_slot=placement.expert_of_slot[layers], home=placement.home[layers], time_L=time_L
    )


def _joined_placement(parts: Sequence[Placement]) -> Placement:
    return replace(
        parts[0],
        expert_of_slot=np.concatenate([part.expert_of_slot for part in parts]),
        home=np.concatenate([part.home for part in parts]),
        time_L=np.concatenate([part.time_L for part in parts if part.time_L is not None]),
    )


def _chosen(which_L: NDArray[np.bool_], a: Placement, b: Placement) -> Placement:
    """The one placement of the layers where `which_L` is true, the other of the rest."""
    assert a.time_L is not None
    assert b.time_L is not None
    return replace(
        a,
        expert_of_slot=np.where(which_L[:, None], a.expert_of_slot, b.expert_of_slot),
        home=np.where(which_L[:, None], a.home, b.home),
        time_L=np.where(which_L, a.time_L, b.time_L),
    )
