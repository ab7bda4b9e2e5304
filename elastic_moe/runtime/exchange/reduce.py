"""Gradients: from the ranks that compute with a unit to its primary, and the sums from there to its mirrors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

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

    def reduce(self) -> float:
        """See `GradientReducer.reduce`."""
        received = self._to_primaries.run(self._windows)
        if not self._units:
            return 0.0
        split = received.split(self._numels([u for _, u in self._arriving]))
        pieces = dict(zip(self._arriving, split, strict=True))
        reduced = {u: self._held.grad_of(u) for u in self._units}
        if self._dtype == torch.float32:
            self._add_up(reduced, pieces)
        else:  # rounded once, at the end
            numels = self._numels(self._units)
            buffer = torch.empty(sum(numels), dtype=self._dtype, device=self._held.device)
            wide = dict(zip(self._units, buffer.split(numels), strict=True))
            self._add_up(wide, pieces)
            copy_all(list(reduced.values()), list(wide.values()))
        norms = torch._foreach_norm(list(reduced.values()))  # pyright: ignore[reportPrivateImportUsage]
        return sum((torch.stack(norms).double() ** 2).tolist())

    def _add_up(self, sums: Mapping[int, torch.Tensor], pieces: Mapping[tuple[int, int], torch.Tensor]) -> None:
        """Set the sums: the first rank's gradients are copied, those of the next ones added."""
        for number, senders in enumerate(self._rounds):
            targets: list[torch.Tensor] = []
            sources: list[torch.Tensor] = []
            for u, rank in senders.items():
                if rank == self._layout.rank:
                    sources += self._own[u]
                    targets += sums[u].split([window.numel() for window in self._own[u]])
                else:
                    sources.append(pieces[rank, u])
                    targets.append(sums[u])
            if number == 0:
                copy_all(targets, sources)
            else:  # own gradients may lie on another device than the state
                here = [source.to(self._held.device) for source in sources]
                torch._foreach_add_(targets, here)  # pyright: ignore[reportPrivateImportUsage]

    def mirror(self) -> None:
        """See `GradientReducer.mirror`."""
        received = self._to_mirrors.run([self._held.grad_of(u) for u in self._mirrors.sent_units])
        units = self._mirrors.received_units
        copy_all([self._held.grad_of(u) for u in units], received.split(self._numels(units)))

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
