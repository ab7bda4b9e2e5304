"""Whole vectors between ranks, in many rounds: they arrive unchanged and in order.

Some vectors have no elements, and some ranks send none.
"""

from __future__ import annotations

import pytest
import torch

from elastic_moe.parallel.transfer import exchange
from tests.dist.ranks import Seat, alone, results


def _sizes(src: int, dst: int) -> list[int]:
    """Vectors from src to dst; rank 1 sends nothing, nobody sends to itself but rank 0."""
    if src == 1 or (src == dst and src != 0):
        return []
    return [(src * 7 + dst * 3 + k) % 11 * (9 if k == 2 else 1) for k in range(4)]


def _vector(src: int, dst: int, k: int, numel: int) -> torch.Tensor:
    return torch.arange(numel, dtype=torch.float32) + 1000 * src + 100 * dst + 10_000 * k


def _swap(seat: Seat, round_elements: int) -> tuple[bool, int]:
    rank, world = seat.rank, seat.world
    group = seat.form(1, rank, world)
    outgoing = [[_vector(rank, dst, k, n) for k, n in enumerate(_sizes(rank, dst))] for dst in range(world)]
    received = [[torch.full((size,), -1.0) for size in _sizes(src, rank)] for src in range(world)]
    exchange(group, outgoing, received, round_elements)
    same = all(
        len(vectors) == len(_sizes(src, rank))
        and all(torch.equal(vector, _vector(src, rank, k, vector.numel())) for k, vector in enumerate(vectors))
        and [vector.numel() for vector in vectors] == _sizes(src, rank)
        for src, vectors in enumerate(received)
    )
    count = group.completed
    exchange(group, [[]] * world, [[]] * world)
    assert group.completed == count + 1  # nothing to move: the sizes only
    group.close()
    return same, count


def test_vectors_arrive_whole_over_many_rounds() -> None:
    for same, collectives in results(3, _swap, 15):
        assert same
        assert collectives > 10


def test_alone_and_a_wrong_expectation() -> None:
    group = alone()
    first, second = torch.zeros(3), torch.zeros(2)
    exchange(group, [[torch.arange(3.0), torch.arange(2.0)]], [[first, second]])
    assert first.tolist() == [0, 1, 2]
    assert second.tolist() == [0, 1]
    with pytest.raises(AssertionError, match="expects"):
        exchange(group, [[torch.arange(3.0)]], [[torch.zeros(2)]])
