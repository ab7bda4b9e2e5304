"""What one worker holds: fp32 master weights and optimizer moments of the units it owns or mirrors.

Units of one kind lie one after another in flat vectors, so that one call updates them all; AdamW is elementwise, so this equals updating
them one by one. Twins apply the same update to the same numbers and therefore stay equal (active replication, DESIGN.md section 3).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from elastic_moe.config.schema import ModelConfig, OptimConfig
from elastic_moe.control.vote import VoteResult
from elastic_moe.optim.adamw import UnitState, apply_adamw, apply_bias
from elastic_moe.plan.state.ownership import NONE
from elastic_moe.types import Unit

FIELDS = {"adamw": ("weight", "m", "v"), "bias": ("weight",), "frozen": ("weight",)}


def packed_numel(unit: Unit) -> int:
    """Elements of a unit's whole state as it travels: weight, and moments where it has them."""
    return unit.numel * len(FIELDS[unit.optimizer])


@dataclass
class HeldState:
    """Units held by this worker, at one committed step.

    Attributes:
        units: every unit of the model (not only the held ones).
        roles: uint8 [U], NONE, MIRROR or PRIMARY per unit.
        states: unit index -> views of its weight and moments.
    """

    units: Sequence[Unit]
    roles: np.ndarray
    states: dict[int, UnitState] = field(default_factory=dict)
    _flat: dict[bool, UnitState] = field(default_factory=dict)
    _spans: dict[int, tuple[bool, int]] = field(default_factory=dict)
    _grads: dict[bool, torch.Tensor] = field(default_factory=dict)

    @staticmethod
    def empty(units: Sequence[Unit]) -> HeldState:
        return HeldState(units, np.full(len(units), NONE, dtype=np.uint8))

    @staticmethod
    def build(units: Sequence[Unit], roles: np.ndarray, source: Mapping[int, UnitState]) -> HeldState:
        """Lay out the held units afresh, copying their state from `source` (unit index -> state)."""
        held = HeldState(units, roles)
        indices = [int(u) for u in np.flatnonzero(roles != NONE)]
        for decay in (True, False):
            group = [u for u in indices if units[u].optimizer == "adamw" and units[u].decay is decay]
            total = sum(units[u].numel for u in group)
            flat = UnitState(torch.empty(total), torch.empty(total), torch.empty(total))
            held._flat[decay] = flat
            held._grads[decay] = torch.zeros(total)
            start = 0
            for u in group:
                span = slice(start, start + units[u].numel)
                view = UnitState(flat.weight[span], flat.m[span], flat.v[span])
                view.weight.copy_(source[u].weight)
                view.m.copy_(source[u].m)
                view.v.copy_(source[u].v)
                held.states[u] = view
                held._spans[u] = (decay, start)
                start = span.stop
        for u in indices:
            if units[u].optimizer != "adamw":
                held.states[u] = UnitState(source[u].weight.clone(), torch.empty(0), torch.empty(0))
        return held

    def grad_of(self, unit: int) -> torch.Tensor:
        """The 1-D view where the reduced gradient of an AdamW unit is to be put before `apply`."""
        decay, start = self._spans[unit]
        return self._grads[decay][start : start + self.units[unit].numel]

    def apply(self, vote: VoteResult, lr: float, optim: OptimConfig, model: ModelConfig) -> None:
        """Apply a committed step to every held unit; gradients are sums over tokens and are divided here."""
        if vote.finite:
            clip = min(1.0, optim.grad_clip / (vote.grad_norm + 1e-6)) if optim.grad_clip > 0 else 1.0
            for decay, flat in self._flat.items():
                if flat.weight.numel():
                    self._grads[decay].mul_(clip / vote.tokens)
                    apply_adamw(flat, self._grads[decay], vote.step, lr, optim, decay)
        for u, state in self.states.items():
            unit = self.units[u]
            if unit.optimizer == "bias":
                assert unit.moe_layer is not None
                apply_bias(state, torch.from_numpy(vote.load_LE[unit.moe_layer]), model.bias_update_speed)

    def pack(self, unit: int) -> torch.Tensor:
        """A unit's whole state as one 1-D vector, for transfers."""
        state = self.states[unit]
        return torch.cat([getattr(state, name).flatten() for name in FIELDS[self.units[unit].optimizer]])


def unpack_state(unit: Unit, vector: torch.Tensor) -> UnitState:
    """Inverse of `HeldState.pack`."""
    pieces = list(vector.split(unit.numel))
    while len(pieces) < 3:
        pieces.append(torch.empty(0))
    return UnitState(*pieces)


def merge_roles(states: Iterable[HeldState]) -> np.ndarray:
    """Roles of the union of several held states; the strongest role wins."""
    return np.maximum.reduce([state.roles for state in states])
