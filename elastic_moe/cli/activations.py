"""Bytes of a micro-batch's activations, from the widths of the tensors that each layer keeps for its backward pass.

The widths were counted in the code of the layers, and `tests/unit/cli/test_activations.py` compares the bytes with
those of a process.
"""

from __future__ import annotations

from elastic_moe.config.schema import ModelConfig, TrainConfig
from elastic_moe.model.head_loss import chunk_rows
from elastic_moe.model.recompute import layers_at_once
from elastic_moe.model.residual.connections import segment_length
from elastic_moe.plan.placement import copies_of, expected_nodes

FP32 = 4
GRADIENTS = 0.15  # of what is made again at once: gradients beside it, as measured
SWIGLU = 4  # tensors of a dense feed-forward: gate, up, the activated gate, the product


def activation_bytes(config: TrainConfig, workers: int) -> float:
    """Most bytes of one micro-batch's activations on one of so many workers.

    They are largest at the end of the forward pass, when the logits are formed, or in the backward pass, when what is
    made again is there besides what is kept.
    """
    cfg, tokens = config.model, config.data.micro_batch * config.data.seq_len
    size = 2 if config.precision == "bf16" else FP32
    copies = copies_of(config, expected_nodes(config, workers))
    everywhere = copies.number >= workers and not config.elastic.reproducible
    kept, again, layers = 0.0, 0.0, cfg.num_layers + cfg.mtp_depth
    at_once = layers_at_once(cfg)
    whole = [_layer(cfg, layer < cfg.num_dense_layers, everywhere) for layer in range(layers)]
    if at_once:
        inputs = cfg.hidden_size * (cfg.num_streams if cfg.has_streams else 1)
        kept = inputs * -(-cfg.num_layers // at_once) + inputs * cfg.mtp_depth
        groups = [whole[start : start + at_once] for start in range(0, cfg.num_layers, at_once)]
        again = max(sum(sum(parts) for parts in group) for group in groups)
        again += GRADIENTS * max(sum(parts) for parts in whole)
        again += min(2 * at_once, 2 * cfg.num_layers) * _streams(cfg)
    else:
        kept = 2 * layers * _streams(cfg)
        for attention, feed_forward, fixed in whole:
            if cfg.recompute == "selective":
                kept, again = kept + fixed, max(again, (1 + GRADIENTS) * max(attention, feed_forward))
            else:
                kept += attention + feed_forward + fixed
    return tokens * size * (kept + again) + _head_bytes(config, tokens, again * tokens * size)


def _head_bytes(config: TrainConfig, tokens: int, at_other_times: float) -> float:
    """Bytes of the logits beyond those that are there at other times instead."""
    cfg = config.model
    rows = chunk_rows(cfg.logits_gib * 2**30, cfg.vocab_size, config.device)
    if rows and tokens > rows:
        own = 3 * FP32 * rows * cfg.vocab_size + FP32 * cfg.vocab_size * cfg.hidden_size
    else:
        own = 3 * FP32 * tokens * cfg.vocab_size
    return max(0.0, own - at_other_times) + FP32 * tokens * cfg.hidden_size


def _streams(cfg: ModelConfig) -> float:
    """Elements per token that one sub-layer's residual keeps: its sum, or the streams with their coefficients."""
    if not cfg.has_streams:
        return cfg.hidden_size
    n, segment = cfg.num_streams, segment_length(cfg)
    made_again = n * (segment > 1)  # while a segment's backward pass goes on, spread over all sub-layers
    per_layer = n / segment + 2 + made_again * segment / (2 * cfg.num_layers)
    return per_layer * cfg.hidden_size + 2 * (2 * n + n * n)


def _layer(cfg: ModelConfig, dense: bool, everywhere: bool) -> tuple[float, float, float]:
    """Elements per token that a layer keeps, without its residual.

    Returns:
        Those of attention and of feed-forwards that `selective` makes again, and those that it keeps.
    """
    width, hidden = cfg.hidden_size, cfg.expert_hidden
    if cfg.attention == "gqa":
        q, kv = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
        heads = 3 * q + 2 * kv + (q + kv) * cfg.qk_norm
    elif cfg.attention == "mla":
        one = cfg.head_dim + cfg.rope_dim
        heads = cfg.num_heads * (4 * one + cfg.value_dim) + 2 * cfg.kv_latent + cfg.rope_dim + 2 * cfg.query_latent
    else:
        heads = 3 * cfg.num_heads * cfg.head_dim + 3 * cfg.head_dim + 2 * cfg.query_latent
    attention = width + heads
    if dense:
        return attention, width + SWIGLU * cfg.dense_hidden, 0.0
    routed = cfg.experts_per_token * (0 if everywhere else 2 * width)
    fixed = width + routed + 4 * cfg.num_experts
    again = cfg.experts_per_token * 2 * hidden + SWIGLU * cfg.num_shared_experts * hidden
    return attention, again, fixed
