"""The weights with which a run begins: those of `model.init_from`; the others by seed and name."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from elastic_moe.config.schema import ModelConfig
from elastic_moe.model.hf.checkpoint import HFCheckpoint
from elastic_moe.model.init import init_param
from elastic_moe.types import ParamSpec, Unit


class InitialWeights:
    """Makes the first weight of any unit, the same on every rank.

    A large tensor is asked for block by block, so the last one read is kept. The checkpoint is opened when it is first
    needed: a worker that joins a running job never needs it.

    Args:
        model: the model's configuration.
        specs: every parameter.
        seed: the run's seed.
    """

    def __init__(self, model: ModelConfig, specs: Sequence[ParamSpec], seed: int) -> None:
        self._model, self._seed = model, seed
        self._specs = {spec.name: spec for spec in specs}
        self._opened: HFCheckpoint | None = None
        self._last: tuple[str, torch.Tensor] = ("", torch.empty(0))

    def __call__(self, unit: Unit) -> torch.Tensor:
        """First weight of a unit, fp32 [numel]."""
        parts = []
        for part in unit.parts:
            whole = self._param(self._specs[part.param]).flatten()
            parts.append(whole[part.start : part.start + part.numel])
        return torch.cat(parts).float()

    def _param(self, spec: ParamSpec) -> torch.Tensor:
        if self._last[0] != spec.name:
            if self._model.init_from and self._opened is None:
                self._opened = HFCheckpoint(self._model.init_from, self._model)
            read = None if self._opened is None else self._opened.read(spec)
            self._last = spec.name, init_param(spec, self._seed) if read is None else read
        return self._last[1]
