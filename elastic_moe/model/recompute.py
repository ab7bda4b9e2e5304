"""What of a forward pass is not kept but made again in the backward pass: `model.recompute`.

- `none`: everything is kept.
- `selective`: attention keeps its input alone, and so do dense feed-forwards and shared experts; the routed experts
  keep their rows and not their hidden units. Nothing is sent twice. (Korthikanti et al., arXiv 2205.05198, section 5,
  and DeepSeek-V3, arXiv 2412.19437, section 3.2.3, choose likewise what is large for its arithmetic.)
- `full`: a layer keeps its input alone. Its experts' rows travel again in the backward pass. All ranks go through the
  layers in the same order, so the collectives match as they do in the forward pass.
- a number n: as `full`, for n layers at once (Chen et al., arXiv 1604.06174).

The operations that are made again are the same on the same numbers, so no result differs in a bit. Parts within a layer
use torch's non-reentrant checkpoint. Whole layers use the reentrant one: it keeps no graph of the first pass, in which
segments of streams would hold on to them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from elastic_moe.config.schema import ModelConfig


def layers_at_once(cfg: ModelConfig) -> int:
    """Layers that are made again together; 0 if none are."""
    return (
        {"none": 0, "selective": 0, "full": 1}[cfg.recompute] if not cfg.recompute.isdecimal() else int(cfg.recompute)
    )


def part_of_layer(cfg: ModelConfig, function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)`, of which only the arguments are kept with `selective`."""
    if cfg.recompute != "selective" or not torch.is_grad_enabled():
        return function(*args)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


def whole_layers(run: Callable[..., tuple[torch.Tensor, ...]], *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """`run(*args, again=False)`, of which only the arguments are kept; the backward pass runs it with `again=True`.

    Args:
        run: its results are tensors, of which some depend on parameters that get their gradients directly.
        args: one of them requires a gradient.
    """
    calls = 0

    def counted(*given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        nonlocal calls
        calls += 1
        return run(*given, again=calls > 1)

    out: tuple[torch.Tensor, ...] = checkpoint(counted, *args, use_reentrant=True, preserve_rng_state=False)
    return out
