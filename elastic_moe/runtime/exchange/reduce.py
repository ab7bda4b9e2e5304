"""Gradients: from the ranks that compute with a unit to its primary, and the sums from there to its mirrors."""

from __future__ import annotations

import torch

from elastic_moe.parallel.collectives.group import Group
from elastic_moe.plan.state.schedule import Layout
from elastic_moe.runtime.exchange.unit_exchange import UnitExchange
from elastic_moe.runtime.exchange.windows import ComputeTensors, windows_of
from elastic_moe.runtime.state import HeldState


class GradientReducer:
    """Reduces gradients to the state that this rank holds.

    Args:
        layout: the schedules.
        grads: this rank's gradient tensors; those of units without a gradient are not used.
        held: takes the reduced gradients.
        group: the collectives of this generation.
    """

    def __init__(self, layout: Layout, grads: ComputeTensors, held: HeldState, group: Group) -> None:
        self._layout, self._held = layout, held
        dtype = next(iter(grads.dense.values())).dtype
        self._windows = [window for u in layout.gradients.sent_units for window in windows_of(layout, grads, u)]
        self._to_primaries = UnitExchange(layout, layout.gradients, group, held.device, dtype)
        self._to_mirrors = UnitExchange(layout, layout.mirrors, group, held.device)

    def reduce(self) -> float:
        """Sum every unit's gradient at its primary; collective.

        The sum adds up in the order of the ranks, so it is the same in every run with this layout.

        Returns:
            Sum of squares of the reduced gradients, over the units whose primary is this rank.
        """
        sums = self._sums(self._to_primaries.run(self._windows))
        reduced = [self._held.grad_of(u) for u in sorted(sums)]
        if not reduced:
            return 0.0
        torch._foreach_copy_(reduced, [sums[u] for u in sorted(sums)])  # pyright: ignore[reportPrivateImportUsage]
        norms = torch._foreach_norm(reduced)  # pyright: ignore[reportPrivateImportUsage]
        return sum((torch.stack(norms).double() ** 2).tolist())

    def _sums(self, received: torch.Tensor) -> dict[int, torch.Tensor]:
        """Unit -> sum of the gradients received for it."""
        sums: dict[int, torch.Tensor] = {}
        units = self._layout.gradients.received_units
        for u, piece in zip(units, received.split(self._numels(units)), strict=True):
            if u in sums:
                sums[u].add_(piece)
            else:
                sums[u] = piece
        return sums

    def mirror(self) -> None:
        """Send each reduced gradient from its primary to the unit's mirrors; collective."""
        mirrors = self._layout.mirrors
        received = self._to_mirrors.run([self._held.grad_of(u) for u in mirrors.sent_units])
        units = mirrors.received_units
        for u, piece in zip(units, received.split(self._numels(units)), strict=True):
            self._held.grad_of(u).copy_(piece)

    def _numels(self, units: list[int]) -> list[int]:
        return [self._layout.units[u].numel for u in units]
