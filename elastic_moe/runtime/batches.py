"""The micro-batches of one rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from elastic_moe.config.schema import DataConfig
from elastic_moe.data.shards import TokenShard
from elastic_moe.plan.shares import Batching


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

    def of(
        self, shard: TokenShard, ids: np.ndarray, shares: Sequence[slice], rank: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(tokens, targets), int64 [B, S] each. Every rank yields equally many; they may differ in size, and be empty.

        Args:
            shard: the tokens.
            ids: samples of the whole batch.
            shares: slice of the batch per rank.
            rank: this rank.
        """
        mine, start = ids[shares[rank]], 0
        for size in self._batching.sizes(len(mine), max(share.stop - share.start for share in shares)):
            tokens, targets = shard.batch(mine[start : start + size], self._seq_len)
            start += size
            yield torch.from_numpy(tokens).to(self.device), torch.from_numpy(targets).to(self.device)
