"""Update rules by name: the facts of each, and the function that updates its units.

A new rule is one line in `types.RULE_FACTS` and one file here. The line names the rule and states its facts, which
planning needs without torch. The file `elastic_moe/optim/NAME.py` has the function `apply`. Everything else asks the
facts: cutting tensors into units, exchanges, transfers and checkpoints.

Twins apply the same update to the same numbers and must stay equal bit for bit. A rule is therefore deterministic and
reads nothing but its arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol

import torch

from elastic_moe.optim.committed import CommittedStep
from elastic_moe.optim.unit_state import UnitState
from elastic_moe.types import RULE_FACTS, RuleFacts, Unit


class Apply(Protocol):
    """Update units in place for one committed step."""

    def __call__(self, units: Sequence[Unit], state: UnitState, grad: torch.Tensor | None, step: CommittedStep) -> None:
        """Update `state` in place.

        Args:
            units: the units that lie one after another in `state`. They have the same rule and the same `decay`. There
                is exactly one unit if the rule is not elementwise.
            state: their state.
            grad: fp32 [n] gradient, already averaged and clipped, to be left as it is; None if the rule has none.
            step: the committed step.
        """
        ...


@dataclass(frozen=True, slots=True)
class UpdateRule:
    """An update rule: its facts and its function."""

    facts: RuleFacts
    apply: Apply


RULES: dict[str, UpdateRule] = {
    name: UpdateRule(facts, import_module(f"elastic_moe.optim.{name}").apply) for name, facts in RULE_FACTS.items()
}
