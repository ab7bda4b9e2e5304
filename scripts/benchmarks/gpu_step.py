"""Tokens per second of one GPU: a worker of the product against a plain loop with transformers' DeepSeek-V3.

- Product: one worker process of a real run (coordinator, heartbeats, records), `device=cuda`, `precision=bf16`. Ray is
  left out, for it takes no part in a step.
- Plain: the same shape of `DeepseekV3ForCausalLM` with its grouped experts and SDPA attention, bf16 autocast over fp32
  weights, and torch's fused AdamW.

The sides take turns, each in a process of its own. The first steps of a round are not counted.
"""

from __future__ import annotations

import multiprocessing as mp
import sys
import tempfile
import time
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from elastic_moe.config.build import build
from elastic_moe.config.schema import TrainConfig
from elastic_moe.data.prepare import prepare
from scripts.benchmarks.common import arguments, machine, median, run, say
from scripts.benchmarks.overhead import WARMUP_STEPS, full
from scripts.benchmarks.transformers_shape import same_shape

VOCABULARY = 257
LIMIT_S = 200.0


def settings(run_dir: Path, steps: int, shape: dict[str, int], batch: tuple[int, int], device: str) -> TrainConfig:
    """`batch`: sequences, and tokens of each."""
    sequences, seq_len = batch
    model = shape | {
        "attention": "mla", "head_dim": 64, "rope_dim": 32, "value_dim": 64, "num_dense_layers": 1,
        "num_shared_experts": 1, "experts_per_token": 4, "seq_balance_weight": 0.0,
    }  # fmt: skip
    return build(
        {
            "device": device,
            "precision": "bf16",
            "model": model,
            "run": {"dir": str(run_dir), "steps": WARMUP_STEPS + steps, "eval_every_steps": 0, "sample_tokens": 0},
            "data": {"tokenizer": "bytes", "max_bytes": 8_000_000, "seq_len": seq_len, "global_batch": sequences}
            | {"micro_batch": sequences},
            "checkpoint": {"every_steps": 0},
            "tracking": {"wandb": "off"},
            "threads": 8,
        }
    )  # fmt: skip


def _plain(config: TrainConfig, results: Any) -> None:
    """The plain loop; puts (seconds of each step, peak bytes, implementations)."""
    device = torch.device(config.device)
    model = same_shape(config.model).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    data = config.data
    generator = torch.Generator().manual_seed(0)
    batches = torch.randint(0, VOCABULARY, (8, data.global_batch, data.seq_len), generator=generator)
    times = []
    for step in range(config.run.steps):
        tokens = batches[step % len(batches)].to(device)
        started = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        loss.item()  # waits for the device
        times.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    kinds = {"attention": model.config._attn_implementation, "experts": model.config._experts_implementation}
    results.put((times, peak, kinds))


def plain(config: TrainConfig) -> tuple[list[float], int, dict[str, str]]:
    context = mp.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=_plain, args=(config, results), daemon=True)
    process.start()
    try:
        return results.get(timeout=LIMIT_S)
    finally:
        process.join(10)
        if process.is_alive():
            process.kill()


def benchmark(rounds: int, steps: int, shape: dict[str, int], sequences: int, seq_len: int, device: str) -> Any:
    facts = machine() | {"device": torch.cuda.get_device_name() if device == "cuda" else "cpu"}
    tokens, config = sequences * seq_len, None
    found: dict[str, list[float]] = {"product": [], "plain": []}
    kinds: dict[str, str] = {}
    peak = 0
    with tempfile.TemporaryDirectory(prefix="emoe-bench") as root:
        for number in range(rounds):
            config = settings(Path(root) / f"run{number}", steps, shape, (sequences, seq_len), device)
            Path(config.run.dir).mkdir()
            prepared = prepare(config.data, Path(root) / "cache")
            config = replace(config, model=replace(config.model, vocab_size=prepared.vocab_size))
            at = [time_s for time_s, _ in full(config, prepared, 1)][WARMUP_STEPS - 1 :]
            found["product"].append(tokens / (median([b - a for a, b in pairwise(at)]) or 1e9))
            say(f"round {number + 1} of {rounds}, product: {found['product'][-1]:.0f} tokens/s")
            times, peak, kinds = plain(config)
            found["plain"].append(tokens / (median(times[WARMUP_STEPS:]) or 1e9))
            say(f"round {number + 1} of {rounds}, plain: {found['plain'][-1]:.0f} tokens/s")
    assert config is not None
    return {
        "benchmark": "gpu_step",
        "machine": facts,
        "tokens_per_step": tokens,
        "model": asdict(config.model),
        "plain": kinds | {"peak_bytes": peak},
        "tokens_per_s": found,
        "product_over_plain": median([a / b for a, b in zip(found["product"], found["plain"], strict=True)]),
    }


def main() -> int:
    parser = arguments("gpu_step", "One GPU: a worker of the product against transformers.")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10, help="counted steps of a round")
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = {"hidden_size": 1024, "num_layers": 6, "num_heads": 16, "kv_latent": 256, "dense_hidden": 2816}
    shape |= {"num_experts": 32, "expert_hidden": 512}
    if given.quick:
        shape |= {"hidden_size": 64, "num_layers": 2, "num_heads": 2, "kv_latent": 32, "dense_hidden": 128}
        shape |= {"num_experts": 8, "expert_hidden": 32}
    sizes = (1, 3, shape, 2, 64) if given.quick else (given.rounds, given.steps, shape, 16, 1024)
    return run(lambda: benchmark(*sizes, device), given.json)


if __name__ == "__main__":
    sys.exit(main())
