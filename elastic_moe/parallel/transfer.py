"""Moving whole vectors between ranks, in rounds of bounded size: the executor of a transfer plan."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from elastic_moe.parallel.collectives.group import HOST, Group

ROUND_ELEMENTS = 16 * 1024 * 1024  # per rank and round: 64 MiB of fp32


def exchange(
    group: Group,
    outgoing: Sequence[Sequence[torch.Tensor]],
    incoming: Sequence[Sequence[int]],
    round_elements: int = ROUND_ELEMENTS,
    device: torch.device = HOST,
) -> list[list[torch.Tensor]]:
    """Send 1-D fp32 vectors to each peer and receive theirs; collective.

    Args:
        group: the generation's group.
        outgoing: per destination rank, the vectors to send, in the order the destination expects.
        incoming: per source rank, the sizes of the vectors that arrive.
        round_elements: elements that a rank sends, and receives, in one round at most; the same on every rank.
        device: of all vectors.

    Returns:
        Per source rank, the received vectors (views of one tensor per source).
    """
    send = [torch.cat(list(vectors)) if vectors else torch.empty(0, device=device) for vectors in outgoing]
    receive = [torch.empty(sum(sizes), device=device) for sizes in incoming]
    size_RR = group.all_gather(torch.tensor([t.numel() for t in send], dtype=torch.int64))
    expected, announced = [t.numel() for t in receive], size_RR[:, group.rank].tolist()
    assert announced == expected, f"rank {group.rank} expects {expected} elements, its peers send {announced}"
    width = max(1, round_elements // group.world_size)
    for start in range(0, int(size_RR.max()), width):
        out = [t[start : start + width] for t in send]
        arrive = [t[start : start + width] for t in receive]
        sizes = [t.numel() for t in arrive]
        buffer = torch.empty(sum(sizes), device=device)
        group.all_to_all(buffer, torch.cat(out), sizes, [t.numel() for t in out])
        for target, piece in zip(arrive, buffer.split(sizes), strict=True):
            target.copy_(piece)
    return [list(t.split(list(sizes))) if sizes else [] for t, sizes in zip(receive, incoming, strict=True)]
