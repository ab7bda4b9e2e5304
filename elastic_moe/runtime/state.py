"""State of the units that one worker owns or mirrors, at one committed step.

Units with the same update rule, weight decay and scale of the learning rate lie one after another in flat vectors. If
the rule is elementwise, one call updates all of them, which equals updating them one by one. Twins apply the same
update to the same numbers, so they stay equal (active replication, DESIGN.md section 3). A *seal* is the checksum of
every held unit, taken right after an update; a unit that does not match it has changed at rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from elastic_moe.config.schema import ModelConfig, OptimConfig
from elastic_moe.control.vote import VoteResult
from elastic_moe.optim.committed import CommittedStep
from elastic_moe.optim.rules import RULES
from elastic_moe.optim.unit_state import UnitState
from elastic_moe.parallel.collectives.group import HOST
from elastic_moe.plan.state.ownership import NONE
from elastic_moe.runtime.checksums import checksums
from elastic_moe.types import Unit


@dataclass(frozen=True, slots=True)
class _Group:
    """Held units with the same rule, decay and scale of the learning rate, which lie one after another in flat vectors.

    Attributes:
        indices: the units' indices, in the order of the vectors.
        units: the units themselves.
        state: their state; grad: their reduced gradient, None where the rule has none.
    """

    indices: list[int]
    units: list[Unit]
    state: UnitState
    grad: torch.Tensor | None

    @staticmethod
    def allocate(indices: list[int], units: list[Unit], device: torch.device) -> _Group:
        rule, numel = units[0].rule, sum(unit.numel for unit in units)
        grad = torch.zeros(numel, device=device) if rule.has_gradient else None
        return _Group(indices, units, UnitState.empty(rule.fields, numel, device), grad)

    def one_by_one(self) -> Iterator[tuple[int, Unit, UnitState, torch.Tensor | None]]:
        """(index, unit, state, gradient) of each unit; the tensors are views of the vectors."""
        start = 0
        for index, unit in zip(self.indices, self.units, strict=True):
            stop = start + unit.numel
            yield index, unit, self.state.span(start, stop), None if self.grad is None else self.grad[start:stop]
            start = stop

    def apply(self, step: CommittedStep) -> None:
        """Update all units by their rule."""
        rule, step = RULES[self.units[0].optimizer], step.scaled(self.units[0].lr_scale)
        if rule.facts.elementwise:
            rule.apply(self.units, self.state, self.grad, step)
            return
        for _, unit, state, grad in self.one_by_one():
            rule.apply([unit], state, grad, step)


class HeldState:
    """Units held by this worker, at one committed step. Made by `build`.

    Attributes:
        units: every unit of the model (not only the held ones).
        roles: uint8 [U], NONE, MIRROR or PRIMARY per unit.
        device: where the state lies.
        states: unit index -> views of its state, held units only.
        damaged: units whose state here is known to be wrong. Their role is NONE until they are repaired.
        seal_U: uint64 [U], checksums after the last update, 0 for units not held; None if none were taken.
    """

    def __init__(
        self, units: Sequence[Unit], roles: np.ndarray, groups: Sequence[_Group], device: torch.device = HOST
    ) -> None:
        self.units, self.roles, self.device, self._groups = units, roles.copy(), device, groups
        self.damaged: set[int] = set()
        self.seal_U: np.ndarray | None = None
        self.states: dict[int, UnitState] = {}
        self._grads: dict[int, torch.Tensor] = {}
        for group in groups:
            for index, _, state, grad in group.one_by_one():
                self.states[index] = state
                if grad is not None:
                    self._grads[index] = grad

    @staticmethod
    def build(
        units: Sequence[Unit], roles: np.ndarray, source: Mapping[int, UnitState], device: torch.device
    ) -> HeldState:
        """Lay out the held units in new vectors on `device`.

        Args:
            units: every unit of the model.
            roles: uint8 [U] role of each unit on this worker.
            source: unit index -> its present state, to be copied; has every unit with a role.
            device: place of the vectors.
        """
        members: dict[tuple[str, bool, float], list[int]] = {}
        for index in np.flatnonzero(roles != NONE).tolist():
            unit = units[index]
            members.setdefault((unit.optimizer, unit.decay, unit.lr_scale), []).append(index)
        groups = [_Group.allocate(indices, [units[u] for u in indices], device) for indices in members.values()]
        held = HeldState(units, roles, groups, device)
        for index, state in held.states.items():
            state.copy_(source[index])
        return held

    def grad_of(self, unit: int) -> torch.Tensor:
        """The 1-D view where the reduced gradient of a unit is to be put before `apply`; its rule has a gradient."""
        return self._grads[unit]

    def seal(self) -> None:
        """Take the checksums of all held units."""
        self.seal_U = self._checksums()

    def verify(self) -> None:
        """Compare all held units with the seal, if there is one. Those that have changed since are `damaged`."""
        if self.seal_U is not None:
            self.drop(np.flatnonzero(self._checksums() != self.seal_U).tolist())

    def drop(self, units: Iterable[int]) -> None:
        """Hold the state of these units for damaged."""
        self.damaged.update(unit for unit in units if unit in self.states)
        self.roles[list(self.damaged)] = NONE

    def repair(self, unit: int, state: UnitState, role: int) -> None:
        """Replace the state of a damaged unit, which has this role from now on; its seal is new."""
        self.states[unit].copy_(state)
        self.damaged.discard(unit)
        self.roles[unit] = role
        if self.seal_U is not None:
            self.seal_U[unit] = checksums([self.states[unit]])[0]

    def _checksums(self) -> np.ndarray:
        sums_U = np.zeros(len(self.units), dtype=np.uint64)
        sums_U[list(self.states)] = checksums(list(self.states.values()))
        return sums_U

    @property
    def finite(self) -> bool:
        """Whether all weights are finite."""
        return all(bool(group.state.weight.isfinite().all()) for group in self._groups)

    def apply(self, vote: VoteResult, lr: float, optim: OptimConfig, model: ModelConfig) -> None:
        """Apply a committed step to every held unit.

        Gradients are sums over tokens. They are averaged and clipped here, in place, so a step is applied only once. If
        a gradient is not finite, every unit stays as it is: routing by numbers that are not finite says nothing about
        the balance of the experts either.
        """
        if not vote.updates:
            return
        self.seal_U = None
        step = CommittedStep(vote.step, lr, vote.load_LE, optim, model)
        clip = min(1.0, optim.grad_clip / (vote.grad_norm + 1e-6)) if optim.grad_clip > 0 else 1.0
        for group in self._groups:
            if group.grad is not None:
                group.grad.mul_(clip / vote.tokens)
            group.apply(step)


def union(states: Sequence[HeldState]) -> HeldState:
    """All units that some held states have, to be read: the tensors are those of the states. The last one wins."""
    merged = HeldState(states[0].units, merge_roles(states), (), states[0].device)
    for state in states:
        merged.states.update({unit: own for unit, own in state.states.items() if unit not in state.damaged})
    return merged


def merge_roles(states: Iterable[HeldState]) -> np.ndarray:
    """Roles of the union of several held states; the strongest role wins."""
    return np.maximum.reduce([state.roles for state in states])
