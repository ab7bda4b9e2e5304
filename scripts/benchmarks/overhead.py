"""Cost of elasticity while nothing happens: step time of the whole system against a plain loop.

- Full: four workers with a coordinator, heartbeats, records, and one mirror of every unit.
- Plain: four processes with the same model, expert parallelism, reduce and publish, but without mirrors, coordinator,
  heartbeats and records.

Both sides need the small all-reduce of loss and gradient norm, as any sharded trainer does. On the plain side it
carries our flags as constants. The sides take turns (ABAB), so that a machine whose speed drifts favours neither. The
first steps of a round are not counted. Both sides are plain processes without Ray, because Ray takes no part in a step.
"""

from __future__ import annotations

import contextlib
import multiprocessing as mp
import os
import queue
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from elastic_moe.config.build import build
from elastic_moe.config.schema import TrainConfig
from elastic_moe.control.vote import Wishes
from elastic_moe.coordination.coordinator import RunCoordinator
from elastic_moe.coordination.rendezvous import RendezvousServer
from elastic_moe.data.prepare import Prepared, prepare
from elastic_moe.data.shards import TokenShard
from elastic_moe.model.params import param_specs
from elastic_moe.model.transformer import Transformer
from elastic_moe.parallel.collectives.abort import AbortSignal
from elastic_moe.parallel.collectives.backend import GroupMember
from elastic_moe.parallel.collectives.group import Group
from elastic_moe.parallel.collectives.store import Rendezvous
from elastic_moe.parallel.experts import experts_of
from elastic_moe.plan.shares import Batching
from elastic_moe.plan.state.units import build_units
from elastic_moe.runtime.batches import MicroBatches
from elastic_moe.runtime.initial import InitialWeights
from elastic_moe.runtime.local_state import LocalState
from elastic_moe.runtime.reconfigure import Reconfigurer, Restored
from elastic_moe.runtime.session import ContextBuilder
from elastic_moe.runtime.step import StepRunner
from elastic_moe.types import Member, View
from scripts.benchmarks.common import arguments, machine, median, run, say

WORKERS = 4
WARMUP_STEPS = 3
ROUND_LIMIT_S = 900.0
TOKEN = "benchmark"


def settings(run_dir: Path, steps: int, hidden: int, sequences: int, seq_len: int) -> TrainConfig:
    model = {
        "hidden_size": hidden,
        "num_layers": 4,
        "num_heads": hidden // 32,
        "num_kv_heads": hidden // 64,
        "head_dim": 32,
        "dense_hidden": 3 * hidden,
        "num_experts": 16,
        "experts_per_token": 4,
        "expert_hidden": hidden // 2,
    }
    data = {"tokenizer": "bytes", "max_bytes": 1_000_000}
    return build(
        {
            "device": "cpu",
            "model": model,
            "run": {"dir": str(run_dir), "steps": WARMUP_STEPS + steps, "eval_every_steps": 0, "sample_tokens": 0},
            "data": data | {"seq_len": seq_len, "global_batch": sequences, "micro_batch": 8},
            "elastic": {"redundancy": 1},
            "checkpoint": {"every_steps": 0},
            "tracking": {"wandb": "off"},
        }
    )


class NoStorage:
    """There is no checkpoint: the plain loop starts from the initial weights."""

    def restore(self, group: Group, names: Sequence[str], expected: bool) -> Restored:
        return Restored()


def full_worker(config: TrainConfig, address: tuple[str, int], prepared: Prepared, rank: int) -> None:
    from elastic_moe.runtime.worker import run_worker

    run_worker(config, lambda: address, TOKEN, f"n{rank}", prepared, f"w{rank}")


def _plain_worker(config: TrainConfig, port: int, prepared: Prepared, rank: int, results: Any) -> None:
    """The loop without elasticity: one generation, set up as `Worker` does it, and steps until the last one."""
    torch.set_num_threads(config.threads)
    specs = param_specs(config.model, config.optim.name)
    units = build_units(specs, config.model.max_unit_elements)
    shape = (config.model.num_moe_layers, config.model.num_experts)
    device = torch.device("cpu")
    model = Transformer(config.model, None)

    def no_fault(_step: int, _phase: str) -> None: ...

    train = TokenShard.open(prepared.train_path)
    runner = StepRunner(config, model, train, MicroBatches(config.data, device), no_fault, contextlib.nullcontext)
    view = View(1, tuple(Member(f"w{r}", f"n{r}", 0) for r in range(WORKERS)))
    group = Group(
        GroupMember(1, rank, WORKERS),
        Rendezvous("127.0.0.1", port, "secret", config.elastic.form_timeout_s),
        AbortSignal(),
    )
    local = LocalState()
    initial = InitialWeights(config.model, specs, config.seed)
    reconfigurer = Reconfigurer(
        config,
        units,
        shape,
        local,
        lambda vote: runner.roll_forward(local, vote),
        NoStorage(),
        initial,
        no_fault,
    )
    result = reconfigurer.enter(view, group)
    model.experts = experts = experts_of(group, result.placement, config.model, device)
    builder = ContextBuilder(
        units, model, runner.gradients.tensors, shape[0], Batching(config.data.global_batch, config.data.micro_batch)
    )
    context = builder.build(view, group, experts, result.held, result.ownership, result.placement)
    context.exchanger.publish()
    times = []
    while local.committed < config.run.steps:
        outcome = runner.train_step(context, local, Wishes)
        times.append((outcome.record["time"], outcome.record["loss"]))
    group.barrier()
    if rank == 0:
        results.put(times)
    group.close()


@contextmanager
def processes(target: Any, arguments_by_rank: list[tuple[Any, ...]]) -> Iterator[list[Any]]:
    """Run one process per rank; none outlives the block."""
    context = mp.get_context("spawn")
    processes = [context.Process(target=target, args=args, daemon=True) for args in arguments_by_rank]
    try:
        for process in processes:
            process.start()
        yield processes
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join(10)


def wait_all(processes: list[Any]) -> None:
    deadline_s = time.monotonic() + ROUND_LIMIT_S
    for process in processes:
        process.join(max(0.0, deadline_s - time.monotonic()))
        if process.exitcode != 0:
            raise TimeoutError(f"a worker did not end well within {ROUND_LIMIT_S:.0f} s (exit code {process.exitcode})")


def full(config: TrainConfig, prepared: Prepared, workers: int = WORKERS) -> list[tuple[float, float]]:
    """(time, loss) of every committed step of the full machinery."""
    coordinator = RunCoordinator(config, TOKEN, workers)
    try:
        by_rank = [(config, coordinator.address, prepared, rank) for rank in range(workers)]
        with processes(full_worker, by_rank) as started:
            wait_all(started)
        return [(record["time"], record["loss"]) for record in coordinator.records_since(0)]
    finally:
        coordinator.close()


def plain(config: TrainConfig, prepared: Prepared) -> list[tuple[float, float]]:
    """(time, loss) of every step of the plain loop."""
    config = replace(config, elastic=replace(config.elastic, redundancy=0))
    rendezvous = RendezvousServer("127.0.0.1", "secret")
    rendezvous.start()
    results = mp.get_context("spawn").Queue()
    by_rank = [(config, rendezvous.port, prepared, rank, results) for rank in range(WORKERS)]
    try:
        with processes(_plain_worker, by_rank) as started:
            wait_all(started)
            try:
                return results.get(timeout=10)
            except queue.Empty:
                raise TimeoutError("the plain loop gave no result") from None
    finally:
        rendezvous.close()


def benchmark(rounds: int, steps: int, hidden: int, sequences: int, seq_len: int) -> dict[str, Any]:
    os.environ["OMP_NUM_THREADS"] = "1"
    facts = machine()
    sides = {"full": full, "plain": plain}
    gaps: dict[str, list[list[float]]] = {name: [] for name in sides}
    losses: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="emoe-bench") as root:
        for number in range(rounds):
            for name, side in sides.items():
                config = settings(Path(root) / f"{name}{number}", steps, hidden, sequences, seq_len)
                Path(config.run.dir).mkdir()
                prepared = prepare(config.data, Path(root) / "cache")
                config = replace(config, model=replace(config.model, vocab_size=prepared.vocab_size))
                done = side(config, prepared)
                times = [at for at, _ in done][WARMUP_STEPS - 1 :]
                gaps[name].append([b - a for a, b in pairwise(times)])
                losses[name] = done[-1][1]
                say(f"round {number + 1} of {rounds}, {name}: median step {median(gaps[name][-1]):.3f} s")
    rounds_of = {name: [median(one) or 0.0 for one in gaps[name]] for name in sides}
    ratios = [a / b for a, b in zip(rounds_of["full"], rounds_of["plain"], strict=True)]
    medians = {name: median([gap for one in gaps[name] for gap in one]) for name in sides}
    return {
        "benchmark": "overhead",
        "machine": facts,
        "settings": {
            "workers": WORKERS,
            "rounds": rounds,
            "steps_per_round": steps,
            "sequences": sequences,
            "seq_len": seq_len,
            "model": asdict(config.model),
        },
        "median_step_s": medians,
        "median_step_s_by_round": rounds_of,
        "full_over_plain": median(ratios),
        "full_over_plain_by_round": ratios,
        "final_loss": losses,
    }


def main() -> int:
    parser = arguments("overhead", "Step time of the full machinery against a plain loop.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12, help="counted steps of a round")
    parser.add_argument("--hidden", type=int, default=256, help="a multiple of 64")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=256)
    given = parser.parse_args()
    if given.hidden % 64 or given.hidden < 64 or given.rounds < 1 or given.steps < 2:
        parser.error("--hidden must be a multiple of 64, --rounds at least 1 and --steps at least 2.")
    sizes = (
        (1, 4, 64, 16, 64) if given.quick else (given.rounds, given.steps, given.hidden, given.sequences, given.seq_len)
    )
    return run(lambda: benchmark(*sizes), given.json)


if __name__ == "__main__":
    sys.exit(main())
