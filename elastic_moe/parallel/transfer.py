"""Moving whole vectors between ranks into their places, in rounds of bounded size: the executor of a transfer plan.

Vectors are read from where they lie and written to where they are to lie, so a rank needs room for one round, and never
for all that moves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch

from elastic_moe.parallel.collectives.group import HOST, Group
from elastic_moe.plan.state.buckets import bucket_elements


class _Stream:
    """1-D vectors one after another, of which spans are taken as views."""

    def __init__(self, vectors: Sequence[torch.Tensor]) -> None:
        self._vectors = vectors
        self._stops = list(accumulate(vector.numel() for vector in vectors))
        self._next = 0  # the vector in which the next span begins

    @property
    def numel(self) -> int:
        return self._stops[-1] if self._stops else 0

    def span(self, start: int, stop: int) -> Iterator[torch.Tensor]:
        """Views of the elements `start` to `stop`. Spans are asked for in ascending order."""
        while self._next < len(self._vectors) and self._stops[self._next] <= start:
            self._next += 1
        for vector, end in zip(self._vectors[self._next :], self._stops[self._next :], strict=True):
            begin = end - vector.numel()
            if begin >= stop:
                return
            if vector.numel():
                yield vector[max(start - begin, 0) : stop - begin]


def exchange(
    group: Group,
    outgoing: Sequence[Sequence[torch.Tensor]],
    incoming: Sequence[Sequence[torch.Tensor]],
    round_elements: int = 0,
    device: torch.device = HOST,
) -> None:
    """Send 1-D fp32 vectors to each peer, and receive theirs; collective.

    What arrives proves nothing before `Group.attest`, so `incoming` must not be the memory of held state.

    Args:
        group: the generation's group.
        outgoing: per destination rank, the vectors to send, in the order the destination expects.
        incoming: per source rank, the vectors that take what arrives.
        round_elements: elements that a rank sends, and receives, in one round at most; the same on every rank. One to
            each peer is sent in any case. 0: those of a bucket of the exchanges of a step.
        device: of all vectors.
    """
    send, receive = [_Stream(vectors) for vectors in outgoing], [_Stream(vectors) for vectors in incoming]
    size_RR = group.all_gather(torch.tensor([stream.numel for stream in send], dtype=torch.int64))
    expected, announced = [stream.numel for stream in receive], size_RR[:, group.rank].tolist()
    assert announced == expected, f"rank {group.rank} expects {expected} elements, its peers send {announced}"
    moves_RR = size_RR > 0
    peers = max(1, int(moves_RR.sum(dim=0).max()), int(moves_RR.sum(dim=1).max()))  # of the rank with most
    width = max(1, (round_elements or bucket_elements(group.world_size)) // peers)
    for start in range(0, int(size_RR.max()), width):
        stop = start + width
        out = [list(stream.span(start, stop)) for stream in send]
        arrive = [list(stream.span(start, stop)) for stream in receive]
        out_sizes, sizes = ([sum(map(len, pieces)) for pieces in pieces_R] for pieces_R in (out, arrive))
        buffer = torch.empty(sum(sizes), device=device)
        flat = torch.cat([piece for pieces in out for piece in pieces] or [torch.empty(0, device=device)])
        group.all_to_all(buffer, flat, sizes, out_sizes)
        targets = [piece for pieces in arrive for piece in pieces]
        for target, piece in zip(targets, buffer.split(list(map(len, targets))), strict=True):
            target.copy_(piece)
