"""Manifold-constrained hyper-connections: the autograd functions of a sub-layer, which keep streams only where asked.

Source: mHC (arXiv 2512.24880): equations 7 to 9, the order of operations of section 4.3.1 (the norm's division after
the product), and the recomputation of section 4.3.2. One sub-layer F of n streams X is

    h = H_pre X,   X' = H_res X + H_post^T F(h)     H_pre = sigmoid(.) [n], H_post = 2 sigmoid(.) [n], H_res [n, n]

where H_res = sinkhorn(.) is doubly stochastic. `_Read` makes h and the coefficients, and `_Write` makes X'. Both need X
again in the backward pass, and ask a `Segment` for it. A segment keeps the streams before its first sub-layer, and each
sub-layer's output and coefficients. From these it makes the streams in between again. So it keeps n + 2n + n^2 small
numbers and one C-wide vector per token and sub-layer, instead of n C-wide vectors. F is never run again.

The streams' gradient passes from `_Write` through `_Read` (whose first output is X itself), so it is summed where it is
formed. The arithmetic is that of a `Kernels` (eager.py); kernels.py chooses which.

Shapes: T tokens, n streams, C hidden, k = 2n + n^2 coefficients.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from elastic_moe.model.residual.eager import Kernels, MixSettings


class Segment:
    """Consecutive sub-layers whose streams are kept once, before the first, and made again in the backward pass.

    Args:
        kernels: the arithmetic of all its sub-layers, and of making the streams again.
        length: number of sub-layers; with one, nothing is made again.
    """

    def __init__(self, kernels: Kernels, length: int) -> None:
        self.kernels, self._length = kernels, length
        self._first: torch.Tensor | None = None
        self._written: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self._remade: dict[int, torch.Tensor] = {}
        self._entered = 0

    @property
    def is_full(self) -> bool:
        """Whether `length` sub-layers have entered."""
        return self._entered == self._length

    def enter(self, x: torch.Tensor) -> int:
        """Begin the next sub-layer with these streams. Returns its index in the segment."""
        if self._entered == 0:
            self._first = x
        self._entered += 1
        return self._entered - 1

    def leave(self, y: torch.Tensor, post: torch.Tensor, res: torch.Tensor) -> None:
        """End the sub-layer with its output and coefficients."""
        self._written.append((y, post, res))

    def streams(self, index: int) -> torch.Tensor:
        """The streams before a sub-layer. The first call makes those of all sub-layers up to it."""
        assert self._first is not None
        if index == 0:
            return self._first
        if index not in self._remade:
            x = self._first
            for before, written in enumerate(self._written[:index]):
                x = self.kernels.write(x, *written)
                self._remade[before + 1] = x
        return self._remade[index]

    def release(self, index: int) -> None:
        """Drop the streams before a sub-layer; its backward pass is complete."""
        self._remade.pop(index, None)


class Weights(NamedTuple):
    """Learned parameters of one sub-layer's mix, fp32.

    Attributes:
        proj: [k, n C].
        base: [k].
        alphas: [3], the factors of pre, post and res.
    """

    proj: torch.Tensor
    base: torch.Tensor
    alphas: torch.Tensor


class Link(NamedTuple):
    """A sub-layer's coefficients, and its place in a segment: from its `read` to its `write`.

    Attributes:
        post: [T, n].
        res: [T, n, n].
        segment: keeps the streams.
        index: of the sub-layer in the segment.
    """

    post: torch.Tensor
    res: torch.Tensor
    segment: Segment
    index: int


class _Read(torch.autograd.Function):
    """`Kernels.read`; the first output is X itself."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        proj: torch.Tensor,
        base: torch.Tensor,
        alphas: torch.Tensor,
        settings: MixSettings,
        segment: Segment,
        index: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        h, post, res, u, r = segment.kernels.read(x, proj, base, alphas, settings)
        ctx.save_for_backward(proj, base, alphas, u, r)
        ctx.rest = (settings, segment, index)
        return x.view_as(x), h, post, res

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        proj, base, alphas, u, r = ctx.saved_tensors
        settings, segment, index = ctx.rest
        d_x, d_h, d_post, d_res = (grad.contiguous() for grad in grads)
        out = segment.kernels.read_backward(
            segment.streams(index), (d_x, d_h, d_post, d_res), (u, r), (proj, base, alphas), settings
        )
        segment.release(index)
        return *out, None, None, None


class _Write(torch.autograd.Function):
    """`Kernels.write`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        y: torch.Tensor,
        post: torch.Tensor,
        res: torch.Tensor,
        segment: Segment,
        index: int,
    ) -> torch.Tensor:
        ctx.save_for_backward(y, post, res)
        ctx.rest = (segment, index)
        return segment.kernels.write(x, y, post, res)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        y, post, res = ctx.saved_tensors
        segment, index = ctx.rest
        out = segment.kernels.write_backward(grads[0].contiguous(), segment.streams(index), y, post, res)
        return *out, None, None


def read(
    x: torch.Tensor, weights: Weights, settings: MixSettings, segment: Segment
) -> tuple[torch.Tensor, torch.Tensor, Link]:
    """Streams [T, n, C] -> (the same streams, h [T, C], link for `write`).

    Use the streams returned from here on, not the argument: the gradient then passes through this function.
    """
    index = segment.enter(x.detach())
    x, h, post, res = _Read.apply(x, *weights, settings, segment, index)
    return x, h, Link(post, res, segment, index)


def write(x: torch.Tensor, y: torch.Tensor, link: Link) -> torch.Tensor:
    """Streams [T, n, C] after the sub-layer whose output is y [T, C]."""
    y = y.to(x.dtype)
    link.segment.leave(y.detach(), link.post.detach(), link.res.detach())
    return _Write.apply(x, y, link.post, link.res, link.segment, link.index)


def best_segment(num_sublayers: int, streams: int) -> int:
    """Sub-layers per segment for which the least is kept: about sqrt(n L / (n + 2)) (section 4.3.2)."""

    def kept(length: int) -> int:
        return streams * math.ceil(num_sublayers / length) + (streams + 2) * length

    return min(range(1, num_sublayers + 1), key=kept)
