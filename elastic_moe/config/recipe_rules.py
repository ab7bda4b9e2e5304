"""Rules of the training recipe's keys: the learning rate's schedule and the ramp of the batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from elastic_moe.config.schema import OptimConfig, TrainConfig
from elastic_moe.errors import UserError


def check_recipe(config: TrainConfig) -> list[str]:
    """Raise UserError for the first rule broken; return notes about settings that are allowed but doubtful."""
    parse_lr_steps(config.optim.lr_steps)
    _check_ramp(config)
    return _beyond_the_run(config)


def _beyond_the_run(config: TrainConfig) -> list[str]:
    """Notes about what a run is too short for. With a ramp its tokens are fewer than those that are counted here."""
    optim, data, steps = config.optim, config.data, config.run.steps
    tokens = steps * data.global_batch * data.seq_len
    notes: list[str] = []
    for key, length, whole in (
        ("optim.warmup_tokens", optim.warmup_tokens, tokens),
        ("optim.warmup_steps", 0 if optim.warmup_tokens else optim.warmup_steps, steps),
    ):
        name = key.rpartition("_")[2]
        decays_from = whole * (1 - optim.decay_fraction)
        if length > whole and length != OptimConfig().warmup_steps:  # a run of a few steps tries something else
            notes.append(
                f"{key} ({length}) is more than the run's {whole} {name}: the learning rate never reaches optim.lr."
            )
        elif optim.schedule == "wsd" and length > decays_from:
            notes.append(
                f"{key} ({length}) ends after the decay of optim.schedule=wsd begins (at {math.floor(decays_from)} of "
                f"{whole} {name}): the learning rate never stays at optim.lr."
            )
    for key, length, whole in (
        ("data.batch_ramp_steps", data.batch_ramp_steps, steps),
        ("data.batch_ramp_tokens", data.batch_ramp_tokens, tokens),
    ):
        if length >= whole:
            notes.append(
                f"{key} ({length}) is not less than the run's {whole} {key.rpartition('_')[2]}: no batch reaches "
                f"data.global_batch ({data.global_batch})."
            )
    return notes


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
