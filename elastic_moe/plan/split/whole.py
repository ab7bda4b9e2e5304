"""Token split in which a source rank sends all tokens of an expert to one copy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from elastic_moe.plan.split.split import positive_speeds
from elastic_moe.plan.values import Placement


def split_whole(
    counts: NDArray[np.integer], placement: Placement, layer: int, speeds: Sequence[float] | None = None
) -> NDArray[np.int64]:
    """Split in which all tokens from one rank to one expert go to one copy, int64[R, P].

    Sums over the tokens of a rank then do not depend on the split. Greedy: the largest group of tokens first, to the
    copy whose rank would finish first; in a tie, to the sender's own rank. Arguments as for `split_tokens`.
    """
    counts_RE = np.asarray(counts, dtype=np.int64)
    num_ranks, num_experts = counts_RE.shape
    expert_P, rank_P = placement.expert_of_slot[layer], placement.rank_of_slot
    speed_R = np.array(positive_speeds(speeds, num_ranks))
    slots_of: list[list[int]] = [np.flatnonzero(expert_P == expert).tolist() for expert in range(num_experts)]
    load_R = np.zeros(num_ranks)
    out_RP = np.zeros((num_ranks, len(expert_P)), dtype=np.int64)
    flexible: list[tuple[int, int, int]] = []
    for source, expert in np.argwhere(counts_RE > 0).tolist():
        slots, rows = slots_of[expert], int(counts_RE[source, expert])
        assert slots, "tokens for an expert without a copy"
        if len(slots) > 1:
            flexible.append((-rows, expert, source))
        else:
            out_RP[source, slots[0]] = rows
            load_R[rank_P[slots[0]]] += rows
    for negative, expert, source in sorted(flexible):
        best = min(
            slots_of[expert],
            key=lambda slot: ((load_R[rank_P[slot]] - negative) / speed_R[rank_P[slot]], rank_P[slot] != source, slot),
        )
        out_RP[source, best] = -negative
        load_R[rank_P[best]] -= negative
    return out_RP
