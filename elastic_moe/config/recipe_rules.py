"""Rules of the training recipe's keys: the learning rate's schedule and the ramp of the batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from elastic_moe.config.schema import TrainConfig
from elastic_moe.errors import UserError


def check_recipe(config: TrainConfig) -> list[str]:
    """Raise UserError for the first rule broken; return notes about settings that are allowed but doubtful."""
    optim = config.optim
    parse_lr_steps(optim.lr_steps)
    _check_ramp(config)
    decays_from = config.run.steps * (1 - optim.decay_fraction)
    if optim.schedule == "wsd" and not optim.warmup_tokens and optim.warmup_steps > decays_from:
        return [
            f"optim.warmup_steps ({optim.warmup_steps}) ends after the decay of optim.schedule=wsd begins (step "
            f"{math.floor(decays_from)} of {config.run.steps}): the learning rate never stays at optim.lr."
        ]
    return []


def _check_ramp(config: TrainConfig) -> None:
    data = config.data
    over = [key for key in ("batch_ramp_steps", "batch_ramp_tokens") if getattr(data, key)]
    if data.batch_ramp >= data.global_batch:
        raise UserError(
            f"data.batch_ramp ({data.batch_ramp}) must be below data.global_batch ({data.global_batch}), to which the "
            "batch grows."
        )
    if not data.batch_ramp and over:
        raise UserError(f"data.{over[0]} is the length of a ramp: set data.batch_ramp, the first batch's sequences.")
    if data.batch_ramp and len(over) != 1:
        raise UserError("data.batch_ramp needs either data.batch_ramp_steps or data.batch_ramp_tokens, its length.")


def parse_lr_steps(entries: Sequence[str]) -> list[tuple[Fraction, float]]:
    """(fraction of the run, factor) of each entry of `optim.lr_steps`.

    Raises:
        UserError: an entry is none, or the fractions do not rise.
    """
    steps: list[tuple[Fraction, float]] = []
    for entry in entries:
        fraction, _, factor = entry.partition(":")
        try:
            steps.append((Fraction(fraction), float(factor)))
        except (ValueError, ZeroDivisionError):
            steps.append((Fraction(0), math.nan))
        at, value = steps[-1]
        if not (0 < at < 1 and 0 <= value < math.inf) or (len(steps) > 1 and at <= steps[-2][0]):
            raise UserError(
                "optim.lr_steps must list FRACTION:FACTOR with rising fractions of the run between 0 and 1, and "
                f"factors of optim.lr of at least 0, such as 0.8:0.316, not {entry!r}."
            )
    return steps
