"""The samples of a step, and the micro-batches of one rank."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from elastic_moe.config.schema import DataConfig, TrainConfig
from elastic_moe.data.shards import TokenShard
from elastic_moe.plan.batch import mixture_at, samples_at
from elastic_moe.plan.batch_sizes import BatchSizes
from elastic_moe.plan.shares import Batching

T = TypeVar("T")
Samples = tuple[NDArray[np.int64], NDArray[np.int64]]  # tokens and targets, int64 [B, S] each


class BatchReader:
    """Reads a rank's share of each batch, the next one while the present one is computed.

    The tokens are memory-mapped, so a batch that is read for the first time may wait for a disk or a network. One
    thread reads ahead, by one batch. What it has read is used if the next step is what it was read for; after a change
    of the membership, or of the batches left out, it is not.

    Args:
        config: the run's configuration.
        shard: the training shard.

    Attributes:
        waited_s: how long the last `take` took, seconds.
    """

    def __init__(self, config: TrainConfig, shard: TokenShard) -> None:
        self._config, self._shard, self._sizes = config, shard, BatchSizes(config.data)
        self._weights = [config.data.mixture[name] for name, _ in shard.spans]
        self._ahead: tuple[tuple[int, int, int], threading.Thread] | None = None
        self._read: Samples | None = None
        self.waited_s = 0.0

    def ids(self, batch: int) -> NDArray[np.int64]:
        """Sample ids of a batch; they depend on the seed and the batch alone."""
        samples = self._shard.samples(self._config.data.seq_len)
        start, count = self._sizes.start(batch), self._sizes.size(batch)
        if self._weights:
            return mixture_at(self._config.seed, start, count, samples, self._weights)
        return samples_at(self._config.seed, start, count, samples[0])

    def take(self, batch: int, share: slice) -> Samples:
        """Tokens and targets of a share of a batch. The same share of the next batch is read from now on.

        Args:
            batch: number of the batch.
            share: slice of it.

        Raises:
            OSError: it cannot be read.
        """
        begun_s = time.perf_counter()
        read, key = None, (batch, share.start, share.stop)
        if self._ahead is not None:
            known, thread = self._ahead
            thread.join()  # another batch's, too: there is one thread
            read = self._read if known == key else None
        if read is None:
            read = self._samples(batch, share)
        self._read = None
        thread = threading.Thread(target=self._prefetch, args=(batch + 1, share), name="next batch", daemon=True)
        self._ahead = (batch + 1, share.start, share.stop), thread
        thread.start()
        self.waited_s = time.perf_counter() - begun_s
        return read

    def _prefetch(self, batch: int, share: slice) -> None:
        with suppress(OSError):  # it is raised when the batch is taken
            self._read = self._samples(batch, share)

    def _samples(self, batch: int, share: slice) -> Samples:
        return self._shard.batch(self.ids(batch)[share], self._config.data.seq_len)


class MicroBatches:
    """Cuts a rank's share of a batch into micro-batches.

    Args:
        config: length of a sequence, sequences of a micro-batch.
        device: of the tensors.
        whole: all micro-batches but the last of the batch are full, see `Batching`.
    """

    def __init__(self, config: DataConfig, device: torch.device, whole: bool = False) -> None:
        self.device, self._seq_len = device, config.seq_len
        self._batching = Batching(config.global_batch, config.micro_batch, whole)

    def of(self, share: Samples, shares: Sequence[slice]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(tokens, targets), int64 [B, S] each. Every rank yields equally many; they may differ in size, and be
        empty.

        Args:
            share: tokens and targets of this rank.
            shares: slice of the batch per rank.
        """
        start = 0
        for size in self._batching.sizes(len(share[0]), max(one.stop - one.start for one in shares)):
            tokens, targets = (part[start : start + size] for part in share)
            start += size
            yield torch.from_numpy(tokens).to(self.device), torch.from_numpy(targets).to(self.device)


def with_last(items: Iterable[T]) -> Iterator[tuple[T, bool]]:
    """Each item, and whether it is the last one. Made one ahead."""
    iterator = iter(items)
    for item in iterator:
        for following in iterator:
            yield item, False
            item = following
        yield item, True
