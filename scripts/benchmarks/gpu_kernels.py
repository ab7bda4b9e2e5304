"""Checks of one GPU: `python3 -m scripts.benchmarks.gpu_kernels NAME --json FILE`.

- adamw: the update has a CPU's bits in 50 steps over gradients of all sizes; its bandwidth against a copy's.
- grouped: products of sorted rows, balanced, skewed and with idle experts, against a loop over the experts.
- step: a worker's steps in this process: waits, launches, memory against `elastic-moe describe`, utilisation.

Each needs torch and the other dependencies of the package, but Ray. On a CPU the same code runs at a small size, which
checks this script and nothing else.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from elastic_moe.cli.describe import memory, training_flops
from elastic_moe.config.schema import OptimConfig, TrainConfig
from elastic_moe.control.vote import Wishes
from elastic_moe.data.prepare import Prepared, prepare
from elastic_moe.data.shards import TokenShard
from elastic_moe.model.experts.grouped import grouped_swiglu, loop_swiglu
from elastic_moe.model.params import param_specs
from elastic_moe.model.transformer import Transformer
from elastic_moe.optim.adamw import apply_adamw
from elastic_moe.optim.unit_state import UnitState
from elastic_moe.parallel.collectives.abort import AbortSignal
from elastic_moe.parallel.collectives.backend import GroupMember
from elastic_moe.parallel.collectives.group import Group
from elastic_moe.parallel.collectives.store import Rendezvous
from elastic_moe.parallel.experts import experts_of
from elastic_moe.plan.state.units import build_units
from elastic_moe.runtime.batches import MicroBatches
from elastic_moe.runtime.initial import InitialWeights
from elastic_moe.runtime.local_state import LocalState
from elastic_moe.runtime.reconfigure import Reconfigurer
from elastic_moe.runtime.session import ContextBuilder
from elastic_moe.runtime.step import StepRunner
from elastic_moe.types import Member, View
from scripts.benchmarks.gpu_step import settings
from scripts.benchmarks.overhead import NoStorage

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
BF16_PEAK = {"H100": 989e12, "H200": 989e12}  # FLOP/s of dense products, from the vendor's datasheet
STUCK_S = 80.0  # then the check shows where it is, and ends
Result = dict[str, Any]


def timed(call: Callable[[], object], repeats: int = 10) -> float:
    """Seconds of a call, as the median of several, after two that are not counted."""
    found = []
    for number in range(2 + repeats):
        if CUDA:
            torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        if CUDA:
            torch.cuda.synchronize()
        found += [time.perf_counter() - started] if number >= 2 else []
    return statistics.median(found)


def adamw() -> Result:
    cfg, numel = OptimConfig(), 4_000_000 if CUDA else 10_000
    made = torch.Generator().manual_seed(1)
    host = UnitState({name: torch.randn(numel, generator=made) for name in ("weight", "m", "v")})
    host["v"].abs_()
    device = UnitState({name: tensor.to(DEVICE, copy=True) for name, tensor in host.fields.items()})
    equal = True
    for step in range(1, 51 if CUDA else 4):
        grad = torch.randn(numel, generator=made) * 10.0 ** torch.empty(numel).uniform_(-24, 4, generator=made)
        apply_adamw(host, grad, step, 1e-3, cfg, True)
        apply_adamw(device, grad.to(DEVICE), step, 1e-3, cfg, True)
        equal = equal and all(torch.equal(device[name].cpu(), tensor) for name, tensor in host.fields.items())
    numel = 400_000_000 if CUDA else 100_000
    state = UnitState({name: torch.rand(numel, device=DEVICE) for name in ("weight", "m", "v")})
    grad = torch.randn(numel, device=DEVICE)
    parameter = torch.nn.Parameter(state.weight.clone())
    parameter.grad = grad
    optimizer = torch.optim.AdamW([parameter], fused=True)
    update_s = timed(lambda: apply_adamw(state, grad, 3, 1e-3, cfg, True))
    copy_s, torch_s = timed(lambda: state["m"].copy_(grad)), timed(optimizer.step)
    found = {
        "bits_of_a_cpu": equal,
        "tb_per_s": 28 * numel / update_s / 1e12,
        "copy_tb_per_s": 8 * numel / copy_s / 1e12,
        "torch_fused_over_ours": torch_s / update_s,
    }
    return found | {"ok": equal and (not CUDA or found["tb_per_s"] > 0.8 * found["copy_tb_per_s"])}


def grouped() -> Result:
    shapes = (
        {"deepseek_v2_lite": (64, 2048, 1408), "qwen3_30b_a3b": (128, 2048, 768)} if CUDA else {"tiny": (4, 64, 32)}
    )
    rows = 32_768 if CUDA else 64
    found: Result = {"ok": True}
    for name, (experts, hidden, width) in shapes.items():
        gate_up = (torch.randn((experts, 2 * width, hidden), device=DEVICE) / hidden**0.5).requires_grad_()
        down = (torch.randn((experts, hidden, width), device=DEVICE) / width**0.5).requires_grad_()
        x = torch.randn((rows, hidden), device=DEVICE, dtype=torch.bfloat16).requires_grad_()
        loads = {
            "balanced": torch.ones(experts),
            "zipf": 1 / torch.arange(1.0, experts + 1),
            "half idle": (torch.arange(experts) % 2).float(),
        }
        for load, weight in loads.items():
            counts = (weight / weight.sum() * rows).long()
            counts[int(counts.argmax())] += rows - int(counts.sum())
            counts = counts.to(DEVICE)
            outs = [
                grouped_swiglu(x, counts, gate_up, down),
                loop_swiglu(x, counts, gate_up.to(x.dtype), down.to(x.dtype)),
            ]
            error = float((outs[0] - outs[1]).float().norm() / outs[1].float().norm())
            stacks = [t.detach().to(x.dtype).requires_grad_() for t in (gate_up, down)]

            ours_s, loop_s = (timed(_both_ways(form, x, counts, stacks), 5) for form in (grouped_swiglu, loop_swiglu))
            rate = 18 * rows * hidden * width / ours_s
            found[f"{name}, {load}"] = {"tflop_per_s": rate / 1e12, "loop_over_ours": loop_s / ours_s, "error": error}
            found["ok"] = found["ok"] and error < 1e-2
    return found


def _both_ways(
    form: Callable[..., torch.Tensor], x: torch.Tensor, counts: torch.Tensor, stacks: list[torch.Tensor]
) -> Callable[[], None]:
    """A forward and a backward pass."""
    return lambda: form(x, counts, *stacks).backward(x.detach())


def one_worker(config: TrainConfig, prepared: Prepared) -> Callable[[], Result]:
    """A worker that is alone, in this process. A call makes a step and returns its record."""
    specs = param_specs(config.model, config.optim.name)
    units, model = build_units(specs, config.model.max_unit_elements), Transformer(config.model, None).to(DEVICE)

    def autocast() -> AbstractContextManager[object]:
        return torch.autocast(DEVICE.type, torch.bfloat16, enabled=config.precision == "bf16")

    def no_fault(_step: int, _phase: str) -> None: ...

    train = TokenShard.open(prepared.train_path)
    runner = StepRunner(config, model, train, MicroBatches(config.data, DEVICE), no_fault, autocast)
    view, local = View(1, (Member("w0", "n0", 0),)), LocalState()
    group = Group(GroupMember(1, 0, 1), Rendezvous("nowhere", 0, "", 1.0), AbortSignal(), device=DEVICE)
    shape, initial = (config.model.num_moe_layers, config.model.num_experts), InitialWeights(config.model, specs, 0)
    entered = Reconfigurer(config, units, shape, local, lambda _: None, NoStorage(), initial, no_fault).enter(
        view, group
    )
    model.experts = experts = experts_of(group, entered.placement, config.model, DEVICE)
    builder = ContextBuilder(units, model, runner.gradients.tensors, shape[0])
    context = builder.build(view, group, experts, entered.held, entered.ownership, entered.placement)
    context.exchanger.publish(frozen=True)
    return lambda: runner.train_step(context, local, Wishes).record


def step() -> Result:
    shape = {"hidden_size": 1024, "num_layers": 6, "num_heads": 16, "kv_latent": 256, "dense_hidden": 2816}
    shape |= {"num_experts": 32, "expert_hidden": 512}
    sequences, seq_len = 16, 1024
    if not CUDA:
        shape |= {"hidden_size": 64, "num_layers": 2, "num_heads": 2, "kv_latent": 32, "dense_hidden": 128}
        shape |= {"num_experts": 8, "expert_hidden": 32}
        sequences, seq_len = 2, 64
    found: Result = {"ok": True}
    for residual in ("plain", "mhc"):
        with tempfile.TemporaryDirectory(prefix="emoe-bench") as root:
            config = settings(Path(root) / "run", 20, shape | {"residual": residual}, (sequences, seq_len), DEVICE.type)
            prepared = prepare(config.data, Path(root) / "cache")
            config = replace(config, model=replace(config.model, vocab_size=prepared.vocab_size))
            if CUDA:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            found[residual] = _measured(config, one_worker(config, prepared))
    return found


def _measured(config: TrainConfig, make: Callable[[], Result]) -> Result:
    """A step's seconds and share of the peak; on a GPU, its memory, host waits and launches too."""
    step_s = timed(make, 6)
    tokens = config.data.global_batch * config.data.seq_len
    found: Result = {"step_s": step_s, "tokens_per_s": tokens / step_s, "phases": _phases(make())}
    if not CUDA:
        return found
    peak, predicted = torch.cuda.max_memory_allocated(), memory(config, 1).total
    found |= {"peak_bytes": peak, "described_bytes": predicted, "peak_over_described": peak / predicted}
    flops = training_flops(config.model, config.data.seq_len) * tokens / step_s
    at = next((value for name, value in BF16_PEAK.items() if name in torch.cuda.get_device_name()), None)
    found |= {"tflop_per_s": flops / 1e12, "utilisation": at and flops / at}
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profile:
        make()
        torch.cuda.synchronize()
    rows = profile.key_averages()
    kernels = [row for row in rows if row.device_type == torch.autograd.DeviceType.CUDA]
    found["waits"] = sum(row.count for row in rows if row.key == "cudaStreamSynchronize")
    found["launches"] = sum(row.count for row in kernels)
    found["device_s"] = sum(row.self_device_time_total for row in kernels) / 1e6
    longest = sorted(kernels, key=lambda row: -row.self_device_time_total)[:12]
    found["longest"] = {row.key[:80]: round(row.self_device_time_total / 1e3, 3) for row in longest}
    return found


def _phases(record: Result) -> Result:
    return {name: record[name] for name in record if name.endswith("_s") and name.split("_")[0] in PHASES}


PHASES = ("compute", "reduce", "mirror", "vote", "apply", "publish")
CHECKS: dict[str, Callable[[], Result]] = {"adamw": adamw, "grouped": grouped, "step": step}


def main() -> int:
    parser = argparse.ArgumentParser(prog="gpu_kernels", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", choices=sorted(CHECKS))
    parser.add_argument("--json", type=Path, required=True, help="file that takes the result")
    options = parser.parse_args()
    faulthandler.dump_traceback_later(STUCK_S, exit=True)
    result = CHECKS[options.name]()
    faulthandler.cancel_dump_traceback_later()
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
