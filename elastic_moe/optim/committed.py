"""The facts of a committed step that an update rule may use."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from elastic_moe.config.schema import ModelConfig, OptimConfig


@dataclass(frozen=True, slots=True, eq=False)
class CommittedStep:
    """A committed step, equal on every rank.

    Attributes:
        step: its number, from 1.
        lr: learning rate of this step.
        load_LE: tokens routed to each expert of each MoE layer in this step, over the whole global batch.
        optim, model: the configuration.
    """

    step: int
    lr: float
    load_LE: np.ndarray
    optim: OptimConfig
    model: ModelConfig

    def scaled(self, factor: float) -> CommittedStep:
        """The step for units whose learning rate has this factor. Their weights decay as without it."""
        if factor == 1.0:
            return self
        optim = replace(self.optim, weight_decay=self.optim.weight_decay / factor)
        return replace(self, lr=self.lr * factor, optim=optim)
