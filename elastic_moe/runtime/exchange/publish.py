"""Publication: updated weights from primaries to the ranks that compute with them.

Experts are most of the weights, and the forward pass needs them later than the dense ones. They are sent first and
travel while the next step begins. `wait_expert_weights` waits for them before the first expert is used. Of weights that
travel in several buckets, all experts' but the first bucket are sent only then. What all ranks compute with in bf16 is
sent in bf16.
"""

from __future__ import annotations

import time

import torch

from elastic_moe.parallel.collectives.group import Group, Pending
from elastic_moe.plan.state.schedule import Layout, Schedule
from elastic_moe.runtime.exchange.unit_exchange import UnitExchange
from elastic_moe.runtime.exchange.windows import ComputeTensors, copy_all, windows_of
from elastic_moe.runtime.state import HeldState


class _Weights:
    """Sends weights by one schedule and installs those that arrive."""

    def __init__(
        self,
        layout: Layout,
        schedule: Schedule,
        weights: ComputeTensors,
        held: HeldState,
        group: Group,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        own, others = schedule.send[layout.rank], schedule.without(layout.rank)
        self._held, self._sent_units = held, others.sent_units
        self._windows = [window for u in others.received_units for window in windows_of(layout, weights, u)]
        self._own = [window for u in own for window in windows_of(layout, weights, u)]
        self._own_masters = [
            piece
            for u in own
            for piece in held.states[u].weight.split([window.numel() for window in windows_of(layout, weights, u)])
        ]
        self._exchange = UnitExchange(layout, others, group, held.device, dtype)

    @property
    def received_bytes(self) -> int:
        """Bytes that a publication brings to this rank."""
        return self._exchange.received_bytes

    def begin(self) -> tuple[Pending, torch.Tensor]:
        """Begin the exchange, and meanwhile copy the weights that this rank owns and computes with."""
        under_way = self._exchange.begin([self._held.states[u].weight for u in self._sent_units])
        copy_all(self._own, self._own_masters)
        return under_way

    def install(self, received: torch.Tensor) -> None:
        """Copy weights that arrived into the compute weights."""
        copy_all(self._windows, received.split([window.numel() for window in self._windows]))

    def run(self) -> None:
        """Send, wait and install."""
        pending, received = self.begin()
        pending.wait()
        self.install(received)


def _narrowest(weights: ComputeTensors) -> torch.dtype:
    """The dtype of the narrowest compute weights, which is that of the experts."""
    tensors = [*weights.dense.values(), *(tensor for stacks in weights.slots for tensor in stacks)]
    return min((tensor.dtype for tensor in tensors if tensor.is_floating_point()), key=lambda dtype: dtype.itemsize)


def _dense_schedules(
    layout: Layout, weights: ComputeTensors, narrow: torch.dtype
) -> list[tuple[Schedule, torch.dtype]]:
    """The exchange of the dense weights, in two where some of them are computed with in a narrower dtype."""
    if narrow == torch.float32:
        return [(layout.dense_weights, narrow)]
    dense = {u: unit.parts for u, unit in enumerate(layout.units) if unit.expert is None}
    matrices = {u for u, parts in dense.items() if all(weights.dense[part.param].dtype == narrow for part in parts)}
    return [
        (layout.dense_weights.only(matrices), narrow),
        (layout.dense_weights.only(dense.keys() - matrices), torch.float32),
    ]


class WeightPublisher:
    """Publishes the weights of the units whose primary is this rank, and receives those that it computes with.

    Args:
        layout: the schedules.
        weights: this rank's compute weights.
        held: the master weights.
        group: the collectives of this generation.

    Attributes:
        seconds: from the beginning of the last publication to the arrival of the experts' weights.
        received_bytes: bytes that the last publication brought to this rank from others.
    """

    def __init__(self, layout: Layout, weights: ComputeTensors, held: HeldState, group: Group) -> None:
        self.seconds, self.received_bytes = 0.0, 0
        narrow = _narrowest(weights)
        of_experts, frozen = (layout.expert_weights, narrow), (layout.frozen_weights, torch.float32)
        self._dense, self._experts, self._frozen = (
            [
                _Weights(layout, bucket, weights, held, group, dtype)
                for schedule, dtype in schedules
                for bucket in schedule.split(layout.bucket_U)
            ]
            for schedules in (_dense_schedules(layout, weights, narrow), [of_experts], [frozen])
        )
        self._in_flight: tuple[Pending, torch.Tensor, float] | None = None

    def publish(self, frozen: bool = False) -> None:
        """Send the weights; collective. Returns while the experts' weights may still be on their way.

        Args:
            frozen: send the frozen weights too, as on entering a view.
        """
        self.wait_expert_weights()
        started = time.perf_counter()
        self._in_flight = *self._experts[0].begin(), started
        now = [*self._dense, *(self._frozen if frozen else ())]
        for weights in now:
            weights.run()
        self.received_bytes = sum(weights.received_bytes for weights in (*self._experts, *now))

    def wait_expert_weights(self) -> None:
        """Wait for the experts' weights and install them. Does nothing if they are installed already."""
        if self._in_flight is None:
            return
        (pending, received, started), self._in_flight = self._in_flight, None
        pending.wait()
        self._experts[0].install(received)
        del received
        for weights in self._experts[1:]:
            weights.run()
        self.seconds = time.perf_counter() - started
