"""The micro-batches of one rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from elastic_moe.config.schema import DataConfig
from elastic_moe.data.shards import TokenShard


class MicroBatches:
    """Cuts a rank's share of a batch into micro-batches.

    Args:
        config: length of a sequence, sequences of a micro-batch.
        device: of the tensors.
    """

    def __init__(self, config: DataConfig, device: torch.device) -> None:
        self.device, self._config = device, config

    def of(
        self, shard: TokenShard, ids: np.ndarray, shares: Sequence[slice], rank: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(tokens, targets), int64 [B, S] each. Every rank yields equally many; a rank with fewer yields empty ones.

        Args:
            shard: the tokens.
            ids: samples of the whole batch.
            shares: slice of the batch per rank.
            rank: this rank.
        """
        mine = ids[shares[rank]]
        longest = max(share.stop - share.start for share in shares)
        for start in range(0, longest, self._config.micro_batch):
            tokens, targets = shard.batch(mine[start : start + self._config.micro_batch], self._config.seq_len)
            yield torch.from_numpy(tokens).to(self.device), torch.from_numpy(targets).to(self.device)
