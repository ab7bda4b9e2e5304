"""How rows travel between ranks: straight to each, or by way of the nodes, one message per pair of nodes.

`Flat` is the uneven all-to-all: every rank sends to every other. With many ranks per node most of those messages are small, and their number
between nodes grows with the square of the ranks. `ByNode` gathers what node A sends to node B at one rank of A, sends it in one message to one
rank of B, and deals it out there. Each pair of nodes has its own two ranks, so that all ranks of a node share the work. Rows travel up to
three times, twice of them inside a node.

Shapes: R ranks, N rows, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from elastic_moe.parallel.collectives.group import Group, Pending


class Transport(Protocol):
    """Moves rows; collective."""

    def __call__(
        self, rows_ND: torch.Tensor, sent: list[int], arrive: list[int], rows_RR: NDArray[np.int64] | None
    ) -> torch.Tensor:
        """Rows sorted by destination -> rows sorted by source.

        Args:
            rows_ND: this rank's rows.
            sent, arrive: rows to and from each rank.
            rows_RR: rows from each rank (first index) to each other, the same on every rank; where it is needed.
        """
        ...


class Flat:
    """One all-to-all over all ranks."""

    def __init__(self, group: Group) -> None:
        self._group = group

    def __call__(
        self, rows_ND: torch.Tensor, sent: list[int], arrive: list[int], rows_RR: NDArray[np.int64] | None
    ) -> torch.Tensor:
        out = rows_ND.new_empty((sum(arrive), *rows_ND.shape[1:]))
        self._group.all_to_all(out, rows_ND, arrive, sent)
        return out


class ByNode:
    """Gather in the node, one message per pair of nodes, deal out in the node.

    Args:
        group: the collectives.
        node_of_rank: node of each rank.

    Attributes:
        messages: sent by this rank to other nodes so far.
    """

    def __init__(self, group: Group, node_of_rank: Sequence[int]) -> None:
        self._group, self._rank = group, group.rank
        self._node = node_of_rank[group.rank]
        self._nodes = sorted(set(node_of_rank))
        self._ranks = {n: [r for r, other in enumerate(node_of_rank) if other == n] for n in self._nodes}
        self.messages = 0
        self._inside = group.part(f"node{self._node}", self._ranks[self._node])
        self._between: dict[int, Group] = {}  # other gate -> the group of the two
        for index, node in enumerate(self._nodes):
            for other in self._nodes[index + 1 :]:
                gates = [self._gate(node, other), self._gate(other, node)]
                if self._rank in gates:
                    pair = group.part(f"nodes{node}-{other}", gates)
                    self._between[gates[1 - gates.index(self._rank)]] = pair

    def _gate(self, node: int, other: int) -> int:
        """The rank of `node` that talks to `other`."""
        ranks = self._ranks[node]
        return ranks[self._nodes.index(other) % len(ranks)]

    def __call__(
        self, rows_ND: torch.Tensor, sent: list[int], arrive: list[int], rows_RR: NDArray[np.int64] | None
    ) -> torch.Tensor:
        assert rows_RR is not None
        me, here, width = self._rank, self._ranks[self._node], tuple(rows_ND.shape[1:])
        others = [node for node in self._nodes if node != self._node]
        mine = list(rows_ND.split(sent))  # by destination

        def empty(rows: int) -> torch.Tensor:
            return rows_ND.new_empty((int(rows), *width))

        def total(sources: Sequence[int], targets: Sequence[int]) -> int:
            return int(rows_RR[np.ix_(list(sources), list(targets))].sum())

        # In the node: rows for a peer, then rows for the nodes whose gate it is.
        def duties(rank: int) -> list[int]:
            return [node for node in others if self._gate(self._node, node) == rank]

        parcels = {
            peer: torch.cat([mine[peer], *(mine[r] for node in duties(peer) for r in self._ranks[node])])
            for peer in here
        }
        arriving = {
            peer: empty(rows_RR[peer, me] + sum(total([peer], self._ranks[node]) for node in duties(me)))
            for peer in here
        }
        self._deal(parcels, arriving)
        near: dict[int, torch.Tensor] = {}
        letters: dict[int, list[torch.Tensor]] = {node: [] for node in duties(me)}
        for peer in here:
            sizes = [int(rows_RR[peer, me]), *(total([peer], self._ranks[node]) for node in duties(me))]
            near[peer], *rest = arriving[peer].split(sizes)
            for node, piece in zip(duties(me), rest, strict=True):
                letters[node].append(piece)
        # Between nodes: by source, then by destination.
        outgoing = {self._gate(node, self._node): torch.cat(pieces) for node, pieces in letters.items()}
        incoming = {self._gate(node, self._node): empty(total(self._ranks[node], here)) for node in duties(me)}
        self.messages += len(outgoing)
        self._post(outgoing, incoming)
        # In the node again: each peer's rows, by source.
        dealt: dict[int, list[torch.Tensor]] = {peer: [] for peer in here}
        for node in duties(me):
            letter = incoming[self._gate(node, self._node)]
            sizes = [int(rows_RR[source, peer]) for source in self._ranks[node] for peer in here]
            for index, piece in enumerate(letter.split(sizes)):
                dealt[here[index % len(here)]].append(piece)
        parcels = {peer: torch.cat(pieces) if pieces else empty(0) for peer, pieces in dealt.items()}
        arriving = {
            peer: empty(sum(total(self._ranks[node], [me]) for node in others if self._gate(self._node, node) == peer))
            for peer in here
        }
        self._deal(parcels, arriving)
        found = dict(near)
        for peer in here:
            sources = [r for node in others if self._gate(self._node, node) == peer for r in self._ranks[node]]
            pieces = arriving[peer].split([int(rows_RR[source, me]) for source in sources])
            found.update(zip(sources, pieces, strict=True))
        return torch.cat([found[source] for source in range(len(rows_RR))])

    def _deal(self, outgoing: dict[int, torch.Tensor], incoming: dict[int, torch.Tensor]) -> None:
        """Every rank of the node to every other."""
        arriving = torch.cat(list(incoming.values()))
        sizes = [len(t) for t in incoming.values()]
        self._inside.all_to_all(
            arriving, torch.cat(list(outgoing.values())), sizes, [len(t) for t in outgoing.values()]
        )
        for target, piece in zip(incoming.values(), arriving.split(sizes), strict=True):
            target.copy_(piece)

    def _post(self, outgoing: dict[int, torch.Tensor], incoming: dict[int, torch.Tensor]) -> None:
        """One message to each other node whose gate this rank is, and one from it, all under way at once."""
        under_way: list[Pending] = []
        for rank, pair in self._between.items():
            received, sent = [0, 0], [0, 0]
            received[1 - pair.rank], sent[1 - pair.rank] = len(incoming[rank]), len(outgoing[rank])
            under_way.append(pair.begin_all_to_all(incoming[rank], outgoing[rank], received, sent))
        for pending in under_way:
            pending.wait()
