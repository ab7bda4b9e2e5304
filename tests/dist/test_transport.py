"""Rows by way of the nodes are the rows that go straight."""

from __future__ import annotations

import numpy as np
import torch

from elastic_moe.parallel.transport import ByNode, Flat
from tests.dist.ranks import Seat, results

LAYOUTS = [[0, 0, 1, 1], [0, 1, 0, 1], [0, 1, 2, 3], [0, 1, 1, 1], [2, 0, 2, 2], [1, 0, 0, 5]]


def _both(seat: Seat) -> list[int]:
    group, messages = seat.form(1, seat.rank, seat.world), []
    for seed, layout in enumerate(LAYOUTS):
        rows_RR = np.random.default_rng(seed).poisson(1.0, (seat.world, seat.world)).astype(np.int64)
        sent, received = rows_RR[seat.rank].tolist(), rows_RR[:, seat.rank].tolist()
        rows = torch.randn(sum(sent), 3, generator=torch.Generator().manual_seed(seat.rank))
        by_node = ByNode(group, layout)
        assert torch.equal(by_node(rows, sent, received, rows_RR), Flat(group)(rows, sent, received, None))
        messages.append(by_node.messages)
    group.close()
    return messages


def test_by_node_equals_flat() -> None:
    by_rank = results(4, _both)
    nodes = [len(set(layout)) for layout in LAYOUTS]
    assert [sum(counts) for counts in zip(*by_rank, strict=True)] == [n * (n - 1) for n in nodes]
