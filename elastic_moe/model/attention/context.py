"""What attention needs to know of the sequences it works on: positions, documents, and what was computed before.

One context serves all layers of a forward pass, so rotary tables and masks are made once. The cache of generation keeps, per
layer, named tensors that grow along the sequence; each kind of attention names what it keeps.

Sources: RoPE, Su et al. 2021 (arXiv 2104.09864); YaRN, Peng et al. 2023 (arXiv 2309.00071), with `mscale` as in
DeepSeek-V2 (arXiv 2405.04434) and transformers.

Shapes: B sequences, S positions of this call, L positions so far, d rotary width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from elastic_moe.config.schema import ModelConfig

Tables = tuple[torch.Tensor, torch.Tensor]


class LayerCache:
    """Tensors of one layer that grow with the sequence, by name; axis 1 is the position."""

    def __init__(self) -> None:
        self._kept: dict[str, torch.Tensor] = {}

    def extend(self, name: str, new: torch.Tensor) -> torch.Tensor:
        """Append new positions and return all."""
        old = self._kept.get(name)
        self._kept[name] = new if old is None else torch.cat([old, new], dim=1)
        return self._kept[name]

    @property
    def num_elements(self) -> int:
        return sum(t.numel() for t in self._kept.values())


class KVCache:
    """What generation keeps between calls.

    Attributes:
        length: positions so far.
        layers: one cache per layer.
    """

    def __init__(self, num_layers: int) -> None:
        self.length = 0
        self.layers = [LayerCache() for _ in range(num_layers)]


class Context:
    """The sequences of one forward pass.

    Args:
        cfg: the model's shape.
        seq_len: positions of this call.
        device: of the tensors made here.
        documents_BS: document index of every position, or None when each row is one document.
        cache: what was computed before; the call's positions follow it. Not together with documents.
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
        self.start = 0 if cache is None else cache.length
        self._made: dict[Hashable, Any] = {}

    def layer_cache(self, layer: int) -> LayerCache | None:
        return None if self._cache is None else self._cache.layers[layer]

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The value for this key, made by the first layer that asks."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    @property
    def positions(self) -> torch.Tensor:
        """int64 [S] positions of this call."""
        return torch.arange(self.start, self.start + self.seq_len, device=self._device)

    def rope(self, width: int, theta: float, yarn: bool, stride: int = 1, count: int | None = None) -> Tables:
        """Cosine and sine [S, width / 2]; with a count, of the positions 0, stride, 2 * stride, ..."""

        def make() -> Tables:
            at = self.positions if count is None else torch.arange(count, device=self._device) * stride
            return rope_tables(self._cfg, at, width, theta, yarn)

        return self.once(("rope", width, theta, yarn, stride, count), make)

    def mask(self, window: int = 0) -> torch.Tensor | None:
        """bool [B or 1, 1, S, L], true where a query may look; None when plain causality says all.

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


def rope_tables(cfg: ModelConfig, positions: torch.Tensor, width: int, theta: float, yarn: bool) -> Tables:
    """Cosine and sine of every (position, frequency), fp32 [S, width / 2] each; with YaRN scaled by its attention factor."""
    device = positions.device
    frequency = theta ** -(torch.arange(0, width, 2, device=device, dtype=torch.float32) / width)
    factor = 1.0
    if yarn and cfg.rope_factor > 1:
        frequency = _yarn(cfg, frequency, width, theta)
        factor = yarn_attention_factor(cfg)
    angles = torch.outer(positions.float(), frequency)
    return angles.cos() * factor, angles.sin() * factor


def _yarn(cfg: ModelConfig, frequency: torch.Tensor, width: int, theta: float) -> torch.Tensor:
    """Low frequencies are divided by the factor, high ones kept, with a ramp between (arXiv 2309.00071, section 3.2)."""

    def dimension(rotations: float) -> float:
        return width * math.log(cfg.rope_original_len / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(dimension(cfg.rope_beta_fast)), 0)
    high = min(math.ceil(dimension(cfg.rope_beta_slow)), width - 1)
    index = torch.arange(width // 2, device=frequency.device, dtype=torch.float32)
    ramp = ((index - low) / (high - low if high != low else 0.001)).clamp(0, 1)
    return frequency / cfg.rope_factor * ramp + frequency * (1 - ramp)


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """0.1 m ln(factor) + 1 (arXiv 2309.00071, equation 22)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def yarn_attention_factor(cfg: ModelConfig) -> float:
    """Factor on cosine and sine. V4 uses none."""
    if cfg.attention == "v4":
        return 1.0
    if cfg.rope_mscale and cfg.rope_mscale_all_dim:
        return yarn_mscale(cfg.rope_factor, cfg.rope_mscale) / yarn_mscale(cfg.rope_factor, cfg.rope_mscale_all_dim)
    return yarn_mscale(cfg.rope_factor)


def rotate(x: torch.Tensor, tables: Tables, interleave: bool) -> torch.Tensor:
    """Rotate each pair of channels by its position's angle; dtype is kept, the rotation itself is fp32.

    Under autocast too: in bf16 the angles of far positions lose their low bits.

    Args:
        x: [..., S, d].
        tables: cosine and sine [S, d / 2].
        interleave: pairs are (2i, 2i + 1) as DeepSeek lays them out, else (i, i + d / 2) as Llama does.
    """
    return _Rotate.apply(x, *tables, interleave)


def _pairs(x: torch.Tensor, interleave: bool) -> tuple[torch.Tensor, ...]:
    """Views of the first and the second channel of each pair."""
    return x.unflatten(-1, (-1, 2)).unbind(-1) if interleave else x.chunk(2, dim=-1)


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleave: bool) -> torch.Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    out = torch.empty(x.shape, dtype=wide.dtype, device=x.device)
    (first, second), (left, right) = _pairs(wide, interleave), _pairs(out, interleave)
    torch.mul(first, cos, out=left).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=right).addcmul_(first, sin)
    return out.to(x.dtype)


class _Rotate(torch.autograd.Function):
    """A rotation's gradient is the rotation by the opposite angle (scaled alike, where YaRN scales)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleave: bool) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleave = interleave
        return _turn(x, cos, sin, interleave)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grads[0], cos, -sin, ctx.interleave), None, None, None


def rotate_tail(x: torch.Tensor, tables: Tables) -> torch.Tensor:
    """Rotate the last channels of each head, as many as the tables turn, in interleaved pairs."""
    width = 2 * tables[0].shape[-1]
    return torch.cat((x[..., :-width], rotate(x[..., -width:], tables, interleave=True)), dim=-1)
