"""Learning rate as a pure function of the step: linear warm-up, then cosine to a fraction of the peak, or constant."""

from __future__ import annotations

import math

from elastic_moe.config.schema import OptimConfig
from elastic_moe.errors import UserError


def lr_at(step: int, total: int, cfg: OptimConfig) -> float:
    """Learning rate of update `step` (from 1) in a run of `total` updates.

    Warm-up reaches the peak at step `warmup_steps`. Cosine reaches `min_lr_ratio` of the peak at step `total` and stays
    there.

    Raises:
        UserError: `optim.schedule` is unknown.
    """
    if cfg.schedule not in ("cosine", "constant"):
        raise UserError(f"optim.schedule is {cfg.schedule!r}; use cosine or constant.")
    if step < cfg.warmup_steps:
        return cfg.lr * step / cfg.warmup_steps
    if cfg.schedule == "constant":
        return cfg.lr
    progress = min(1.0, (step - cfg.warmup_steps) / max(1, total - cfg.warmup_steps))
    ratio = cfg.min_lr_ratio + (1.0 - cfg.min_lr_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress))
    return cfg.lr * ratio
