"""DeepSeek-V4's attention: a sliding window of single tokens, and the past before it in compressed entries.

Source: DeepSeek-V4 (arXiv 2606.19348, section 2.3), as transformers computes it. A layer is of one of three kinds:

- `sliding`: the window alone;
- `hca` (heavily compressed attention): an entry per `hca_rate` tokens, and every query sees all of them;
- `csa` (compressed sparse attention): an entry per `csa_rate` tokens, of which an indexer chooses the best for a query.

All heads share one key per position, which is also its value. The value's position is rotated away after attention.

The indexer only chooses, so the model's loss gives it no gradient. Its own loss (DeepSeek-V3.2, arXiv 2512.02556,
section 2.1) moves its distribution over the entries towards the sum of the heads' attention. Its inputs are detached.

With documents, an entry belongs to the document of its last token. It pools that document's tokens only, and only that
document sees it. Windows stay aligned to the row.

Shapes: B sequences, S positions, L positions so far, W entries, m rate, D hidden, H heads, c head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from elastic_moe.config.schema import ModelConfig
from elastic_moe.model.attention.context import AttentionContext, LayerCache
from elastic_moe.model.attention.rope import Tables, rotate_tail
from elastic_moe.model.attention.sinks import sink_attention
from elastic_moe.model.init import Init, constant, init_in, init_out
from elastic_moe.model.layers import DeclaredModule, Linear, RMSNorm


def layer_kind(cfg: ModelConfig, layer: int) -> str:
    """Kind of a layer's attention. The default is V4-Pro's pattern: two hca, then hca and csa in turn."""
    if cfg.layer_kinds:
        return cfg.layer_kinds[
            min(layer, len(cfg.layer_kinds) - 1)
        ]  # the layer of multi-token prediction is like the last
    return "csa" if layer >= 2 and layer % 2 else "hca"


class Compressor(DeclaredModule):
    """Pools windows of tokens into entries, with learned weights per channel.

    The weights are a softmax over the window. The projection that makes its logits is called `gate` in checkpoints.

    Args:
        cfg: the model's shape.
        name: prefix of its tensors in the cache.
        width: channels of an entry.
        rate: tokens per window.
        overlap: an entry pools the previous window too, through a second series of channels.
    """

    position_bias: torch.Tensor

    def __init__(self, cfg: ModelConfig, name: str, width: int, rate: int, overlap: bool) -> None:
        super().__init__()
        self._cfg, self._name, self._width, self._rate, self._overlap = cfg, name, width, rate, overlap
        series = 2 * width if overlap else width
        self.kv = Linear(cfg.hidden_size, series, init_in(cfg))
        self.gate = Linear(cfg.hidden_size, series, init_in(cfg))
        self.declare("position_bias", (rate, series), constant(0.0))
        self.norm = RMSNorm(width, cfg.norm_eps)

    def forward(self, x_BSD: torch.Tensor, context: AttentionContext, cache: LayerCache | None) -> torch.Tensor:
        """Entries [B, W, width] of all complete windows so far."""
        kv, logits = self.kv(x_BSD), self.gate(x_BSD)
        if cache is not None:
            kv, logits = cache.extend(f"{self._name}.kv", kv), cache.extend(f"{self._name}.gate", logits)
        rate = self._rate
        count = kv.shape[1] // rate
        kv = kv[:, : count * rate].unflatten(1, (count, rate))
        logits = logits[:, : count * rate].unflatten(1, (count, rate)) + self.position_bias.to(logits.dtype)
        if self._overlap:
            kv, logits = _overlapped(kv, 0.0), _overlapped(logits, float("-inf"))
        if context.documents_BS is not None:
            logits = logits.masked_fill(~self._same_document(context, count), float("-inf"))
        weights = logits.softmax(dim=2, dtype=torch.float32).to(kv.dtype)
        entries = self.norm((kv * weights).sum(dim=2))
        tables = context.rope(self._cfg.rope_dim, self._cfg.compress_theta, True, stride=rate, count=count)
        return rotate_tail(entries, tables)

    def _same_document(self, context: AttentionContext, count: int) -> torch.Tensor:
        """bool [B, W, m or 2m, 1]: the token belongs to the document of the window's last token."""

        def make() -> torch.Tensor:
            assert context.documents_BS is not None
            windows = context.documents_BS[:, : count * self._rate].unflatten(1, (count, self._rate))
            if self._overlap:
                before = torch.cat((torch.full_like(windows[:, :1], -1), windows[:, :-1]), dim=1)
                return (torch.cat((before, windows), dim=2) == windows[:, :, -1:]).unsqueeze(-1)
            return (windows == windows[:, :, -1:]).unsqueeze(-1)

        return context.once(("same document", self._rate, self._overlap), make)


def _overlapped(windows: torch.Tensor, fill: float) -> torch.Tensor:
    """[B, W, m, 2c] -> [B, W, 2m, c]: the first series of the previous window, then the second series of this one."""
    first, second = windows.chunk(2, dim=-1)
    before = torch.cat((torch.full_like(first[:, :1], fill), first[:, :-1]), dim=1)
    return torch.cat((before, second), dim=2)


class Indexer(nn.Module):
    """Scores the entries for every query: sum over heads of weight * relu(q . k). The caller detaches its inputs."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self._cfg = cfg
        self.compressor = Compressor(cfg, "indexer", cfg.index_dim, cfg.csa_rate, overlap=True)
        self.q_up = Linear(cfg.query_latent, cfg.index_heads * cfg.index_dim, init_in(cfg))
        self.weigh = Linear(cfg.hidden_size, cfg.index_heads, init_in(cfg))

    def forward(
        self,
        x_BSD: torch.Tensor,
        latent_BSq: torch.Tensor,
        context: AttentionContext,
        cache: LayerCache | None,
        tables: Tables,
    ) -> torch.Tensor:
        """Scores [B, S, W], fp32; those of entries that the query does not see have no meaning."""
        cfg = self._cfg
        keys = self.compressor(x_BSD, context, cache).float()
        q_BHSc = rotate_tail(self.q_up(latent_BSq).unflatten(-1, (cfg.index_heads, -1)).transpose(1, 2), tables)
        weights_BHS = self.weigh(x_BSD).float().transpose(1, 2) * (cfg.index_heads * cfg.index_dim) ** -0.5
        scores = torch.zeros((*x_BSD.shape[:2], keys.shape[1]), device=x_BSD.device)
        for head in range(cfg.index_heads):  # one head at a time: all together would need H * S * W numbers
            match = F.relu(q_BHSc[:, head].float() @ keys.transpose(1, 2))
            scores = scores + match * weights_BHS[:, head].unsqueeze(-1)
        return scores


class CompressedAttention(DeclaredModule):
    """One layer of DeepSeek-V4's attention; `layer_kind` gives its kind."""

    sinks: torch.Tensor
    group_out: torch.Tensor

    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        super().__init__()
        self._cfg, self._layer, self.kind = cfg, layer, layer_kind(cfg, layer)
        heads, width, groups = cfg.num_heads, cfg.head_dim, cfg.output_groups
        self.q_down = Linear(cfg.hidden_size, cfg.query_latent, init_in(cfg))
        self.q_norm = RMSNorm(cfg.query_latent, cfg.norm_eps)
        self.q_up = Linear(cfg.query_latent, heads * width, init_in(cfg))
        self.kv = Linear(cfg.hidden_size, width, init_in(cfg))
        self.kv_norm = RMSNorm(width, cfg.norm_eps)
        self.declare("sinks", (heads,), constant(0.0))
        shape = (groups * cfg.output_latent, heads * width // groups)
        self.declare("group_out", shape, Init(std=cfg.init_std, stacked=groups))
        self.o = Linear(groups * cfg.output_latent, cfg.hidden_size, init_out(cfg))
        if self.kind == "csa":
            self.compressor = Compressor(cfg, "entries", width, cfg.csa_rate, overlap=True)
            self.indexer = Indexer(cfg)
        elif self.kind == "hca":
            self.compressor = Compressor(cfg, "entries", width, cfg.hca_rate, overlap=False)

    def forward(self, x_BSD: torch.Tensor, context: AttentionContext) -> tuple[torch.Tensor, torch.Tensor | None]:
        cfg, cache = self._cfg, context.layer_cache(self._layer)
        has_entries = self.kind != "sliding"
        theta = cfg.compress_theta if has_entries else cfg.rope_theta
        tables = context.rope(cfg.rope_dim, theta, yarn=has_entries)
        latent_BSq = self.q_norm(self.q_down(x_BSD))
        q_BHSc = self.q_up(latent_BSq).unflatten(-1, (cfg.num_heads, -1)).transpose(1, 2)
        q_BHSc = rotate_tail(F.rms_norm(q_BHSc, (cfg.head_dim,), None, cfg.norm_eps), tables)
        k_BLc = rotate_tail(self.kv_norm(self.kv(x_BSD)), tables)
        if cache is not None:
            k_BLc = cache.extend("k", k_BLc)
        in_window = context.mask(cfg.window)
        if in_window is None:
            in_window = torch.ones((cfg.window, cfg.window), dtype=torch.bool, device=x_BSD.device)
            in_window = in_window[: context.seq_len, : context.seq_len].tril()[None, None]
        scale = cfg.head_dim**-0.5
        if not has_entries:
            out, _ = sink_attention(q_BHSc, k_BLc, self.sinks, in_window, scale)
            return self._project(out, tables), None
        entries_BWc = self.compressor(x_BSD, context, cache)
        visible = self._visible(context, entries_BWc.shape[1])
        scores = None
        if self.kind == "csa":
            scores = self.indexer(x_BSD.detach(), latent_BSq.detach(), context, cache, tables)
            visible = self._choose(scores, visible)
        in_window = in_window.expand(len(visible), -1, -1, -1)
        seen = torch.cat((in_window, visible.unsqueeze(1)), dim=-1)
        out, lse_BHS = sink_attention(q_BHSc, torch.cat((k_BLc, entries_BWc), dim=1), self.sinks, seen, scale)
        loss = None
        if scores is not None and context.trains:
            loss = index_loss(scores, visible, q_BHSc.detach(), entries_BWc.detach(), lse_BHS, scale)
        return self._project(out, tables), loss

    def _visible(self, context: AttentionContext, count: int) -> torch.Tensor:
        """bool [B or 1, S, W]: the entry's window is complete at the query's position, and of the query's document."""
        rate = self._cfg.csa_rate if self.kind == "csa" else self._cfg.hca_rate

        def make() -> torch.Tensor:
            entry = torch.arange(count, device=context.positions.device)
            visible = (entry < (context.positions[:, None] + 1) // rate)[None]
            if context.documents_BS is not None:
                last = context.documents_BS[:, rate - 1 : count * rate : rate]
                visible = visible & (context.documents_BS[:, :, None] == last[:, None, :])
            return visible

        return context.once(("visible", rate, count), make)

    def _choose(self, scores_BSW: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        """The visible entries with the highest scores, at most `index_topk` per query; bool [B, S, W]."""
        top = self._cfg.index_topk
        if top >= scores_BSW.shape[-1]:
            return visible.expand(len(scores_BSW), -1, -1)
        ids = scores_BSW.detach().masked_fill(~visible, float("-inf")).topk(top, dim=-1, sorted=False).indices
        chosen = torch.zeros(scores_BSW.shape, dtype=torch.bool, device=scores_BSW.device).scatter_(-1, ids, True)
        return chosen & visible

    def _project(self, out_BHSc: torch.Tensor, tables: Tables) -> torch.Tensor:
        """Rotate the position out of the values, project each group of heads, then all groups together."""
        cos, sin = tables
        out_BSHc = rotate_tail(out_BHSc, (cos, -sin)).transpose(1, 2)
        groups = self._cfg.output_groups
        grouped = out_BSHc.reshape(*out_BSHc.shape[:2], groups, self.group_out.shape[1])
        weight = self.group_out.view(groups, self._cfg.output_latent, -1)
        return self.o(torch.einsum("bsgi,goi->bsgo", grouped, weight).flatten(2))


def index_loss(
    scores_BSW: torch.Tensor,
    seen_BSW: torch.Tensor,
    q_BHSc: torch.Tensor,
    entries_BWc: torch.Tensor,
    lse_BHS: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """KL divergence from the heads' attention to the indexer's distribution, over the entries seen, summed over tokens.

    The target is the heads' sum of attention weights, normalised over the entries. A token that sees none adds nothing.

    Args:
        scores_BSW: the indexer's scores, which get the gradient.
        seen_BSW: bool, the entries that each query sees.
        q_BHSc: queries of attention, detached.
        entries_BWc: entries, detached.
        lse_BHS: log of the softmax's denominator in attention.
        scale: factor on the heads' scores.
    """
    with torch.no_grad():
        target = torch.zeros_like(scores_BSW)
        for head in range(q_BHSc.shape[1]):
            logits = (q_BHSc[:, head].float() @ entries_BWc.float().transpose(1, 2)) * scale
            target += (logits - lse_BHS[:, head].float().unsqueeze(-1)).exp()
        target = target.masked_fill(~seen_BSW, 0.0)
        target /= target.sum(dim=-1, keepdim=True).clamp_min(1e-20)
    sees_any = seen_BSW.any(dim=-1, keepdim=True)
    masked = torch.where(sees_any, scores_BSW.masked_fill(~seen_BSW, float("-inf")), torch.zeros_like(scores_BSW))
    log_own = masked.log_softmax(dim=-1).masked_fill(~seen_BSW, 0.0)
    return (torch.special.xlogy(target, target) - target * log_own).sum()
