"""What a user would write without this project: torch's DistributedDataParallel, the project's model, fused AdamW.

Or the same with transformers' model of that shape, under Accelerate, which wraps it in the same class. No elasticity,
no mirrors, no checkpoints: a death ends it. Each rank has all weights, gradients and moments. As a program:
`python -m scripts.benchmarks.plain_ddp JSON`; rank 0 appends a line per step to a log.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from elastic_moe.config.schema import DataConfig, ModelConfig
from elastic_moe.data.shards import TokenShard
from elastic_moe.model.experts.local import LocalExperts
from elastic_moe.model.init import init_param
from elastic_moe.model.params import param_specs
from elastic_moe.model.transformer import Transformer
from elastic_moe.plan.batch import sample_ids
from elastic_moe.plan.shares import fastest_split, slices_of
from scripts.benchmarks.transformers_shape import same_shape
from scripts.benchmarks.two_machines import LINK, enter


@dataclass(frozen=True)
class Plain:
    """A plain run.

    Attributes:
        model, data: as the configuration of a run has them.
        shard: path of the tokens.
        log: file that takes a line per step.
        steps, workers: of the run.
        lr: learning rate, constant.
        grad_clip: largest norm of the gradient.
        transformers: take the model of transformers, under Accelerate.
        networks: machines over which the ranks are spread, see `two_machines`; none: all are here.
    """

    model: dict[str, Any]
    data: dict[str, Any]
    shard: str
    log: str
    steps: int
    workers: int
    lr: float
    grad_clip: float
    transformers: bool = False
    networks: tuple[str, ...] = ()


class Whole(nn.Module):
    """The model with its experts; a call is the loss, so that DDP sees the pass."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.experts = LocalExperts(cfg)
        self.body = Transformer(cfg, self.experts)
        named = dict(self.body.named_parameters())
        for spec in param_specs(cfg):
            if spec.name in named:
                named[spec.name].data.copy_(init_param(spec, 0))

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = self.body.loss(tokens, targets)
        return out.loss_sum, out.ce_sum.detach()


class Theirs(nn.Module):
    """transformers' DeepSeek-V3 of the same shape, called as `Whole` is. It shifts the labels itself."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.body = same_shape(cfg)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        loss = self.body(input_ids=tokens, labels=tokens).loss * targets.numel()
        return loss, loss.detach()


def wrapped(cfg: ModelConfig, plain: Plain) -> tuple[DistributedDataParallel, torch.optim.Optimizer]:
    """The model as its ranks call it, and its optimizer. Gradients are views of the buckets on both sides."""
    model = Theirs(cfg) if plain.transformers else Whole(cfg)
    optimizer = torch.optim.AdamW(model.parameters(), lr=plain.lr, fused=True)
    if not plain.transformers:
        return DistributedDataParallel(model, gradient_as_bucket_view=True), optimizer
    from accelerate import Accelerator, DistributedDataParallelKwargs

    how = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    model, optimizer = Accelerator(cpu=True, kwargs_handlers=[how]).prepare(model, optimizer)
    assert isinstance(model, DistributedDataParallel), type(model)
    return model, optimizer


def train(rank: int, plain: Plain, meeting: str) -> None:
    """One rank's process."""
    torch.set_num_threads(1)
    if plain.networks:
        enter(plain.networks[rank * len(plain.networks) // plain.workers])
        os.environ["GLOO_SOCKET_IFNAME"] = LINK
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(plain.workers)}  # Accelerate asks
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # but uses the group that is there
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=plain.workers)
    cfg, data = ModelConfig(**plain.model), DataConfig(**plain.data)
    model, optimizer = wrapped(cfg, plain)
    shard = TokenShard.open(plain.shard)
    share = slices_of(fastest_split(data.global_batch, [1.0] * plain.workers))[rank]
    per_token = plain.workers / (data.global_batch * data.seq_len)  # DDP averages over ranks
    for step in range(1, plain.steps + 1):
        ids = sample_ids(0, step - 1, data.global_batch, shard.num_samples(data.seq_len))[share]
        starts, ce_sum = range(0, len(ids), data.micro_batch), 0.0
        for start in starts:
            tokens, targets = shard.batch(ids[start : start + data.micro_batch], data.seq_len)
            with nullcontext() if start == starts[-1] else model.no_sync():
                loss, ce = model(torch.from_numpy(tokens), torch.from_numpy(targets))
                (loss * per_token).backward()
            ce_sum += float(ce)
        nn.utils.clip_grad_norm_(model.parameters(), plain.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        if rank == 0:
            line = {"parent": os.getppid(), "step": step, "time": time.time()}
            line["loss"] = ce_sum / (len(ids) * data.seq_len)
            with open(plain.log, "a") as log:
                log.write(json.dumps(line) + "\n")
    dist.barrier()
    dist.destroy_process_group()


def main() -> int:
    plain = Plain(**json.loads(sys.argv[1]))
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(train, (plain, str(Path(folder) / "meeting")), nprocs=plain.workers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
