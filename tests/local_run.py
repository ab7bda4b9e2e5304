"""A whole run without Ray: its coordinator here, workers as plain processes that can be killed, stopped and added."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from elastic_moe.config.schema import (
    BalanceConfig,
    CheckpointConfig,
    DataConfig,
    ElasticConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
)
from elastic_moe.coordination.coordinator import RunCoordinator
from elastic_moe.data.prepare import Prepared, prepare
from elastic_moe.data.tokenizer import load_tokenizer, with_tokenizer
from elastic_moe.metrics.jsonl import read_jsonl
from elastic_moe.run_dir import EVENTS, METRICS
from tests.declared import assert_declared
from tests.processes import start

WAIT_S = 240.0
DEVICE = os.environ.get("ELASTIC_MOE_TEST_DEVICE", "cpu")  # cuda: all workers share one GPU


def tiny_config(run_dir: Path, corpus: Path, **elastic: Any) -> TrainConfig:
    """A model of a few thousand parameters on a byte-tokenized corpus.

    Rounding differs with the world size, so now and then a near tie of two experts is decided the other way for one
    token, and the sign rule of the router's bias amplifies that (DESIGN.md, negative results). Wide initial weights, a
    slow bias and a small learning rate make such ties too rare to blur what the comparisons test.
    """
    return TrainConfig(
        device=DEVICE,
        run=RunConfig(dir=str(run_dir), steps=30, eval_every_steps=0, eval_sequences=4, sample_tokens=0),
        model=ModelConfig(
            hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, dense_hidden=64,
            num_experts=8, experts_per_token=2, expert_hidden=16, max_unit_elements=4096,
            init_std=0.1, bias_update_speed=0.0001,
        ),
        data=DataConfig(corpus=str(corpus), tokenizer="bytes", seq_len=64, global_batch=16, micro_batch=8),
        optim=OptimConfig(lr=2e-4, warmup_steps=5),
        elastic=ElasticConfig(**({"heartbeat_s": 0.2, "heartbeat_timeout_s": 10.0, "join_settle_s": 0.1} | elastic)),
        checkpoint=CheckpointConfig(every_steps=10),
        balance=BalanceConfig(copies="1"),  # rows travel; `auto` would give each rank all of so few experts
    )  # fmt: skip


def _work(config: TrainConfig, address: tuple[str, int], prepared: Prepared, worker: str, node: str) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    from elastic_moe.runtime.worker import run_worker

    run_worker(config, lambda: address, "secret", node, prepared, worker)


class LocalRun:
    """One run in progress. Use as a context manager: no process outlives it. `work`: what a worker's process runs."""

    work = staticmethod(_work)

    def __init__(self, config: TrainConfig, workers: int, nodes: int = 0, host: str = "127.0.0.1") -> None:
        prepared = prepare(config.data, Path(config.run.dir).parent / "cache")
        self.config = replace(config, model=with_tokenizer(config.model, load_tokenizer(prepared.tokenizer_path)))
        self.dir = Path(config.run.dir)
        self.dir.mkdir(parents=True, exist_ok=True)
        self._prepared, self._nodes = prepared, nodes or workers
        self.coordinator = RunCoordinator(self.config, "secret", workers, host, prepared=prepared)
        self._address = self.coordinator.address
        self.processes: dict[str, Any] = {}
        for _ in range(workers):
            self.add()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        for process in self.processes.values():
            if process.is_alive():
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGCONT)
                process.kill()
            process.join(10)
        self.coordinator.close()
        if error is None:
            assert_declared(self.dir)

    def add(self, node: str = "") -> str:
        index = len(self.processes)
        worker = f"w{index}"
        args = (self.config, self._address, self._prepared, worker, node or f"n{index % self._nodes}")
        self.processes[worker] = start(self.work, *args, name=worker)
        return worker

    def signal(self, worker: str, how: signal.Signals) -> None:
        os.kill(self.processes[worker].pid, how)

    def wait(self, what: str, holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Wait until the status satisfies a condition, for as long as the run gets on."""
        deadline_s, seen = 0.0, None
        while True:
            status = self.coordinator.status()
            if holds(status):
                return status
            if seen != (seen := (status["step"], status["generation"])):
                deadline_s = time.monotonic() + WAIT_S
            elif time.monotonic() > deadline_s:
                break
            if status["phase"] == "failed":
                break
            time.sleep(0.02)
        raise AssertionError(f"waited in vain for {what}: {self.coordinator.status()}; {self.events()[-5:]}")

    def wait_step(self, step: int) -> dict[str, Any]:
        return self.wait(f"step {step}", lambda s: s["step"] >= step)

    def wait_end(self) -> dict[str, Any]:
        return self.wait("the end", lambda s: s["phase"] == "finished")

    def records(self) -> list[dict[str, Any]]:
        return read_jsonl(self.dir / METRICS)

    def events(self) -> list[dict[str, Any]]:
        return read_jsonl(self.dir / EVENTS)

    def losses(self) -> list[float]:
        records = self.records()
        assert [r["step"] for r in records] == list(range(1, len(records) + 1)), "steps are lost or repeated"
        return [r["loss"] for r in records]
