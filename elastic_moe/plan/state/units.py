"""Units, the atoms of ownership, made from the model's parameters.

A unit is one dense tensor, a row block of a large one, or one whole expert of one layer. An expert's unit has all its
matrices, so an expert always moves as a whole. Cuts at row boundaries keep a block a contiguous range of the flattened
tensor. Units never depend on the world size: any layout, and any checkpoint, is a map from the same names to ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from elastic_moe.types import ParamSpec, Part, Unit


class Units(tuple[Unit, ...]):
    """All units of a model, with the facts that planning asks for as arrays; each is computed once.

    Legend: U units.
    """

    @classmethod
    def of(cls, units: Sequence[Unit]) -> Units:
        """The units themselves if they are `Units` already."""
        return units if isinstance(units, Units) else cls(units)

    @cached_property
    def numel_U(self) -> NDArray[np.int64]:
        """Elements of each unit."""
        return np.array([unit.numel for unit in self], dtype=np.int64)

    @cached_property
    def state_numel_U(self) -> NDArray[np.int64]:
        """Elements of each unit's whole state."""
        fields_U = np.array([len(unit.rule.fields) for unit in self], dtype=np.int64)
        return self.numel_U * fields_U

    @cached_property
    def iterated_U(self) -> NDArray[np.bool_]:
        """The unit's update multiplies its matrices, so it takes far longer than a pass over the elements."""
        return np.array([unit.rule.iterations > 0 for unit in self], dtype=np.bool_)

    @cached_property
    def work_U(self) -> NDArray[np.int64]:
        """Operations of an update of each unit: its elements, or the multiplications of its products."""
        return np.array([unit_work(unit) if unit.rule.iterations else unit.numel for unit in self], dtype=np.int64)

    @cached_property
    def expert_U(self) -> NDArray[np.int64]:
        """Expert within its layer, -1 for a dense unit."""
        return np.array([-1 if unit.expert is None else unit.expert for unit in self], dtype=np.int64)

    @cached_property
    def layer_U(self) -> NDArray[np.int64]:
        """MoE layer of an expert's unit, -1 for a dense unit."""
        layers = [-1 if unit.expert is None or unit.moe_layer is None else unit.moe_layer for unit in self]
        return np.array(layers, dtype=np.int64)

    @cached_property
    def stage_U(self) -> NDArray[np.int64]:
        """When the backward pass completes each unit's gradient: 0 after the layers, then layer by layer, the last one
        first, and at the end what comes before the first one.
        """
        layers = [-1 if unit.layer is None else unit.layer for unit in self]
        last, first = max(layers, default=-1), next((u for u, layer in enumerate(layers) if layer >= 0), len(self))
        stages = [last - layer + 1 if layer >= 0 else last + 2 if u < first else 0 for u, layer in enumerate(layers)]
        return np.array(stages, dtype=np.int64)

    @cached_property
    def has_gradient_U(self) -> NDArray[np.bool_]:
        """The unit's rule uses its gradient."""
        return np.array([unit.rule.has_gradient for unit in self], dtype=np.bool_)

    @cached_property
    def published_U(self) -> NDArray[np.bool_]:
        """The unit's weight is published after every step."""
        return np.array([unit.rule.published_each_step for unit in self], dtype=np.bool_)


def unit_work(unit: Unit) -> int:
    """Multiplications in an iterated update of a unit.

    In each round a matrix m x n, m <= n, takes 2 m m n + m m m of them: its Gram matrix, the square of that, and the
    product of both with the matrix itself (`optim/muon.py`).
    """
    total = 0
    for part in unit.parts:
        rows, columns = part.shape[0] // part.stacked, math.prod(part.shape[1:])
        short, long = sorted((rows, columns))
        total += part.stacked * short * short * (2 * long + short)
    return unit.rule.iterations * total


def build_units(specs: Sequence[ParamSpec], max_unit_elements: int) -> Units:
    """Build the units, in the order of their first parameter.

    Args:
        specs: all parameters of the model, names unique.
        max_unit_elements: larger dense tensors are cut into blocks of whole rows, at most this many elements each (at
            least one row), if their update rule allows it; 0 for no cuts.
    """
    expert_parts: dict[tuple[int | None, int], list[ParamSpec]] = {}
    for spec in specs:
        if spec.expert is not None:
            expert_parts.setdefault((spec.layer, spec.expert), []).append(spec)
    units: list[Unit] = []
    for spec in specs:
        if spec.expert is None:
            units.extend(_dense_units(spec, max_unit_elements))
            continue
        members = expert_parts[(spec.layer, spec.expert)]
        if members[0] is spec:
            units.append(_expert_unit(members))
    assert len({unit.name for unit in units}) == len(units), "unit names must be unique"
    return Units(units)


def _dense_units(spec: ParamSpec, max_unit_elements: int) -> list[Unit]:
    """The unit of one tensor, or several units of even blocks of whole rows."""
    numel = spec.numel
    if max_unit_elements <= 0 or numel <= max_unit_elements or not spec.rule.may_be_cut or not spec.shape:
        return [_dense_unit(spec, spec.name, 0, spec.shape)]
    num_rows = spec.shape[0]
    row_numel = numel // num_rows
    rows_per_block = max(1, max_unit_elements // row_numel)
    num_blocks = -(-num_rows // rows_per_block)
    if num_blocks == 1:
        return [_dense_unit(spec, spec.name, 0, spec.shape)]
    cuts = [num_rows * block // num_blocks for block in range(num_blocks + 1)]
    return [
        _dense_unit(spec, f"{spec.name}#{block}", first * row_numel, (end - first, *spec.shape[1:]))
        for block, (first, end) in enumerate(pairwise(cuts))
    ]


def _dense_unit(spec: ParamSpec, name: str, start: int, shape: tuple[int, ...]) -> Unit:
    """The unit of a tensor's rows with this shape, from element `start` on."""
    part = Part(spec.name, start, math.prod(shape), 0, shape, spec.stacked if shape == spec.shape else 1)
    return Unit(name, (part,), spec.optimizer, spec.decay, spec.layer, None, spec.moe_layer, spec.lr_scale)


def _expert_unit(specs: Sequence[ParamSpec]) -> Unit:
    """The unit of one expert of one layer: its matrices one after the other."""
    first = specs[0]
    parts: list[Part] = []
    offset = 0
    for spec in specs:
        assert all(getattr(spec, key) == getattr(first, key) for key in ("optimizer", "decay", "moe_layer", "lr_scale"))
        parts.append(Part(spec.name, 0, spec.numel, offset, spec.shape, spec.stacked))
        offset += spec.numel
    name = f"layers.{first.layer}.experts.{first.expert}"
    facts = (first.layer, first.expert, first.moe_layer, first.lr_scale)
    return Unit(name, tuple(parts), first.optimizer, first.decay, *facts)
