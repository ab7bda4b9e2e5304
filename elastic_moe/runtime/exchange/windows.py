"""Windows: 1-D views of a unit's elements in the tensors that a rank computes with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from elastic_moe.plan.state.schedule import Layout


@dataclass(frozen=True)
class ComputeTensors:
    """A rank's compute weights, or the gradients of them.

    Attributes:
        dense: parameter or buffer name -> tensor.
        slots: per MoE layer, the stacked tensors [slots, ...]: gate above up, and down.
    """

    dense: Mapping[str, torch.Tensor]
    slots: Sequence[tuple[torch.Tensor, ...]]

    def detached(self) -> ComputeTensors:
        """The same memory, of which autograd knows nothing."""
        dense = {name: tensor.detach() for name, tensor in self.dense.items()}
        return ComputeTensors(dense, [tuple(tensor.detach() for tensor in stacks) for stacks in self.slots])


def windows_of(layout: Layout, tensors: ComputeTensors, unit: int) -> list[torch.Tensor]:
    """Windows on this rank's copy of a unit, in the order of its parts.

    A dense unit has a window per part; an expert's unit has one per stacked tensor, on the expert's slot. Together they
    have the unit's `numel` elements.
    """
    spec = layout.units[unit]
    if spec.expert is not None:
        assert spec.moe_layer is not None
        slot = layout.slot_of[spec.moe_layer, spec.expert]
        return [tensor[slot].reshape(-1) for tensor in tensors.slots[spec.moe_layer]]
    return [tensors.dense[p.param].reshape(-1)[p.start : p.start + p.numel] for p in spec.parts]


def copy_all(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """Copy each source to its target, of the same shape. What already lies there stays."""
    copy: Any = torch._foreach_copy_  # pyright: ignore[reportPrivateImportUsage]
    pairs = [(to, of) for to, of in zip(targets, sources, strict=True) if to.data_ptr() != of.data_ptr()]
    if pairs:
        copy([to for to, _ in pairs], [of for _, of in pairs])
