"""Gradients: from the ranks that compute with a unit to its primary, and the sums from there to its mirrors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from elastic_moe.parallel.collectives.group import Group
from elastic_moe.plan.state.schedule import Layout, Schedule
from elastic_moe.runtime.exchange.unit_exchange import UnitExchange
from elastic_moe.runtime.exchange.windows import ComputeTensors, copy_all, windows_of
from elastic_moe.runtime.state import HeldState


class GradientReducer:
    """Reduces gradients to the state that this rank holds, bucket by bucket.

    Args:
        layout: the schedules.
        grads: this rank's gradient tensors; those of units without a gradient are not used.
        held: takes the reduced gradients.
        group: the collectives of this generation.
    """

    def __init__(self, layout: Layout, grads: ComputeTensors, held: HeldState, group: Group) -> None:
        held.grads.lie_in(_at_home(layout, grads, held))
        buckets = zip(layout.gradients.split(layout.bucket_U), layout.mirrors.split(layout.bucket_U), strict=True)
        self._buckets = [_Bucket(layout, *bucket, grads, held, group) for bucket in buckets]

    def reduce(self) -> float:
        """Sum every unit's gradient at its primary; collective.

        The sum adds up in the order of the ranks, so it is the same in every run with this layout.

        Returns:
            Sum of squares of the reduced gradients, over the units whose primary is this rank.
        """
        return sum(bucket.reduce() for bucket in self._buckets)

    def mirror(self) -> None:
        """Send each reduced gradient from its primary to the unit's mirrors; collective."""
        for bucket in self._buckets:
            bucket.mirror()


def _at_home(layout: Layout, grads: ComputeTensors, held: HeldState) -> dict[int, list[torch.Tensor]]:
    """Experts that this rank owns and computes with, and the windows on their gradients, where the update can read
    them. A rank that is alone has all gradients in vectors of the state (`one_memory.py`), where they lie already.
    """
    of_update = next(iter(grads.dense.values()))
    if of_update.dtype != torch.float32 or of_update.device.type != held.device.type or layout.view.world_size == 1:
        return {}
    own = layout.gradients.send[layout.rank]
    return {u: windows_of(layout, grads, u) for u in own if layout.units[u].expert is not None}


class _Bucket:
    """The part of the reduction that is made at once. `gradients`, `mirrors`: its schedules."""

    def __init__(
        self,
        layout: Layout,
        gradients: Schedule,
        mirrors: Schedule,
        grads: ComputeTensors,
        held: HeldState,
        group: Group,
    ) -> None:
        self._layout, self._held, self._mirrors = layout, held, mirrors
        self._dtype = next(iter(grads.dense.values())).dtype
        own, others = gradients.send[layout.rank], gradients.without(layout.rank)
        self._windows = [window for u in others.sent_units for window in windows_of(layout, grads, u)]
        self._to_primaries = UnitExchange(layout, others, group, held.device, self._dtype)
        self._to_mirrors = UnitExchange(layout, mirrors, group, held.device)
        self._arriving = [(rank, u) for rank, units in enumerate(others.receive) for u in units]
        self._own = {u: windows_of(layout, grads, u) for u in own}
        self._rounds = list(_rounds(gradients.receive))
        self._units = sorted(self._rounds[0]) if self._rounds else []
        self._apart = [u for u in self._units if not held.grads.is_in_place(u)]

    def reduce(self) -> float:
        """See `GradientReducer.reduce`."""
        received = self._to_primaries.run(self._windows)
        if not self._units:
            return 0.0
        split = received.split(self._numels([u for _, u in self._arriving]))
        pieces = dict(zip(self._arriving, split, strict=True))
        if self._dtype == torch.float32:
            self._add_up({u: self._held.grads.of(u) for u in self._apart}, pieces)
            self._add_up_in_place(pieces)
        else:  # rounded once, at the end
            numels = self._numels(self._units)
            buffer = torch.empty(sum(numels), dtype=self._dtype, device=self._held.device)
            wide = dict(zip(self._units, buffer.split(numels), strict=True))
            self._add_up(wide, pieces)
            copy_all([self._held.grads.of(u) for u in self._units], list(wide.values()))
        reduced = [piece for u in self._units for piece in self._pieces(u)]
        norms = torch._foreach_norm(reduced)  # pyright: ignore[reportPrivateImportUsage]
        return sum((torch.stack(norms).double() ** 2).tolist())

    def _pieces(self, unit: int) -> Sequence[torch.Tensor]:
        """The reduced gradient, cut as this rank's windows are, so that the norm does not depend on where it lies."""
        if self._held.grads.is_in_place(unit) or unit not in self._own:
            return self._held.grads.pieces(unit)
        return self._held.grads.of(unit).split([window.numel() for window in self._own[unit]])

    def _add_up(self, sums: Mapping[int, torch.Tensor], pieces: Mapping[tuple[int, int], torch.Tensor]) -> None:
        """Set the sums of these units: the first rank's gradients are copied, those of the next ones added."""
        for number, senders in enumerate(self._rounds):
            targets: list[torch.Tensor] = []
            sources: list[torch.Tensor] = []
            for u, rank in senders.items():
                if u not in sums:
                    continue
                if rank == self._layout.rank:
                    sources += self._own[u]
                    targets += sums[u].split([window.numel() for window in self._own[u]])
                else:
                    sources.append(pieces[rank, u])
                    targets.append(sums[u])
            if number == 0:
                copy_all(targets, sources)
            elif targets:  # own gradients may lie on another device than the state
                here = [source.to(self._held.device) for source in sources]
                torch._foreach_add_(targets, here)  # pyright: ignore[reportPrivateImportUsage]

    def _add_up_in_place(self, pieces: Mapping[tuple[int, int], torch.Tensor]) -> None:
        """Add up in the same order where this rank computes the gradients.

        The sum of the ranks before this one is made in the receive buffer, and then added to the own gradient: which
        of two numbers is added to the other makes no difference.
        """
        so_far: dict[int, Sequence[torch.Tensor]] = {}
        for senders in self._rounds:
            targets: list[torch.Tensor] = []
            sources: list[torch.Tensor] = []
            for u, rank in senders.items():
                if not self._held.grads.is_in_place(u):
                    continue
                own = self._held.grads.pieces(u)
                if rank == self._layout.rank:
                    came, so_far[u] = so_far.get(u), own
                else:
                    came = pieces[rank, u].split([window.numel() for window in own])
                    if u not in so_far:
                        so_far[u], came = came, None
                if came is not None:
                    targets += so_far[u]
                    sources += came
            if targets:
                torch._foreach_add_(targets, sources)  # pyright: ignore[reportPrivateImportUsage]

    def mirror(self) -> None:
        """See `GradientReducer.mirror`."""
        grads, mirrors = self._held.grads, self._mirrors
        received = self._to_mirrors.run([piece for u in mirrors.sent_units for piece in grads.pieces(u)])
        units = mirrors.received_units
        copy_all([grads.of(u) for u in units], received.split(self._numels(units)))

    def _numels(self, units: list[int]) -> list[int]:
        return [self._layout.units[u].numel for u in units]


def _rounds(receive: Iterable[Iterable[int]]) -> Iterable[dict[int, int]]:
    """In round k, unit -> the k-th rank that sends it, for the units that so many ranks send."""
    senders: dict[int, list[int]] = {}
    for rank, units in enumerate(receive):
        for u in units:
            senders.setdefault(u, []).append(rank)
    for number in range(max(map(len, senders.values()), default=0)):
        yield {u: ranks[number] for u, ranks in senders.items() if number < len(ranks)}
