"""The validation loss, of one corpus and of several, at several world sizes."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from elastic_moe.config.schema import DataConfig
from elastic_moe.data.shards import TokenShard, TokenShardWriter
from elastic_moe.runtime.batches import MicroBatches
from elastic_moe.runtime.evaluate import Evaluator

CPU = torch.device("cpu")


class Model:
    """Its loss of a token is the token."""

    def loss(self, inputs: torch.Tensor, targets: torch.Tensor) -> Any:
        return SimpleNamespace(ce_sum=inputs.sum(), num_tokens=targets.numel())


def shard_of(path: Path, spans: list[tuple[str, int]]) -> TokenShard:
    writer = TokenShardWriter(path / "val.bin", 10_000)
    for index, (_, size) in enumerate(spans):
        writer.append(np.arange(size) % 10 + 1000 * index)
    writer.close(spans if len(spans) > 1 else ())
    shard = TokenShard.open(path / "val.bin")
    return TokenShard(shard.path, np.array(shard._tokens), shard.vocab_size, shard.spans)


def losses(shard: TokenShard, workers: int, sequences: int) -> dict[str, float]:
    """The losses that the ranks find together."""
    speeds = SimpleNamespace(sequences=[1.0 + i for i in range(workers)])
    evaluator = Evaluator(
        Model(),  # type: ignore[arg-type]
        shard, MicroBatches(DataConfig(seq_len=10, micro_batch=2), CPU), contextlib.nullcontext, CPU,
    )  # fmt: skip
    sums: list[torch.Tensor] = []

    def context(rank: int, reduce: Any) -> Any:
        group = SimpleNamespace(all_reduce=reduce)
        return SimpleNamespace(rank=rank, speeds=speeds, group=group)

    for rank in range(workers):
        with contextlib.suppress(ZeroDivisionError):
            evaluator.losses(context(rank, lambda total: sums.append(total.clone())), sequences, 10)
    return evaluator.losses(context(0, lambda total: total.copy_(torch.stack(sums).sum(0))), sequences, 10)


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_one_corpus(workers: int, tmp_path: Path) -> None:
    assert losses(shard_of(tmp_path, [("", 101)]), workers, 4) == {"": 4.5}


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_each_corpus_of_a_mixture(workers: int, tmp_path: Path) -> None:
    """The second corpus has fewer sequences than are asked for."""
    shard = shard_of(tmp_path, [("a", 205), ("b", 31), ("c", 99)])
    assert losses(shard, workers, 7) == {"a": 4.5, "b": 1004.5, "c": 2004.5}
