"""Learning rate as a pure function of the step and of the tokens up to it: a warm-up, then a schedule.

- `cosine`: half a period down to a fraction of the peak at the end (Loshchilov and Hutter, arXiv 1608.03983).
- `constant`.
- `wsd`, warm-up-stable-decay: constant, then down in the last part of the run (MiniCPM, arXiv 2404.06395, section 4.2;
  the shape 1 - sqrt(x): Haegele et al., arXiv 2405.18392, section 3.2). Until the decay begins nothing depends on the
  length of the run. So a run can be continued to any length from a checkpoint before it, and its decay begins there if
  the new length says so.
- `steps`: factors that hold from given fractions of the run on (mHC, arXiv 2512.24880, Table 5).

Fractions of a run are fractions of its tokens. With batches of one size they are those of its steps.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from fractions import Fraction

from elastic_moe.config.recipe_rules import parse_lr_steps
from elastic_moe.config.schema import OptimConfig
from elastic_moe.errors import UserError

SHAPES: dict[str, Callable[[float], float]] = {  # of a decay: from 1 at its begin (0) to 0 at its end (1)
    "linear": lambda x: 1.0 - x,
    "sqrt": lambda x: 1.0 - math.sqrt(x),
    "cosine": lambda x: 0.5 * (1.0 + math.cos(math.pi * x)),
}


def one_token_each(step: int) -> int:
    """Tokens of so many steps in units of the batch, if all batches are equal."""
    return step


def lr_at(step: int, total: int, cfg: OptimConfig, tokens_through: Callable[[int], int] = one_token_each) -> float:
    """Learning rate of update `step` (from 1) in a run of `total` updates.

    The warm-up reaches the peak at step `warmup_steps`, or after `warmup_tokens`. Cosine and the decay of wsd reach
    `min_lr_ratio` of the peak at step `total` and stay there.

    Args:
        step: of the update.
        total: updates of the run.
        cfg: the schedule.
        tokens_through: tokens of the steps up to one.

    Raises:
        UserError: `optim.schedule` is unknown.
    """
    if cfg.schedule not in ("cosine", "constant", "wsd", "steps"):
        raise UserError(f"optim.schedule is {cfg.schedule!r}; use cosine, constant, wsd or steps.")
    now, end = tokens_through(step), tokens_through(total)
    if cfg.warmup_tokens and now < cfg.warmup_tokens:
        return cfg.lr * now / cfg.warmup_tokens
    if not cfg.warmup_tokens and step < cfg.warmup_steps:
        return cfg.lr * step / cfg.warmup_steps
    if cfg.schedule == "constant":
        return cfg.lr
    if cfg.schedule == "steps":
        return cfg.lr * _factor(tokens_through(step - 1), end, cfg.lr_steps)
    shape = SHAPES["cosine" if cfg.schedule == "cosine" else cfg.decay_shape]
    begin = cfg.warmup_tokens or tokens_through(cfg.warmup_steps)
    if cfg.schedule == "wsd":
        begin = _stable_tokens(end, cfg)
        if now <= begin:
            return cfg.lr
    progress = min(1.0, float((now - begin) / (max(end - begin, 0) or 1)))
    return cfg.lr * (cfg.min_lr_ratio + (1.0 - cfg.min_lr_ratio) * shape(progress))


def last_stable_step(total: int, cfg: OptimConfig, tokens_through: Callable[[int], int] = one_token_each) -> int:
    """The last step before the decay of `wsd`, from which a run can be continued to any length; 0 if there is none."""
    if cfg.schedule != "wsd":
        return 0
    return bisect_right(range(total + 1), _stable_tokens(tokens_through(total), cfg), key=tokens_through) - 1


def _stable_tokens(end: int, cfg: OptimConfig) -> Fraction:
    """Tokens after which the decay of `wsd` begins, in a run of `end` tokens."""
    return end - _exactly(cfg.decay_fraction) * end


def _factor(done: int, end: int, entries: Sequence[str]) -> float:
    """Factor of the step before which so many of the run's tokens were done."""
    factor = 1.0
    for fraction, value in parse_lr_steps(entries):
        if done >= fraction * end:
            factor = value
    return factor


def _exactly(value: float) -> Fraction:
    """The decimal fraction that a user wrote: 0.07 of 100 steps are 7 of them, and no bit more."""
    return Fraction(repr(value))
