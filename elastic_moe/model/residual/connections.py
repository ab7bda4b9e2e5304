"""The residual connection of a sub-layer: plain, hyper-connections (HC), or manifold-constrained ones (mHC).

Sources: HC, Zhu et al. 2024 (arXiv 2409.19606), in the form of mHC (arXiv 2512.24880, equation 5); mHC: mhc.py. With
streams the residual is [B, S, n, D]; a sub-layer reads one mixture of them and writes back to all.

The initial values make n streams behave like the plain residual. HC's are those of its paper. mHC's are those of its
Appendix A.6 (known through the pseudo-code that PaddleFleet quotes):

- projections 0, and alpha, the factor of the dynamic part, 0.01;
- H_post 1;
- H_res close to the identity (logits 3 on the diagonal, -3 off it);
- H_pre 0.953 on the sub-layer's home stream and 0.047 on the others.

All zeros would be a symmetric point that training never leaves. Biases and factors are not decayed.

The papers do not say how streams become one at the end. Two ways are here: the mean, and DeepSeek-V4's learned head
(arXiv 2606.19348).

Shapes: B sequences, S positions, n streams, D hidden.
"""

from __future__ import annotations

import itertools
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from elastic_moe.config.schema import ModelConfig
from elastic_moe.model.init import Init, init_in
from elastic_moe.model.layers import DeclaredModule, compute_dtype
from elastic_moe.model.recompute import layers_at_once
from elastic_moe.model.residual import mhc
from elastic_moe.model.residual.eager import EagerKernels, MixSettings
from elastic_moe.model.residual.kernels import choose_kernels

ALPHA = 0.01  # initial factor of the dynamic part (mHC, Table 5); the parameters that hold the factors are called gates
HIGH_LOGIT, LOW_LOGIT = 3.0, -3.0  # initial logits: the sub-layer's home stream and the diagonal, and all others


class Residual(Protocol):
    """One sub-layer's residual connection. The type of a link belongs to the implementation."""

    def read(self, x: torch.Tensor, segments: Segments) -> tuple[torch.Tensor, torch.Tensor, Any]:
        """The residual (to be used from here on), the sub-layer's input [B, S, D], and a link for `write`."""
        ...

    def write(self, x: torch.Tensor, y_BSD: torch.Tensor, link: Any) -> torch.Tensor:
        """The residual after the sub-layer whose output is y."""
        ...

    def residual_map(self, link: Any) -> torch.Tensor | None:
        """H_res [B, S, n, n], detached; None without streams."""
        ...


def segment_length(cfg: ModelConfig) -> int:
    """Number of sub-layers in a segment; see `mhc.Segment`. Layers that are made again have segments of their own."""
    if cfg.stream_segment > 0:
        return cfg.stream_segment
    layers = layers_at_once(cfg)
    if cfg.stream_segment == 0 and not layers and cfg.recompute == "none":
        return 1
    return mhc.best_segment(2 * (layers or cfg.num_layers), cfg.num_streams)


class Segments:
    """Gives each sub-layer of one forward pass the segment that keeps its streams.

    Args:
        cfg: `stream_segment` is the number of sub-layers of a segment, `fused` the choice of kernels.
        device: the streams' device, on which the choice of kernels depends too.
    """

    def __init__(self, cfg: ModelConfig, device: torch.device) -> None:
        self._kernels = choose_kernels(cfg.fused, device)
        self._length = segment_length(cfg)
        self._current = mhc.Segment(self._kernels, self._length)

    def next(self) -> mhc.Segment:
        """The segment of the next sub-layer."""
        if self._current.is_full:
            self._current = mhc.Segment(self._kernels, self._length)
        return self._current


class PlainResidual(nn.Module):
    """x + y."""

    def read(self, x: torch.Tensor, segments: Segments) -> tuple[torch.Tensor, torch.Tensor, None]:
        return x, x, None

    def write(self, x: torch.Tensor, y_BSD: torch.Tensor, link: None) -> torch.Tensor:
        return x + y_BSD

    def residual_map(self, link: None) -> None:
        return None


class HyperConnection(DeclaredModule):
    """HC: unconstrained coefficients. A stream's dynamic part depends on that stream alone."""

    pre_proj: torch.Tensor
    post_proj: torch.Tensor
    res_proj: torch.Tensor
    pre_bias: torch.Tensor
    post_bias: torch.Tensor
    res_bias: torch.Tensor
    gates: torch.Tensor

    def __init__(self, cfg: ModelConfig, sublayer: int) -> None:
        super().__init__()
        n, width = cfg.num_streams, cfg.hidden_size
        self._eps, home = cfg.norm_eps, sublayer % n
        zero = Init(init="zeros")
        self.declare("pre_proj", (1, width), zero)
        self.declare("post_proj", (1, width), zero)
        self.declare("res_proj", (n, width), zero)
        self.declare("pre_bias", (n,), _values([float(i == home) for i in range(n)]))
        self.declare("post_bias", (n,), _values([1.0] * n))
        self.declare("res_bias", (n, n), _values([float(i == j) for i, j in itertools.product(range(n), repeat=2)]))
        self.declare("gates", (3,), _values([ALPHA] * 3))

    def read(self, x: torch.Tensor, segments: Segments) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
        with torch.autocast(x.device.type, enabled=False):
            seen = F.rms_norm(x.float(), (x.shape[-1],), None, self._eps)
            pre, post, res = (F.linear(seen, p).tanh() for p in (self.pre_proj, self.post_proj, self.res_proj))
            pre = self.gates[0] * pre.squeeze(-1) + self.pre_bias
            post = self.gates[1] * post.squeeze(-1) + self.post_bias
            res = self.gates[2] * res.transpose(-1, -2) + self.res_bias  # [i, j]: to stream i, from and by stream j
            h = torch.einsum("bsn,bsnd->bsd", pre.to(x.dtype), x)
        return x, h, (post, res)

    def write(self, x: torch.Tensor, y_BSD: torch.Tensor, link: tuple[torch.Tensor, ...]) -> torch.Tensor:
        post, res = (t.to(x.dtype) for t in link)
        return res @ x + post.unsqueeze(-1) * y_BSD.to(x.dtype).unsqueeze(-2)

    def residual_map(self, link: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return link[1].detach()


class ManifoldHyperConnection(DeclaredModule):
    """mHC: H_res is doubly stochastic. The coefficients depend on every stream and are fp32."""

    proj: torch.Tensor
    base: torch.Tensor
    gates: torch.Tensor

    def __init__(self, cfg: ModelConfig, sublayer: int) -> None:
        super().__init__()
        n = cfg.num_streams
        home = sublayer % n
        pre = [HIGH_LOGIT if i == home else LOW_LOGIT for i in range(n)]
        res = [HIGH_LOGIT if i == j else LOW_LOGIT for i, j in itertools.product(range(n), repeat=2)]
        self._settings = MixSettings(n, cfg.sinkhorn_iters, cfg.mix_eps, cfg.norm_eps)
        self.declare("proj", (2 * n + n * n, n * cfg.hidden_size), Init(init="zeros"))
        self.declare("base", (2 * n + n * n,), _values([*pre, *([0.0] * n), *res]))
        self.declare("gates", (3,), _values([ALPHA] * 3))

    def read(self, x: torch.Tensor, segments: Segments) -> tuple[torch.Tensor, torch.Tensor, mhc.Link]:
        shape = x.shape
        weights = mhc.Weights(self.proj.float(), self.base.float(), self.gates.float())
        with torch.autocast(x.device.type, enabled=False):
            x, h, link = mhc.read(x.flatten(0, 1), weights, self._settings, segments.next())
        return x.view(shape), h.view(*shape[:2], shape[-1]), link

    def write(self, x: torch.Tensor, y_BSD: torch.Tensor, link: mhc.Link) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return mhc.write(x.flatten(0, 1), y_BSD.flatten(0, 1), link).view(x.shape)

    def residual_map(self, link: mhc.Link) -> torch.Tensor:
        return link.res.detach()


def _values(values: list[float]) -> Init:
    return Init(init="values", values=tuple(values), decay=False)


def make_residual(cfg: ModelConfig, sublayer: int) -> Residual:
    """The residual connection of a sub-layer; attention and feed-forward of layer l are sub-layers 2l and 2l + 1."""
    if cfg.residual == "plain":
        return PlainResidual()
    return HyperConnection(cfg, sublayer) if cfg.residual == "hc" else ManifoldHyperConnection(cfg, sublayer)


class ReadOut(DeclaredModule):
    """Streams -> hidden: their mean, or a learned mixture of them (`model.readout`)."""

    proj: torch.Tensor
    base: torch.Tensor
    gate: torch.Tensor

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self._cfg = cfg
        self._learned = cfg.has_streams and cfg.readout == "learned"
        if self._learned:
            n = cfg.num_streams
            self.declare("proj", (n, n * cfg.hidden_size), init_in(cfg))
            self.declare("base", (n,), _values([0.0] * n))
            self.declare("gate", (1,), _values([ALPHA]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, S, n, D] -> [B, S, D]; without streams x itself."""
        if not self._cfg.has_streams:
            return x
        if not self._learned:
            return x.mean(dim=2)
        with torch.autocast(x.device.type, enabled=False):
            seen = F.rms_norm(x.flatten(2).float(), (x.shape[2] * x.shape[3],), None, self._cfg.norm_eps)
            z = F.linear(seen, self.proj.float()) * self.gate + self.base
            weights = z.sigmoid() + self._cfg.mix_eps
            return (weights.unsqueeze(-1) * x).sum(dim=2).to(x.dtype)


def expand_streams(x_BSD: torch.Tensor, cfg: ModelConfig) -> torch.Tensor:
    """[B, S, D] -> streams [B, S, n, D], all equal, in the compute dtype; without streams x itself."""
    if not cfg.has_streams:
        return x_BSD
    x_BSD = x_BSD.to(compute_dtype(x_BSD))
    return x_BSD.unsqueeze(2).expand(-1, -1, cfg.num_streams, -1).contiguous()


def warm_up_kernels(cfg: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Compile now the kernels that would be compiled at their first use, so that a joining worker keeps nobody waiting.

    Does nothing where no kernel is compiled.
    """
    if cfg.residual != "mhc" or isinstance(choose_kernels(cfg.fused, device), EagerKernels):
        return
    mix = ManifoldHyperConnection(cfg, 0).to(device)
    for parameter in mix.parameters():
        parameter.data.zero_()
    x = torch.zeros((1, 8, cfg.num_streams, cfg.hidden_size), device=device, dtype=dtype, requires_grad=True)
    streams, h_BSD, link = mix.read(x, Segments(cfg, device))
    mix.write(streams, h_BSD, link).sum().backward()


def composite_gains(maps: list[torch.Tensor]) -> torch.Tensor:
    """How the product of all sub-layers' H_res scales what passes through it (mHC, figure 3).

    Args:
        maps: H_res [S, n, n] of one sequence, in order of the sub-layers.

    Returns:
        fp32 [3]: largest absolute row sum (forward gain), then largest and smallest absolute column sum (backward
        gain); each is the mean over positions.
    """
    product = maps[0].float()
    for matrix in maps[1:]:
        product = matrix.float() @ product
    rows, columns = product.abs().sum(dim=2), product.abs().sum(dim=1)
    return torch.stack((rows.amax(dim=1).mean(), columns.amax(dim=1).mean(), columns.amin(dim=1).mean()))
