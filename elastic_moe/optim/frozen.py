"""The rule of units that never change, such as the expert table of a hash router."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from elastic_moe.optim.committed import CommittedStep
from elastic_moe.optim.unit_state import UnitState
from elastic_moe.types import Unit


def apply(units: Sequence[Unit], state: UnitState, grad: torch.Tensor | None, step: CommittedStep) -> None:
    """Leave the state as it is."""
