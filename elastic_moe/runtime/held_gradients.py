"""The reduced gradients of the units that a worker holds, which the update reads.

They lie in vectors as the state does, or, if this rank computes with the unit itself, where it computes the unit's
gradient: the sum over the ranks is then made in place. So the gradients of experts at home exist once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from elastic_moe.types import Unit


class HeldGradients:
    """Reduced gradients by unit. They have values from the reduction of a step until the next step begins.

    Args:
        units: every unit of the model.
        vectors: indices of held units that lie together, in order.
        device: of the vectors.
    """

    def __init__(self, units: Sequence[Unit], vectors: Sequence[Sequence[int]], device: torch.device) -> None:
        self._units, self._device = units, device
        self._vector_of = {unit: vector for vector in vectors for unit in vector}
        self._windows: dict[int, Sequence[torch.Tensor]] = {}
        self._flat: dict[int, torch.Tensor] = {}  # by the first unit of a vector
        self._views: dict[int, torch.Tensor] = {}

    def lie_in(self, windows: Mapping[int, Sequence[torch.Tensor]]) -> None:
        """From now on these units' gradients, and no others, are where this rank computes them.

        If that changes anything, all values are lost.

        Args:
            windows: unit -> 1-D fp32 views that together have its elements, in order, on the device of the state.
        """
        if not windows and not self._windows:
            return
        self._windows = dict(windows)
        self._flat.clear()
        self._views.clear()

    def is_in_place(self, unit: int) -> bool:
        """Whether the unit's gradient is where this rank computes it."""
        return unit in self._windows

    def pieces(self, unit: int) -> Sequence[torch.Tensor]:
        """The unit's gradient, as 1-D tensors one after another."""
        return self._windows.get(unit) or [self.of(unit)]

    def of(self, unit: int) -> torch.Tensor:
        """The 1-D view that takes the gradient of a unit that is not in place; zeros at first."""
        if unit not in self._views:
            own = [u for u in self._vector_of[unit] if u not in self._windows]
            flat = torch.zeros(sum(self._units[u].numel for u in own), device=self._device)
            self._flat[self._vector_of[unit][0]] = flat
            self._views.update(zip(own, flat.split([self._units[u].numel for u in own]), strict=True))
        return self._views[unit]

    def scaled(self, vector: Sequence[int], factor: float) -> torch.Tensor:
        """The gradients of a vector's units, times a factor, as one 1-D tensor. What was there has no values then."""
        for unit in vector:
            if unit not in self._windows:
                self.of(unit)
        flat = self._flat.get(vector[0])
        if flat is None or flat.numel() != sum(self._units[unit].numel for unit in vector):
            flat = torch.cat([piece for unit in vector for piece in self.pieces(unit)])
        return flat.mul_(factor)
