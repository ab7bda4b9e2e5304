"""How rows travel between ranks: straight to each rank, or by way of the nodes with one message per pair of nodes.

`Flat` is the uneven all-to-all: every rank sends to every other. With many ranks per node most of those messages are
small, and their number between nodes grows with the square of the ranks. `ByNode` collects all rows from node A to node
B at one rank of A, the leader of A for B. The leader sends them in one message to the leader of B for A, which hands
them to the ranks of B. Each pair of nodes has its own two leaders, so that all ranks of a node share the work. A row
travels up to three times, twice of them inside a node.

Shapes: R ranks, N rows, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from elastic_moe.parallel.collectives.group import Group


class Transport(Protocol):
    """Moves rows between ranks."""

    @property
    def needs_row_matrix(self) -> bool:
        """Whether a call needs `rows_RR`."""
        ...

    def __call__(
        self, rows_ND: torch.Tensor, sent_R: list[int], received_R: list[int], rows_RR: NDArray[np.int64] | None
    ) -> torch.Tensor:
        """Rows sorted by destination -> rows sorted by source; collective.

        Args:
            rows_ND: this rank's rows.
            sent_R, received_R: rows to and from each rank.
            rows_RR: rows from each rank (first index) to each other, the same on every rank; may be None where
                `needs_row_matrix` is false.

        Raises:
            GroupAborted: the generation is over.
        """
        ...


class Flat:
    """One all-to-all over all ranks."""

    needs_row_matrix = False

    def __init__(self, group: Group) -> None:
        self._group = group

    def __call__(
        self, rows_ND: torch.Tensor, sent_R: list[int], received_R: list[int], rows_RR: NDArray[np.int64] | None
    ) -> torch.Tensor:
        out = rows_ND.new_empty((sum(received_R), *rows_ND.shape[1:]))
        self._group.all_to_all(out, rows_ND, received_R, sent_R)
        return out


class NodeLeaders:
    """The ranks of each node, and which of them exchanges with which other node. Pure.

    Args:
        node_of_rank: node of each rank.

    Attributes:
        nodes: in ascending order.
        ranks_of: node -> its ranks in ascending order.
    """

    def __init__(self, node_of_rank: Sequence[int]) -> None:
        self._node_of_rank = node_of_rank
        self.nodes = sorted(set(node_of_rank))
        self.ranks_of = {n: [r for r, other in enumerate(node_of_rank) if other == n] for n in self.nodes}

    def node_leader(self, node: int, other: int) -> int:
        """The rank of `node` that exchanges rows with `other`."""
        ranks = self.ranks_of[node]
        return ranks[self.nodes.index(other) % len(ranks)]

    def led_nodes(self, rank: int) -> list[int]:
        """The other nodes with which `rank` exchanges rows on behalf of its node."""
        own = self._node_of_rank[rank]
        return [node for node in self.nodes if node != own and self.node_leader(own, node) == rank]


class ByNode:
    """Collect rows in the node, send one message per pair of nodes, hand rows out in the node.

    Args:
        group: the generation's collectives.
        node_of_rank: node of each rank.

    Attributes:
        messages: sent by this rank to other nodes so far.
    """

    needs_row_matrix = True

    def __init__(self, group: Group, node_of_rank: Sequence[int]) -> None:
        self._rank = group.rank
        self._leaders = leaders = NodeLeaders(node_of_rank)
        node = node_of_rank[group.rank]
        self._peers = leaders.ranks_of[node]  # of the node, this rank included
        self._led = {peer: leaders.led_nodes(peer) for peer in self._peers}
        self.messages = 0
        self._intra_node = group.subgroup(f"node{node}", self._peers)
        self._inter_node: dict[int, Group] = {}  # other node -> the group of its leader and this rank
        for index, low in enumerate(leaders.nodes):
            for high in leaders.nodes[index + 1 :]:
                pair = [leaders.node_leader(low, high), leaders.node_leader(high, low)]
                if self._rank in pair:
                    self._inter_node[high if node == low else low] = group.subgroup(f"nodes{low}-{high}", pair)

    def __call__(
        self, rows_ND: torch.Tensor, sent_R: list[int], received_R: list[int], rows_RR: NDArray[np.int64] | None
    ) -> torch.Tensor:
        assert rows_RR is not None
        collected = self._collect(rows_ND.split(sent_R), rows_RR)
        by_source, outgoing = self._sort_collected(collected, rows_RR)
        incoming = self._exchange_between(outgoing, rows_RR)
        handed_out = self._hand_out(incoming, rows_ND[:0], rows_RR)
        by_source.update(self._sort_handed_out(handed_out, rows_RR))
        return torch.cat([by_source[source] for source in range(len(rows_RR))])

    def _collect(self, by_target: Sequence[torch.Tensor], rows_RR: NDArray[np.int64]) -> list[torch.Tensor]:
        """Send each peer its own rows and the rows for the nodes that it leads. Returns the rows from each peer."""
        outgoing = [
            torch.cat([by_target[peer], *(by_target[r] for node in self._led[peer] for r in self._ranks_of(node))])
            for peer in self._peers
        ]
        return self._exchange_in_node(outgoing, [sum(self._collected_sizes(peer, rows_RR)) for peer in self._peers])

    def _collected_sizes(self, peer: int, rows_RR: NDArray[np.int64]) -> list[int]:
        """Rows from `peer` when rows are collected: those for this rank, then those for each node that it leads."""
        own = int(rows_RR[peer, self._rank])
        return [own, *(_total(rows_RR, [peer], self._ranks_of(node)) for node in self._led[self._rank])]

    def _sort_collected(
        self, collected: Sequence[torch.Tensor], rows_RR: NDArray[np.int64]
    ) -> tuple[dict[int, torch.Tensor], dict[int, torch.Tensor]]:
        """Returns the rows of the node's ranks for this rank, by source, and the messages to the led nodes, by node.

        A message has its rows by source, then by destination.
        """
        by_source: dict[int, torch.Tensor] = {}
        messages: dict[int, list[torch.Tensor]] = {node: [] for node in self._led[self._rank]}
        for peer, rows in zip(self._peers, collected, strict=True):
            by_source[peer], *for_nodes = rows.split(self._collected_sizes(peer, rows_RR))
            for node, part in zip(messages, for_nodes, strict=True):
                messages[node].append(part)
        return by_source, {node: torch.cat(parts) for node, parts in messages.items()}

    def _exchange_between(
        self, outgoing: dict[int, torch.Tensor], rows_RR: NDArray[np.int64]
    ) -> dict[int, torch.Tensor]:
        """One message to each node that this rank leads, and one from it, all under way at once."""
        incoming: dict[int, torch.Tensor] = {}
        under_way = []
        for node, pair in self._inter_node.items():
            message = outgoing[node]
            rows = _total(rows_RR, self._ranks_of(node), self._peers)
            incoming[node] = message.new_empty((rows, *message.shape[1:]))
            received, sent = [0, 0], [0, 0]
            received[1 - pair.rank], sent[1 - pair.rank] = len(incoming[node]), len(message)
            under_way.append(pair.begin_all_to_all(incoming[node], message, received, sent))
        self.messages += len(outgoing)
        for pending in under_way:
            pending.wait()
        return incoming

    def _hand_out(
        self, incoming: dict[int, torch.Tensor], no_rows: torch.Tensor, rows_RR: NDArray[np.int64]
    ) -> list[torch.Tensor]:
        """Send each peer its rows from the nodes that this rank leads. Returns the rows from each peer."""
        by_peer: dict[int, list[torch.Tensor]] = {peer: [no_rows] for peer in self._peers}
        for node in self._led[self._rank]:
            pairs = [(source, peer) for source in self._ranks_of(node) for peer in self._peers]
            parts = incoming[node].split([int(rows_RR[pair]) for pair in pairs])
            for (_, peer), part in zip(pairs, parts, strict=True):
                by_peer[peer].append(part)
        outgoing = [torch.cat(parts) for parts in by_peer.values()]
        sizes = [_total(rows_RR, self._sources_led_by(peer), [self._rank]) for peer in self._peers]
        return self._exchange_in_node(outgoing, sizes)

    def _sort_handed_out(
        self, handed_out: Sequence[torch.Tensor], rows_RR: NDArray[np.int64]
    ) -> dict[int, torch.Tensor]:
        """Rows of the other nodes' ranks for this rank, by source."""
        by_source: dict[int, torch.Tensor] = {}
        for peer, rows in zip(self._peers, handed_out, strict=True):
            sources = self._sources_led_by(peer)
            parts = rows.split([int(rows_RR[source, self._rank]) for source in sources])
            by_source.update(zip(sources, parts, strict=True))
        return by_source

    def _exchange_in_node(self, outgoing: Sequence[torch.Tensor], received: list[int]) -> list[torch.Tensor]:
        """Send one tensor to each peer of the node. Returns the rows from each, in the sizes of `received`."""
        out = outgoing[0].new_empty((sum(received), *outgoing[0].shape[1:]))
        self._intra_node.all_to_all(out, torch.cat(list(outgoing)), received, [len(rows) for rows in outgoing])
        return list(out.split(received))

    def _ranks_of(self, node: int) -> list[int]:
        return self._leaders.ranks_of[node]

    def _sources_led_by(self, peer: int) -> list[int]:
        """Ranks of other nodes whose rows reach this node through `peer`."""
        return [rank for node in self._led[peer] for rank in self._ranks_of(node)]


def transport_for(group: Group, node_of_rank: Sequence[int] | None, by_node: bool) -> Transport:
    """The transport of a generation: `ByNode` where that is wanted and there are several nodes, else `Flat`."""
    if by_node and node_of_rank is not None and len(set(node_of_rank)) > 1:
        return ByNode(group, node_of_rank)
    return Flat(group)


def _total(rows_RR: NDArray[np.int64], sources: Sequence[int], targets: Sequence[int]) -> int:
    """Rows from any of the sources to any of the targets."""
    return int(rows_RR[np.ix_(list(sources), list(targets))].sum())
