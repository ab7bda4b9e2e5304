"""The sequences that attention works on: their positions, their documents, their masks, and the cache of generation.

One context serves all layers of a forward pass, so rotary tables and masks are made once. The cache keeps, per layer,
named tensors that grow along the sequence; each kind of attention names its own.

Shapes: B sequences, S positions of this call, L positions so far.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch

from elastic_moe.config.schema import ModelConfig
from elastic_moe.model.attention.rope import Tables, rope_tables


class LayerCache:
    """Tensors of one layer that grow with the sequence, by name. Axis 1 is the position."""

    def __init__(self) -> None:
        self._kept: dict[str, torch.Tensor] = {}

    def extend(self, name: str, new: torch.Tensor) -> torch.Tensor:
        """Append new positions and return all."""
        old = self._kept.get(name)
        self._kept[name] = new if old is None else torch.cat([old, new], dim=1)
        return self._kept[name]

    @property
    def num_elements(self) -> int:
        """Numbers kept."""
        return sum(t.numel() for t in self._kept.values())


class KVCache:
    """The cache of generation between calls.

    Attributes:
        length: positions so far; `Transformer.forward` adds those of each call.
        layers: one cache per layer.
    """

    def __init__(self, num_layers: int) -> None:
        self.length = 0
        self.layers = [LayerCache() for _ in range(num_layers)]


class AttentionContext:
    """The sequences of one forward pass.

    Args:
        cfg: the model's shape.
        seq_len: positions of this call.
        device: of the tensors made here.
        documents_BS: document index of every position, or None when each row is one document.
        cache: of the positions before; those of this call follow. Not together with documents.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        seq_len: int,
        device: torch.device,
        documents_BS: torch.Tensor | None = None,
        cache: KVCache | None = None,
    ) -> None:
        assert documents_BS is None or cache is None
        self._cfg, self._cache, self._device = cfg, cache, device
        self.documents_BS, self.seq_len = documents_BS, seq_len
        self.trains = torch.is_grad_enabled()  # also where layers that are made again have no graph yet
        self.start = 0 if cache is None else cache.length
        self._made: dict[Hashable, Any] = {}

    def layer_cache(self, layer: int) -> LayerCache | None:
        """The layer's cache; None without a cache."""
        return None if self._cache is None else self._cache.layers[layer]

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The value for this key; the first layer that asks makes it."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    @property
    def positions(self) -> torch.Tensor:
        """int64 [S] positions of this call."""
        return torch.arange(self.start, self.start + self.seq_len, device=self._device)

    def rope(self, width: int, theta: float, yarn: bool, stride: int = 1, count: int | None = None) -> Tables:
        """Cosine and sine [S, width / 2] of this call's positions; with a count, of 0, stride, 2 * stride, ..."""

        def make() -> Tables:
            positions = self.positions if count is None else torch.arange(count, device=self._device) * stride
            return rope_tables(self._cfg, positions, width, theta, yarn)

        return self.once(("rope", width, theta, yarn, stride, count), make)

    def mask(self, window: int = 0) -> torch.Tensor | None:
        """bool [B or 1, 1, S, L], true where a query may see a key; None where plain causality is the whole rule.

        Args:
            window: positions seen, the query's own included; 0 for no limit.
        """
        total = self.start + self.seq_len
        if self.documents_BS is None and self.start == 0 and (not window or window >= total):
            return None

        def make() -> torch.Tensor:
            query, key = self.positions[:, None], torch.arange(total, device=self._device)[None, :]
            seen = key <= query
            if window:
                seen = seen & (key > query - window)
            seen = seen[None, None]
            if self.documents_BS is not None:
                seen = seen & (self.documents_BS[:, None, :, None] == self.documents_BS[:, None, None, :])
            return seen

        return self.once(("mask", window), make)
