"""Cost of control at many ranks: the coordinator under simulated workers, planning of a view, control work of a step.

- Coordinator: a real `ControlServer` in this process. The workers are connections of one other process, which send
  heartbeats at the default interval and enter every view. Its processor time is that of this process.
- Planning: everything that one rank computes on entering a view after a death, at DeepSeek-V3's units.
- Step: what one rank computes in each layer (the token split) and in each step (a look for a better placement; if the
  ranks are many, it goes on in a thread of its own beside the next step, and `look` is what is left to the step).

Planning and step are measured in processor time of the one thread that does the work, the placement of a whole view,
for which all cores are used, in wall-clock time.

The growth exponent of a cost is the slope between the smallest and the largest number of ranks, in logarithms.
"""

from __future__ import annotations

import math
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from elastic_moe.cli.compose import check, register_schema
from elastic_moe.config.schema import BalanceConfig, TrainConfig
from elastic_moe.control.rebalance import Rebalancer
from elastic_moe.control.vote import Measures, VoteResult
from elastic_moe.coordination.server import ControlServer
from elastic_moe.model.params import param_specs
from elastic_moe.plan.placement import Placement, Topology, default_slots, plan_placement
from elastic_moe.plan.shares import Speeds
from elastic_moe.plan.split import slowest_times, split_for_rank
from elastic_moe.plan.state.ownership import copies_from_roles, homes_from_roles, plan_ownership
from elastic_moe.plan.state.schedule import Layout
from elastic_moe.plan.state.transfers import plan_transfers
from elastic_moe.plan.state.units import Units, build_units
from elastic_moe.types import Member, ModelStats, View
from scripts.benchmarks.common import arguments, machine, median, run, say
from scripts.benchmarks.scale_clients import TOKEN, SimulatedWorkers

RANKS_PER_NODE = 8
FORM_LIMIT_S = 40.0
DEATHS = 3
TOKENS_PER_RANK = 4096
STEP_S = 0.1  # of the model's work between two looks; at this size it is longer
UNIT_ELEMENTS = 3_460_000  # cuts DeepSeek-V3 into about 20,800 units


def coordinator(num_workers: int, window_s: float) -> dict[str, Any]:
    """Costs of the coordinator with this number of workers; what could not be measured in time is null."""
    config = TrainConfig()
    events: list[dict[str, Any]] = []
    server = ControlServer(config, TOKEN, num_workers, on_event=events.append)
    result: dict[str, Any] = {"workers": num_workers, "formed_s": None, "cores": None, "published_to_all_s": None}
    started_s = time.monotonic()
    try:
        with SimulatedWorkers(server.start(), num_workers, RANKS_PER_NODE, config.elastic.heartbeat_s) as workers:
            if not _entered(server, num_workers, started_s + FORM_LIMIT_S):
                return result | {"false_evictions": _evictions(events)}
            result["formed_s"] = time.monotonic() - started_s
            begin_s, begin_cpu_s = time.monotonic(), time.process_time()
            time.sleep(window_s)
            result["cores"] = (time.process_time() - begin_cpu_s) / (time.monotonic() - begin_s)
            deaths = []
            for death in range(DEATHS):
                deaths.append(workers.kill(3 * death + 1, FORM_LIMIT_S))
                if deaths[-1] is None or not _entered(server, num_workers - death - 1, time.monotonic() + FORM_LIMIT_S):
                    break
            answered = [seconds for seconds in deaths if seconds is not None]
            result["published_to_all_s"] = median(answered) if answered else None
    finally:
        server.close()
    return result | {"false_evictions": _evictions(events)}


def _entered(server: ControlServer, num_workers: int, deadline_s: float) -> bool:
    """Wait until a view of so many workers is entered by all. Returns False if that takes too long."""
    while time.monotonic() < deadline_s:
        status = server.status()
        if status["entered"] and status["world_size"] == num_workers:
            return True
        time.sleep(0.02)
    return False


def _evictions(events: Sequence[dict[str, Any]]) -> int:
    return sum(event["event"] == "worker_evicted" for event in events)


def seconds_of(function: Callable[[], Any], repeats: int = 3, clock: Callable[[], float] = time.thread_time) -> float:
    """Least time of several calls, on this thread's processor clock: other work of the machine only adds to it."""
    times = []
    for _ in range(repeats):
        started_s = clock()
        function()
        times.append(clock() - started_s)
    return min(times)


def _view(num_ranks: int) -> View:
    return View(1, tuple(Member(f"w{r}", f"n{r // RANKS_PER_NODE}", r) for r in range(num_ranks)))


def _topology(view: View, in_nodes: bool = False) -> Topology:
    return Topology(tuple(m.node for m in view.members), Speeds.equal(view).rows, in_nodes)


def planning(units: Units, load_LE: np.ndarray, num_ranks: int, in_nodes: bool = False) -> dict[str, float]:
    """Seconds of each part of planning the view after one of `num_ranks` + 1 ranks has died.

    `in_nodes`: each node has a copy of every expert, of which there is one otherwise.
    """
    before, shape, dead = _view(num_ranks + 1), load_LE.shape, num_ranks // 2
    placed = plan_placement(load_LE, _topology(before, in_nodes), default_slots(shape[1], before, 1, 0, 1, in_nodes))
    none_RU = np.zeros((num_ranks + 1, len(units)), np.uint8)
    first = plan_ownership(units, before, none_RU, 1, placed.home)
    roles_RU = np.delete(first.roles(num_ranks + 1), dead, axis=0)
    view = View(2, before.members[:dead] + before.members[dead + 1 :])
    homes = homes_from_roles(units, roles_RU, view.active_ranks, shape)
    there = np.zeros((shape[0], 0), np.int32), np.zeros(0, np.int32)
    slots = default_slots(shape[1], view, 1, 0, 1, in_nodes)

    def place() -> Placement:
        held = copies_from_roles(units, roles_RU, view.active_ranks, shape) if in_nodes else there
        return plan_placement(load_LE, _topology(view, in_nodes), slots, Placement(*held, homes), home_moves=0)

    placement = place()
    ownership = plan_ownership(units, view, roles_RU, 1, placement.home)
    parts = {
        "homes": seconds_of(lambda: homes_from_roles(units, roles_RU, view.active_ranks, shape)),
        "placement": seconds_of(place, clock=time.perf_counter),  # in several threads
        "ownership": seconds_of(lambda: plan_ownership(units, view, roles_RU, 1, placement.home)),
        "transfers": seconds_of(lambda: plan_transfers(roles_RU, ownership)),
        "schedules": seconds_of(lambda: Layout(units, view, 0, ownership, placement)),
    }
    return parts | {"all": sum(parts.values())}


def step(units: Units, load_LE: np.ndarray, num_ranks: int) -> dict[str, float]:
    """Seconds of one rank's control work in its step: the split of one layer, and a look for a better placement."""
    view, shape = _view(num_ranks), load_LE.shape
    placement = plan_placement(load_LE, _topology(view), default_slots(shape[1], view, 1, 0))
    none_RU = np.zeros((num_ranks, len(units)), np.uint8)
    ownership = plan_ownership(units, view, none_RU, 1, placement.home)
    rng = np.random.default_rng(1)
    popularity_E = load_LE[0] * rng.uniform(0.7, 1.3, shape[1])
    counts_RE = rng.multinomial(TOKENS_PER_RANK * 8, popularity_E / popularity_E.sum(), size=num_ranks)
    balancer = Rebalancer(BalanceConfig(home_moves=0), view, units, 1, placement, ownership)
    times_L = slowest_times(load_LE, placement, [1.0] * num_ranks)
    looks = []
    for number in range(1, 7):
        vote = _vote(number, load_LE * rng.uniform(0.9, 1.1, shape), times_L, num_ranks)
        looks.append(seconds_of(lambda vote=vote: balancer.propose(vote), repeats=1))
        time.sleep(STEP_S)
    return {"split": seconds_of(lambda: split_for_rank(counts_RE, placement, 0, 0), 10), "look": max(looks)}


def _vote(number: int, load_LE: np.ndarray, times_L: np.ndarray, num_ranks: int) -> VoteResult:
    measures = Measures(
        expert_s=1.0, expert_rows=1000.0, cross_node_rows=0.0, publish_s=1.0, publish_bytes=1e9, switch_s=0.0
    )
    sums = dict.fromkeys(("ce_sum", "tokens", "grad_square"), 1.0)
    sums |= dict.fromkeys(("nonfinite", "reconfigure", "stop", "save"), 0.0)
    return VoteResult(
        **sums,
        stats=ModelStats(),
        measures=measures,
        load_LE=load_LE,
        step=number,
        generation=1,
        world_size=num_ranks,
        balance=1.0,
        layer_time_L=times_L,
        spike=False,
    )


def exponents(rows: Sequence[dict[str, Any]], size: str) -> dict[str, float | None]:
    """Slope of each cost between the first and the last row in which it was measured, in logarithms."""
    slopes: dict[str, float | None] = {}
    for name in rows[0]:
        found = [(row[size], row[name]) for row in rows if row[name]]
        if name != size:
            (a, x), (b, y) = (found[0], found[-1]) if len(found) > 1 else ((1, 1.0), (1, 1.0))
            slopes[name] = round(math.log(y / x) / math.log(b / a), 2) if b > a else None
    return slopes


def benchmark(sizes: Sequence[int], window_s: float) -> dict[str, Any]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max(sizes) + 256
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard), hard))
        if hard < wanted:
            say(f"at most {hard} open files are allowed here, so larger numbers of workers are left out")
            sizes = [size for size in sizes if size + 256 <= hard]
    facts = machine()
    register_schema()
    with tempfile.TemporaryDirectory(prefix="emoe-bench") as root:
        config = check(["model=deepseek_v3", f"run.dir={root}/run"])[0]
    config = replace(config, model=replace(config.model, max_unit_elements=UNIT_ELEMENTS))
    units = build_units(param_specs(config.model), config.model.max_unit_elements)
    shape = config.model.num_moe_layers, config.model.num_experts
    load_LE = np.random.default_rng(0).pareto(1.5, shape) * 1000 + 50
    planning(units, load_LE, RANKS_PER_NODE)  # compiles
    step(units, load_LE, RANKS_PER_NODE)
    rows: dict[str, list[dict[str, Any]]] = {"planning_s": [], "in_nodes_s": [], "step_s": [], "coordinator": []}
    for size in sizes:
        rows["planning_s"].append({"ranks": size} | planning(units, load_LE, size))
        rows["in_nodes_s"].append({"ranks": size} | planning(units, load_LE, size, in_nodes=True))
        rows["step_s"].append({"ranks": size} | step(units, load_LE, size))
        flat_s, in_nodes_s = (rows[name][-1]["all"] for name in ("planning_s", "in_nodes_s"))
        say(f"{size} ranks: {flat_s:.3f} s of planning, {in_nodes_s:.3f} with copies on every node")
        rows["coordinator"].append(coordinator(size, window_s))
        say(f"{size} workers: {rows['coordinator'][-1]}")
    slopes = {name: exponents(rows[name], "workers" if name == "coordinator" else "ranks") for name in rows}
    for name, slope in slopes.items():
        say(f"growth exponents, {name}: {slope}")
    settings = {"units": len(units), "layers": shape[0], "experts": shape[1], "window_s": window_s}
    return {"benchmark": "scale", "machine": facts, "settings": settings, **rows, "growth_exponents": slopes}


def main() -> int:
    parser = arguments("scale", "Cost of control at many ranks.")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 256, 1024], help="numbers of ranks")
    parser.add_argument("--window-s", type=float, default=10.0, help="seconds for which the coordinator is watched")
    given = parser.parse_args()
    if min(given.sizes) < 2 * RANKS_PER_NODE:
        parser.error(f"--sizes must be at least {2 * RANKS_PER_NODE}.")
    sizes, window_s = ([16, 32], 1.0) if given.quick else (sorted(given.sizes), given.window_s)
    return run(lambda: benchmark(sizes, window_s), Path(given.json))


if __name__ == "__main__":
    sys.exit(main())
