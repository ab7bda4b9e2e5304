"""Batches are read ahead, and are the same as without that; mixtures are read corpus by corpus."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from elastic_moe.config.schema import DataConfig, TrainConfig
from elastic_moe.data.shards import TokenShard, TokenShardWriter
from elastic_moe.plan.batch import sample_ids
from elastic_moe.runtime.batches import BatchReader, MicroBatches, with_last

DATA = DataConfig(seq_len=8, global_batch=12, micro_batch=4)


class Noted(TokenShard):
    """A shard that notes in which thread it is read, and can fail."""

    def __init__(self, shard: TokenShard) -> None:
        super().__init__(shard.path, np.array(shard._tokens), shard.vocab_size, shard.spans)
        self.threads: list[str] = []
        self.failing = False

    def batch(self, ids: Any, seq_len: int) -> Any:
        self.threads.append(threading.current_thread().name)
        if self.failing:
            raise OSError("the disk is gone")
        return super().batch(ids, seq_len)


@pytest.fixture
def shard(tmp_path: Path) -> Noted:
    writer = TokenShardWriter(tmp_path / "train.bin", 60_000)
    writer.append(range(50_000))
    writer.close()
    return Noted(TokenShard.open(tmp_path / "train.bin"))


def wanted(shard: TokenShard, batch: int, share: slice) -> np.ndarray:
    ids = sample_ids(5, batch, DATA.global_batch, shard.num_samples(DATA.seq_len))[share]
    return ids[:, None] * DATA.seq_len + np.arange(DATA.seq_len)


def test_the_next_batch_is_read_by_another_thread(shard: Noted) -> None:
    reader = BatchReader(TrainConfig(seed=5, data=DATA), shard)
    for batch in range(4):
        tokens, targets = reader.take(batch, slice(3, 9))
        assert np.array_equal(tokens, wanted(shard, batch, slice(3, 9)))
        assert np.array_equal(targets, tokens + 1)
    reader._ahead[1].join()  # type: ignore[index]
    assert shard.threads == ["MainThread", *["next batch"] * 4]


def test_another_share_or_batch_than_expected(shard: Noted) -> None:
    reader = BatchReader(TrainConfig(seed=5, data=DATA), shard)
    for batch, share in ((0, slice(0, 4)), (1, slice(0, 6)), (1, slice(0, 6)), (7, slice(0, 6)), (8, slice(5, 5))):
        assert np.array_equal(reader.take(batch, share)[0], wanted(shard, batch, share))
    reader._ahead[1].join()  # type: ignore[index]


def test_an_error_ahead_is_raised_when_the_batch_is_taken(shard: Noted) -> None:
    reader = BatchReader(TrainConfig(seed=5, data=DATA), shard)
    reader.take(0, slice(0, 4))
    reader._ahead[1].join()  # type: ignore[index]
    shard.failing = True
    assert np.array_equal(reader.take(1, slice(0, 4))[0], wanted(shard, 1, slice(0, 4))), "it was read before"
    with pytest.raises(OSError, match="the disk is gone"):
        reader.take(2, slice(0, 4))
    shard.failing = False
    assert np.array_equal(reader.take(2, slice(0, 4))[0], wanted(shard, 2, slice(0, 4)))
    reader._ahead[1].join()  # type: ignore[index]


@pytest.mark.parametrize(
    ("whole", "sizes_R"),
    [(True, ([4, 4, 1], [3, 0, 0], [0, 0, 0])), (False, ([3, 3, 3], [1, 1, 1], [0, 0, 0]))],
)
def test_micro_batches_are_equally_many_on_every_rank(
    shard: Noted, whole: bool, sizes_R: tuple[list[int], ...]
) -> None:
    shares = [slice(0, 9), slice(9, 12), slice(12, 12)]
    batches = MicroBatches(DATA, torch.device("cpu"), whole)
    for rank, sizes in enumerate(sizes_R):
        share = shard.batch(np.arange(12)[shares[rank]], DATA.seq_len)
        found = list(batches.of(share, shares))
        assert [len(tokens) for tokens, _ in found] == sizes
        assert all(tokens.shape[1] == DATA.seq_len for tokens, _ in found)


def test_samples_of_a_mixture_lie_within_one_corpus(tmp_path: Path) -> None:
    writer = TokenShardWriter(tmp_path / "train.bin", 60_000)
    writer.append(range(30_000))
    writer.close([("a", 10_003), ("b", 5), ("c", 19_992)])
    shard = TokenShard.open(tmp_path / "train.bin")
    assert shard.samples(8) == [1250, 0, 2498]
    first, _ = shard.batch([1249, 1250], 8)
    assert first[0].tolist() == list(range(9992, 10_000))
    assert first[1].tolist() == list(range(10_008, 10_016)), "c begins at its own first token"
    writer = TokenShardWriter(tmp_path / "two.bin", 60_000)
    writer.append(range(30_000))
    writer.close([("a", 10_000), ("c", 20_000)])
    config = TrainConfig(seed=5, data=replace(DATA, mixture={"c": 0.75, "a": 0.25}))
    reader = BatchReader(config, TokenShard.open(tmp_path / "two.bin"))
    tokens = np.concatenate([reader.take(batch, slice(0, 12))[0] for batch in range(10)])
    assert (tokens[:, 0] < 10_000).sum() == 30
    reader._ahead[1].join()  # type: ignore[index]


@pytest.mark.parametrize(("items", "expected"), [
    ("", []),
    ("a", [("a", True)]),
    ("abc", [("a", False), ("b", False), ("c", True)]),
])  # fmt: skip
def test_the_last_one_is_marked(items: str, expected: list[tuple[str, bool]]) -> None:
    assert list(with_last(items)) == expected
