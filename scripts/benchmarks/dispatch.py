"""Tokens straight to every rank, or by way of the nodes: messages between nodes, and time, on simulated nodes.

Processes of this machine play the ranks of several nodes. Both ways send the same rows, in turn; the ratio of their
times on one machine says what the second way costs where messages are cheap, and the number of messages what it saves
where they are not.
"""

from __future__ import annotations

import multiprocessing as mp
import statistics
import time
from typing import Any

import numpy as np
import torch

from elastic_moe.coordination.rendezvous import RendezvousServer
from elastic_moe.parallel.collectives.abort import AbortSignal
from elastic_moe.parallel.collectives.backend import GroupMember
from elastic_moe.parallel.collectives.group import Group
from elastic_moe.parallel.collectives.store import Rendezvous
from elastic_moe.parallel.transport import ByNode, Flat
from scripts.benchmarks import common

CASES = [
    (8, 2, 16, 256),
    (8, 4, 16, 256),
    (8, 4, 2, 64),
    (8, 4, 128, 256),
    (12, 3, 16, 256),
]  # ranks, nodes, mean rows, width


def _rank(rank: int, case: tuple[int, int, int, int], port: int, rounds: int, results: Any) -> None:
    torch.set_num_threads(1)
    ranks, nodes, mean, width = case
    group = Group(GroupMember(1, rank, ranks), Rendezvous("127.0.0.1", port, "secret", 60.0), AbortSignal())
    node_of_rank = [r * nodes // ranks for r in range(ranks)]
    by_node = ByNode(group, node_of_rank)
    ways = {"flat": Flat(group), "by_node": by_node}
    rows_RR = np.random.default_rng(0).poisson(mean, (ranks, ranks))
    sent, arrive = rows_RR[rank].tolist(), rows_RR[:, rank].tolist()
    rows = torch.randn(sum(sent), width, generator=torch.Generator().manual_seed(rank))
    took: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        out = []
        for name, way in ways.items():
            group.barrier()
            begin = time.perf_counter()
            out.append(way(rows, sent, arrive, rows_RR))
            took[name].append(time.perf_counter() - begin)
        assert torch.equal(out[0], out[1]), "both ways must bring the same rows"
    far = sum(node != node_of_rank[rank] and rows_RR[rank, r] > 0 for r, node in enumerate(node_of_rank))
    results.put((took, int(far), by_node.messages // rounds))
    group.barrier()
    group.close()


def one_case(case: tuple[int, int, int, int], rounds: int) -> dict[str, Any]:
    """Both ways in turn; a round's time is that of its slowest rank."""
    rendezvous = RendezvousServer("127.0.0.1", "secret")
    rendezvous.start()
    context = mp.get_context("spawn")
    results = context.Queue()
    processes = [
        context.Process(target=_rank, args=(r, case, rendezvous.port, rounds, results)) for r in range(case[0])
    ]
    for process in processes:
        process.start()
    found = [results.get(timeout=120) for _ in processes]
    for process in processes:
        process.join(60)
    rendezvous.close()
    slowest = {
        name: [max(took[name][i] for took, _, _ in found) for i in range(rounds)] for name in ("flat", "by_node")
    }
    ratios = [a / b for a, b in zip(slowest["by_node"], slowest["flat"], strict=True)]
    return {
        "ranks": case[0], "nodes": case[1], "rows_per_pair": case[2], "width": case[3],
        "messages_between_nodes_flat": sum(far for _, far, _ in found),
        "messages_between_nodes_by_node": sum(messages for _, _, messages in found),
        "flat_ms": round(1e3 * statistics.median(slowest["flat"]), 3),
        "by_node_ms": round(1e3 * statistics.median(slowest["by_node"]), 3),
        "time_by_node_over_flat": round(statistics.median(ratios), 3),
    }  # fmt: skip


def measure(quick: bool) -> dict[str, Any]:
    """All cases."""
    rows = []
    for case in CASES[:1] if quick else CASES:
        rows.append(one_case(case, 5 if quick else 40))
        common.say(f"{case[0]} ranks on {case[1]} nodes: {rows[-1]['time_by_node_over_flat']} times the time")
    return {"benchmark": "dispatch", "machine": common.machine(), "cases": rows}


if __name__ == "__main__":
    parser = common.arguments("dispatch", __doc__.split("\n")[0])
    args = parser.parse_args()
    raise SystemExit(common.run(lambda: measure(args.quick), args.json))
