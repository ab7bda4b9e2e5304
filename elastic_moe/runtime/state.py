"""State of the units that one worker owns or mirrors, at one committed step.

Units with the same update rule, weight decay and scale of the learning rate lie one after another in flat vectors. If
the rule is elementwise, one call updates all of a vector, which equals updating the units one by one. Twins apply the
same update to the same numbers, so they stay equal (active replication, DESIGN.md section 3). A *seal* is the checksum
of every held unit, taken right after an update; a unit that does not match it has changed at rest.

**From view to view** state is not copied. The next view's state is made of the units where they lie (`joined`): those
that stay, in the memory that the old state has too, and those that arrive, in memory of their own. Nothing of the old
state is written or freed meanwhile, so it can be gone back to. Only when every rank has confirmed its new state, the
old one is let go of, and `settle` closes its gaps, vector by vector: the vectors are short, so that each frees its
memory before the next one is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from elastic_moe.config.schema import ModelConfig, OptimConfig
from elastic_moe.control.vote import VoteResult
from elastic_moe.optim.committed import CommittedStep
from elastic_moe.optim.rules import RULES
from elastic_moe.optim.unit_state import UnitState
from elastic_moe.parallel.collectives.group import HOST
from elastic_moe.plan.state import buckets
from elastic_moe.plan.state.ownership import NONE, PRIMARY
from elastic_moe.runtime.checksums import checksums
from elastic_moe.runtime.held_gradients import HeldGradients
from elastic_moe.types import Unit

Key = tuple[str, bool, float]


@dataclass(frozen=True, slots=True)
class _Group:
    """Held units with the same rule, decay and scale of the learning rate, which lie one after another in flat vectors.

    Attributes:
        units: the units themselves, in the order of the vectors.
        state: their state.
        views: unit index -> views of its state.
    """

    units: list[Unit]
    state: UnitState
    views: dict[int, UnitState]

    @staticmethod
    def allocate(indices: Sequence[int], units: Sequence[Unit], device: torch.device) -> _Group:
        """Vectors for these of all units; the state's values are undefined."""
        own = [units[index] for index in indices]
        rule, numel = own[0].rule, sum(unit.numel for unit in own)
        state, views, start = UnitState.empty(rule.fields, numel, device), {}, 0
        for index, unit in zip(indices, own, strict=True):
            stop = start + unit.numel
            views[index] = state.span(start, stop)
            start = stop
        return _Group(own, state, views)

    def is_held(self, states: Mapping[int, UnitState]) -> bool:
        """Whether these states are, for all units of this group, those that lie in its vectors."""
        return all(states.get(index) is state for index, state in self.views.items())

    def apply(self, step: CommittedStep, grads: HeldGradients, factor: float) -> None:
        """Update all units by their rule, with their gradients times a factor."""
        rule, step = RULES[self.units[0].optimizer], step.scaled(self.units[0].lr_scale)
        grad = grads.scaled(list(self.views), factor) if rule.facts.has_gradient else None
        if rule.facts.elementwise:
            rule.apply(self.units, self.state, grad, step)
            return
        own = [None] * len(self.units) if grad is None else grad.split([unit.numel for unit in self.units])
        for unit, state, of_unit in zip(self.units, self.views.values(), own, strict=True):
            rule.apply([unit], state, of_unit, step)


def _vectors(units: Sequence[Unit], indices: Sequence[int], alone: bool) -> list[list[int]]:
    """Units that are to lie in one vector each, ascending.

    Args:
        units: every unit of the model.
        indices: of the units, ascending.
        alone: a rank that is alone computes with its state, where a tensor and a layer's experts must then lie
            together (`exchange/one_memory.py`).
    """
    most = buckets.vector_bytes(sum(units[index].numel * _element_bytes(units[index]) for index in indices))
    vectors: dict[Key, list[list[int]]] = {}
    numel_of: dict[Key, int] = {}
    last: dict[Key, Unit] = {}
    for index in indices:
        unit = units[index]
        key = unit.optimizer, unit.decay, unit.lr_scale
        full = key not in vectors or numel_of[key] + unit.numel > most // _element_bytes(unit)
        if full and not (alone and key in last and _belong_together(last[key], unit)):
            vectors.setdefault(key, []).append([])
            numel_of[key] = 0
        vectors[key][-1].append(index)
        numel_of[key] += unit.numel
        last[key] = unit
    return [vector for of_key in vectors.values() for vector in of_key]


def _element_bytes(unit: Unit) -> int:
    """Of its state and its gradient, fp32."""
    return 4 * (len(unit.rule.fields) + unit.rule.has_gradient)


def _belong_together(before: Unit, unit: Unit) -> bool:
    """Whether a tensor that the model computes with has elements of both: a parameter, or a layer's experts."""
    if unit.expert is not None:
        return before.expert is not None and before.moe_layer == unit.moe_layer
    return unit.parts[0].start > 0


class HeldState:
    """Units held by this worker, at one committed step. Made by `build` and `joined`.

    Attributes:
        units: every unit of the model (not only the held ones).
        roles: uint8 [U], NONE, MIRROR or PRIMARY per unit.
        device: where the state lies.
        states: unit index -> views of its state, held units only.
        grads: their reduced gradients.
        damaged: units whose state here is known to be wrong. Their role is NONE until they are repaired.
        seal_U: uint64 [U], checksums after the last update, 0 for units not held; None if none were taken.
    """

    def __init__(
        self, units: Sequence[Unit], roles: np.ndarray, groups: Sequence[_Group], device: torch.device = HOST
    ) -> None:
        self.units, self.roles, self.device, self._groups = units, roles.copy(), device, list(groups)
        self.damaged: set[int] = set()
        self.seal_U: np.ndarray | None = None
        self.states: dict[int, UnitState] = {}
        self._settled = True
        for group in groups:
            self.states.update(group.views)
        self.grads = HeldGradients(units, [list(group.views) for group in groups], device)

    @staticmethod
    def empty(units: Sequence[Unit], roles: np.ndarray, device: torch.device) -> HeldState:
        """New vectors on `device` for the units with a role (uint8 [U]); their values are undefined."""
        indices = np.flatnonzero(roles != NONE).tolist()
        vectors = _vectors(units, indices, _alone(roles))
        return HeldState(units, roles, [_Group.allocate(vector, units, device) for vector in vectors], device)

    @staticmethod
    def build(
        units: Sequence[Unit],
        roles: np.ndarray,
        source: Mapping[int, UnitState] | Callable[[int], UnitState],
        device: torch.device,
    ) -> HeldState:
        """Lay out the held units in new vectors on `device`.

        Args:
            units: every unit of the model.
            roles: uint8 [U] role of each unit on this worker.
            source: unit index -> its state, to be copied; has every unit with a role. A function is called once for
                each of them, ascending by vector.
            device: place of the vectors.
        """
        state_of = source if callable(source) else source.__getitem__
        held = HeldState.empty(units, roles, device)
        for index, state in held.states.items():
            state.copy_(state_of(index))
        return held

    @staticmethod
    def joined(units: Sequence[Unit], roles: np.ndarray, sources: Sequence[HeldState]) -> HeldState:
        """The units with a role (uint8 [U]) where they lie in `sources`, of which the last undamaged one counts.

        It can be read and sealed, and its memory is that of the sources. `settle` must come before `apply`, once
        nobody needs the sources any more.
        """
        lies = union(sources).states
        held = HeldState(units, roles, (), sources[-1].device)
        held.states.update({index: lies[index] for index in np.flatnonzero(roles != NONE).tolist()})
        held._groups = list({id(group): group for source in sources for group in source._groups}.values())
        held._settled = False
        return held

    def settle(self) -> None:
        """Free what the sources of `joined` have and this state has not. What lies between gaps is copied together.

        Vectors without gaps stay as they are, but for short ones, of which there would be ever more.
        """
        held, alone = sorted(self.states), _alone(self.roles)
        planned = set(map(tuple, _vectors(self.units, held, alone)))
        whole = [group for group in self._groups if group.is_held(self.states)]
        self._groups = [group for group in whole if (not alone and _is_long(group)) or tuple(group.views) in planned]
        del whole
        kept = {index for group in self._groups for index in group.views}
        for vector in _vectors(self.units, [index for index in held if index not in kept], alone):
            group = _Group.allocate(vector, self.units, self.device)
            for index, state in group.views.items():
                state.copy_(self.states[index])
                self.states[index] = state  # the last unit of an old vector frees it
            self._groups.append(group)
        self.grads = HeldGradients(self.units, [list(group.views) for group in self._groups], self.device)
        self._settled = True

    def release(self) -> None:
        """Let go of all state; for a state that another one has followed."""
        self.states.clear()
        self._groups.clear()
        self.grads = HeldGradients(self.units, (), self.device)

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
        assert self._settled
        return all(bool(group.state.weight.isfinite().all()) for group in self._groups)

    def apply(self, vote: VoteResult, lr: float, optim: OptimConfig, model: ModelConfig) -> None:
        """Apply a committed step to every held unit.

        Gradients are sums over tokens. They are averaged and clipped here, in place, so a step is applied only once. If
        a gradient is not finite, every unit stays as it is: routing by numbers that are not finite says nothing about
        the balance of the experts either.
        """
        assert self._settled, "two states in the same memory must not both be updated"
        if not vote.updates:
            return
        self.seal_U = None
        step = CommittedStep(vote.step, lr, vote.load_LE, optim, model)
        clip = min(1.0, optim.grad_clip / (vote.grad_norm + 1e-6)) if optim.grad_clip > 0 else 1.0
        for group in self._groups:
            group.apply(step, self.grads, clip / vote.tokens)


def verify(states: Sequence[HeldState]) -> None:
    """Compare several states with their seals. Memory that two of them have is damaged in both."""
    for held in states:
        held.verify()
    for held in states:
        for other in states:
            other.drop([unit for unit in held.damaged if other.states.get(unit) is held.states[unit]])


def _alone(roles: np.ndarray) -> bool:
    """Whether a rank with these roles owns everything."""
    return len(roles) > 0 and bool((roles == PRIMARY).all())


def _is_long(group: _Group) -> bool:
    size = sum(tensor.nbytes for tensor in group.state.fields.values())
    return size >= buckets.VECTOR_BYTES // 4


def union(states: Sequence[HeldState]) -> HeldState:
    """All units that some held states have, to be read: the tensors are those of the states. The last one wins."""
    merged = HeldState(states[0].units, merge_roles(states), (), states[0].device)
    for state in states:
        merged.states.update({unit: own for unit, own in state.states.items() if unit not in state.damaged})
    return merged


def merge_roles(states: Iterable[HeldState]) -> np.ndarray:
    """Roles of the union of several held states; the strongest role wins."""
    return np.maximum.reduce([state.roles for state in states])
