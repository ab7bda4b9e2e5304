"""The state of a unit as named tensors: its fp32 master weight, and whatever else its update rule keeps.

The names are the `fields` of the rule's `RuleFacts`, "weight" first. Every field is a flat vector with as many elements
as the unit. Checkpoints store a field as the tensor `{unit}/{field}`; transfers send all fields as one vector.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from elastic_moe.errors import UserError
from elastic_moe.types import Unit


@dataclass(frozen=True, slots=True)
class UnitState:
    """State of one unit, or of several that lie one after another.

    Attributes:
        fields: field name -> fp32 [n]; updated in place. The order is that of the rule's fields.
    """

    fields: Mapping[str, torch.Tensor]

    @staticmethod
    def empty(names: Sequence[str], numel: int, device: torch.device) -> UnitState:
        """Room for `numel` elements of each field; the values are undefined."""
        return UnitState({name: torch.empty(numel, device=device) for name in names})

    @staticmethod
    def initial(unit: Unit, weight: torch.Tensor) -> UnitState:
        """State before the first update: the given fp32 weight [n], and zeros in every other field."""
        assert weight.numel() == unit.numel, f"{unit.name} has {unit.numel} elements, not {weight.numel()}"
        others = {name: torch.zeros_like(weight) for name in unit.rule.fields if name != "weight"}
        return UnitState({"weight": weight} | others)

    @staticmethod
    def stored(unit: Unit, tensors: Mapping[str, torch.Tensor]) -> UnitState:
        """State read from a checkpoint (field name -> tensor).

        Raises:
            UserError: the checkpoint lacks a field: it was written with another update rule.
        """
        for name in unit.rule.fields:
            if name not in tensors or tensors[name].numel() != unit.numel:
                raise UserError(
                    f"The checkpoint has no {name} of {unit.name} with {unit.numel} elements: it is of another model "
                    f"or of another update rule than {unit.optimizer}. Resume with the configuration that wrote it."
                )
        return UnitState({name: tensors[name].flatten() for name in unit.rule.fields})

    @staticmethod
    def unpacked(unit: Unit, vector: torch.Tensor) -> UnitState:
        """Inverse of `pack`; the fields are views of `vector`, which has `unit.state_numel` elements."""
        return UnitState(dict(zip(unit.rule.fields, vector.split(unit.numel), strict=True)))

    def pack(self) -> torch.Tensor:
        """Every field, one after another, as one new vector."""
        return torch.cat([tensor.flatten() for tensor in self.fields.values()])

    @property
    def weight(self) -> torch.Tensor:
        return self.fields["weight"]

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.fields[name]

    def span(self, start: int, stop: int) -> UnitState:
        """Views of elements `start` to `stop` of every field."""
        return UnitState({name: tensor[start:stop] for name, tensor in self.fields.items()})

    def copy_(self, source: UnitState) -> None:
        """Take over the values of another state with the same fields, in place."""
        assert self.fields.keys() == source.fields.keys(), (tuple(self.fields), tuple(source.fields))
        for name, tensor in self.fields.items():
            tensor.copy_(source.fields[name])
