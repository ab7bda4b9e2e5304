"""Which rank exchanges with which node."""

from __future__ import annotations

from elastic_moe.parallel.transport import NodeLeaders


def test_each_pair_of_nodes_has_its_own_leaders() -> None:
    leaders = NodeLeaders([0, 0, 1, 2, 2, 2])
    assert leaders.ranks_of == {0: [0, 1], 1: [2], 2: [3, 4, 5]}
    assert [leaders.node_leader(0, other) for other in (1, 2)] == [1, 0]
    assert [leaders.node_leader(1, other) for other in (0, 2)] == [2, 2]
    assert [leaders.led_nodes(rank) for rank in range(6)] == [[2], [1], [0, 2], [0], [1], []]
    for rank, node in enumerate([0, 0, 1, 2, 2, 2]):
        for other in leaders.led_nodes(rank):
            assert leaders.node_leader(node, other) == rank
