"""The all-to-all of one schedule: whole units, one after another in a flat buffer per direction.

The receive buffer lies where the state of the units does. What a rank would send to itself stays where it is, so the
schedules leave it out: the caller copies it straight to its place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from elastic_moe.parallel.collectives.group import Group, Pending
from elastic_moe.plan.state.schedule import Layout, Schedule

Pack = Callable[[Sequence[torch.Tensor], torch.Tensor], None]


class UnitExchange:
    """Exchanges units by one schedule, as often as it is called; collective.

    Args:
        layout: has the units' sizes.
        schedule: the units per rank, in both directions.
        group: the collectives of this generation.
        device: of what arrives.
        dtype: of the elements.
    """

    def __init__(
        self,
        layout: Layout,
        schedule: Schedule,
        group: Group,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._group, self._device, self._dtype = group, device, dtype
        self._sent_numel_R, self._received_numel_R = layout.sizes(schedule.send), layout.sizes(schedule.receive)

    @property
    def received_bytes(self) -> int:
        """Bytes that an exchange brings to this rank."""
        return sum(self._received_numel_R) * self._dtype.itemsize

    @property
    def moved_bytes(self) -> int:
        """Bytes that an exchange takes from this rank and brings to it."""
        return (sum(self._sent_numel_R) + sum(self._received_numel_R)) * self._dtype.itemsize

    def begin(self, pieces: Sequence[torch.Tensor], pack: Pack | None = None) -> tuple[Pending, torch.Tensor]:
        """Begin the exchange.

        Args:
            pieces: 1-D tensors that together are the sent units, in the order of `Schedule.sent_units`; they may be
                wider than what is sent.
            pack: writes them into the vector that is sent, another way than by rounding to the nearest.

        Returns:
            The exchange in progress, and the buffer that has the units of `Schedule.received_units` when it is done.
        """
        sent = torch.empty(sum(self._sent_numel_R), dtype=self._dtype, device=self._device)
        if pieces:
            (pack or _concatenate)(pieces, sent)
        received = torch.empty(sum(self._received_numel_R), dtype=self._dtype, device=self._device)
        pending = self._group.begin_all_to_all(received, sent, self._received_numel_R, self._sent_numel_R)
        return pending, received


def _concatenate(pieces: Sequence[torch.Tensor], sent: torch.Tensor) -> None:
    torch.cat(list(pieces), out=sent)
