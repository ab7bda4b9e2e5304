"""The comparison side of the recovery benchmark: the same model and data on Ray Train 2.60's own elastic TorchTrainer.

On a failure or a resize, the trainer restarts its worker group and resumes from the last checkpoint. A checkpoint is
written at every step, which loses the fewest steps, unless `checkpoint_steps` says otherwise. Every interval that the
trainer lets one set is set for speed. Each rank appends a line per finished step to a log, from which the driver
measures. As a program it is a driver on a cluster: `python -m scripts.benchmarks.stock ADDRESS JSON`.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from elastic_moe.config.schema import DataConfig, ModelConfig

TUNED = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "10",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",
    "RAY_TRAIN_ELASTIC_RESIZE_MONITOR_INTERVAL_S": "1",
}


def stock_loop(config: dict[str, Any]) -> None:
    """Train function of one stock worker: DDP-style gradient averaging over gloo, a checkpoint every step."""
    import numpy as np
    import torch
    import torch.distributed as dist
    from ray import train

    from elastic_moe.data.shards import TokenShard
    from elastic_moe.model.experts.local import LocalExperts
    from elastic_moe.model.init import init_param
    from elastic_moe.model.params import param_specs
    from elastic_moe.model.transformer import Transformer
    from elastic_moe.plan.batch import sample_ids
    from elastic_moe.plan.shares import fastest_split, slices_of

    torch.set_num_threads(1)
    model_config, data = ModelConfig(**config["model"]), DataConfig(**config["data"])
    experts = LocalExperts(model_config)
    model = Transformer(model_config, experts)
    named = dict(model.named_parameters())
    for spec in param_specs(model_config):
        if spec.name in named:
            named[spec.name].data.copy_(init_param(spec, 0))
    weights = [*model.parameters(), *experts.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=1e-3)
    shard = TokenShard.open(config["shard"])
    first = 1
    checkpoint = train.get_checkpoint()
    if checkpoint:
        with checkpoint.as_directory() as folder:
            state = torch.load(Path(folder) / "state.pt", weights_only=True)
        for weight, saved in zip(weights, state["weights"], strict=True):
            weight.data.copy_(saved)
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"] + 1
    every = config.get("checkpoint_steps", 1)
    rank, world = train.get_context().get_world_rank(), train.get_context().get_world_size()
    share = slices_of(fastest_split(data.global_batch, [1.0] * world))[rank]
    for step in range(first, config["steps"] + 1):
        ids = sample_ids(0, step - 1, data.global_batch, shard.num_samples(data.seq_len))[share]
        optimizer.zero_grad()
        for start in range(0, len(ids), data.micro_batch):
            tokens, targets = shard.batch(np.asarray(ids[start : start + data.micro_batch]), data.seq_len)
            out = model.loss(torch.from_numpy(tokens), torch.from_numpy(targets))
            (out.loss_sum / (data.global_batch * data.seq_len)).backward()
        for weight in weights:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            dist.all_reduce(weight.grad)
        optimizer.step()
        with tempfile.TemporaryDirectory() as folder:
            saved = None
            if rank == 0 and step % every == 0:
                state = {"step": step, "weights": [w.data for w in weights], "optimizer": optimizer.state_dict()}
                torch.save(state, Path(folder) / "state.pt")
                saved = train.Checkpoint.from_directory(folder)
            train.report({"step": step}, checkpoint=saved)
        _append_line(config["log"], step, rank, world)
        if Path(config["stop_file"]).exists():
            return


def _append_line(path: str, step: int, rank: int, world: int) -> None:
    """Append a finished step of this rank to the log."""
    import ray

    line = {"time": time.time(), "step": step, "rank": rank, "world": world, "pid": os.getpid()}
    line["node"] = ray.get_runtime_context().get_node_id()
    with open(path, "a") as log:
        log.write(json.dumps(line) + "\n")


def fit_stock(config: dict[str, Any], min_workers: int, max_workers: int, storage: str) -> None:
    """Run the stock trainer until its stop file appears. Call in a thread of a driver connected to Ray."""
    from ray import train
    from ray.train.torch import TorchTrainer

    TorchTrainer(
        stock_loop,
        train_loop_config=config,
        scaling_config=train.ScalingConfig(
            num_workers=(min_workers, max_workers),  # type: ignore[arg-type]
            resources_per_worker={"CPU": 1},
        ),
        run_config=train.RunConfig(
            storage_path=storage,
            name="stock",
            failure_config=train.FailureConfig(max_failures=-1),
            checkpoint_config=train.CheckpointConfig(num_to_keep=2),
        ),
    ).fit()


def main() -> int:
    """A driver on the cluster of an address, with loop, numbers of workers and storage as JSON."""
    import ray

    address, given = sys.argv[1], json.loads(sys.argv[2])
    ray.init(address=address, log_to_driver=False)
    fit_stock(given["loop"], given["min_workers"], given["max_workers"], given["storage"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
