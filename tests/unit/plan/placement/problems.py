"""Small problems of one layer for the tests of placement's parts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from elastic_moe.plan.placement.replicas import EMPTY, LayerPlan, index_copies


def problem(
    load: Sequence[int], slots: Sequence[int], expert_P: np.ndarray | None = None, nodes: str = ""
) -> tuple[LayerPlan, np.ndarray]:
    """Equal ranks with these slots, and the plan `expert_P` (all slots empty by default) with its index."""
    load_E, slots_R = np.array(load, dtype=np.int64), np.array(slots, dtype=np.int64)
    num_ranks = len(slots_R)
    start_R = np.concatenate([[0], np.cumsum(slots_R)]).astype(np.int64)
    expert_P = np.full(start_R[-1], EMPTY) if expert_P is None else np.array(expert_P, dtype=np.int64)
    layer = LayerPlan(
        load_E,
        np.where(slots_R > 0, load_E.sum() / (slots_R > 0).sum(), 0.0),
        start_R,
        np.repeat(np.arange(num_ranks), slots_R),
        np.unique(list(nodes or "a" * num_ranks), return_inverse=True)[1].astype(np.int64),
        np.arange(num_ranks),
        np.empty((len(load_E), num_ranks), np.int64),
        np.zeros(len(load_E), np.int64),
    )
    index_copies(expert_P, layer.slots_of_ER, layer.copies_E)
    return layer, expert_P


def check_index(layer: LayerPlan, expert_P: np.ndarray) -> None:
    """The index lists exactly the slots of each expert, and no rank holds two copies of one."""
    for expert in range(len(layer.load_E)):
        slots = layer.slots_of_ER[expert, : layer.copies_E[expert]].tolist()
        assert sorted(slots) == np.flatnonzero(expert_P == expert).tolist()
        ranks = layer.rank_P[slots].tolist()
        assert len(set(ranks)) == len(ranks)


def components(layer: LayerPlan, expert_P: np.ndarray) -> int:
    """Number of components of ranks that share experts, found by repeated merging."""
    label_R = np.arange(len(layer.target_R))
    for expert in range(len(layer.load_E)):
        labels = label_R[layer.rank_P[expert_P == expert]]
        for label in labels:
            label_R[label_R == label] = labels[0]
    return len(np.unique(label_R))
