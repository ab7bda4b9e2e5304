"""Buckets: the parts in which a large exchange is made, one after another, so that a rank never needs room for all.

Legend: U units, R ranks.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MESSAGE_ELEMENTS = 1 << 16  # to each peer at least, where there are many: 256 KiB in fp32
EARLY_ELEMENTS = 1 << 18  # that a primary moves in a bucket at least, if it leaves early: 1 MiB in fp32
LEAST_ELEMENTS, MOST_ELEMENTS = 1 << 22, 1 << 25  # of a bucket, in one direction: 16 to 128 MiB in fp32
VECTOR_BYTES = 64 << 20  # of state that lies together, at least where there is as much


def bucket_elements(num_ranks: int) -> int:
    """Elements that a rank sends in one bucket, and as many that it receives: 256 MiB in both directions at most."""
    return min(max(LEAST_ELEMENTS, MESSAGE_ELEMENTS * num_ranks), MOST_ELEMENTS)


def vector_bytes(held_bytes: int) -> int:
    """Bytes of state that lie together, and are copied at once, where a worker holds so many: 256 MiB at most."""
    return min(max(VECTOR_BYTES, held_bytes // 16), 4 * VECTOR_BYTES)


def assign_buckets(
    numel_U: NDArray[np.int64],
    primary_U: NDArray[np.int32],
    copies_U: NDArray[np.int64],
    num_ranks: int,
    redundancy: int,
) -> NDArray[np.int64]:
    """The bucket in which each unit travels, the same on every rank: gradients, mirrors and weights alike.

    A primary's units are spread evenly over the buckets, by what it receives or sends of them. A unit is never cut, and
    what a rank that owns other units sends to this one is spread evenly only where it has all of them, as with dense
    units. So a bucket may be somewhat larger than `bucket_elements`.

    Args:
        numel_U: elements.
        primary_U: rank that owns each unit.
        copies_U: ranks that compute with each unit.
        num_ranks: R.
        redundancy: mirrors of each unit.

    Returns:
        int64 [U], from 0 on; every bucket up to the last one has units of some primary.
    """
    moved_U = numel_U * np.maximum(copies_U - 1, max(1, redundancy))
    moved_R = np.bincount(primary_U, weights=moved_U, minlength=num_ranks).astype(np.int64)
    count = -(-int(moved_R.max(initial=0)) // bucket_elements(num_ranks))
    if count <= 1 or num_ranks == 1:
        return np.zeros(len(numel_U), dtype=np.int64)
    by_primary = np.argsort(primary_U, kind="stable")
    before_U = np.cumsum(moved_U[by_primary]) - moved_U[by_primary]
    first_R = np.concatenate([[0], np.cumsum(moved_R)[:-1]])  # what the primaries before move
    own_before_U = before_U - first_R[primary_U[by_primary]]
    buckets_U = np.empty(len(numel_U), dtype=np.int64)
    buckets_U[by_primary] = own_before_U * count // np.maximum(moved_R[primary_U[by_primary]], 1)
    return buckets_U


def assign_early_buckets(
    numel_U: NDArray[np.int64],
    primary_U: NDArray[np.int32],
    copies_U: NDArray[np.int64],
    num_ranks: int,
    stage_U: NDArray[np.int64],
) -> NDArray[np.int64]:
    """The bucket in which each unit's gradient travels if it leaves as soon as the backward pass has made it.

    A stage is what the backward pass completes together. Buckets follow the stages: neighbours share one until some
    primary receives `EARLY_ELEMENTS` in it, and a stage in which one receives more than `bucket_elements` has several.

    Args:
        numel_U, primary_U, copies_U, num_ranks: as for `assign_buckets`.
        stage_U: from 0 on, in the order of the backward pass.

    Returns:
        int64 [U], from 0 on, the same on every rank.
    """
    most = bucket_elements(num_ranks)
    least = min(max(EARLY_ELEMENTS, MESSAGE_ELEMENTS * num_ranks // 4), most)
    moved_U = numel_U * np.maximum(copies_U - 1, 1)
    moved_SR = np.zeros((int(stage_U.max(initial=-1)) + 1, num_ranks), dtype=np.int64)
    np.add.at(moved_SR, (stage_U, primary_U), moved_U)
    buckets_U, bucket, open_R = np.empty(len(numel_U), dtype=np.int64), 0, np.zeros(num_ranks, dtype=np.int64)
    for stage, moved_R in enumerate(moved_SR):
        of_stage = np.flatnonzero(stage_U == stage)
        if open_R.any() and (open_R + moved_R).max() > most:
            bucket, open_R = bucket + 1, np.zeros_like(open_R)
        open_R = open_R + moved_R
        within = assign_buckets(numel_U[of_stage], primary_U[of_stage], copies_U[of_stage], num_ranks, 1)
        buckets_U[of_stage] = bucket + within
        bucket += int(within.max(initial=0))
        if open_R.max() >= least:
            bucket, open_R = bucket + 1, np.zeros_like(open_R)
    return np.unique(buckets_U, return_inverse=True)[1]  # a large unit may leave one empty
