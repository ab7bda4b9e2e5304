"""The exchanges of one generation, as a step calls them: reduce, mirror, publish."""

from __future__ import annotations

from collections.abc import Callable

from elastic_moe.parallel.collectives.group import Group
from elastic_moe.plan.state.schedule import Layout
from elastic_moe.runtime.exchange.publish import WeightPublisher
from elastic_moe.runtime.exchange.reduce import GradientReducer
from elastic_moe.runtime.exchange.windows import ComputeTensors
from elastic_moe.runtime.state import HeldState


class Exchanger:
    """Moves gradients to primaries and mirrors, and weights back, for one layout.

    Args:
        layout: the schedules.
        weights: this rank's compute weights.
        grads: their gradient tensors; those of units without a gradient are not used.
        held: the state that this rank owns or mirrors.
        group: the collectives of this generation.
        rounding_seed: see `GradientReducer`.
    """

    def __init__(
        self,
        layout: Layout,
        weights: ComputeTensors,
        grads: ComputeTensors,
        held: HeldState,
        group: Group,
        rounding_seed: int | None = None,
    ) -> None:
        self._reducer = GradientReducer(layout, grads, held, group, rounding_seed)
        self._publisher = WeightPublisher(layout, weights, held, group)

    def close(self) -> None:
        """Let go of the state and of the tensors that this rank computes with; nothing is exchanged any more."""
        del self._reducer, self._publisher

    def early(self, step: int) -> Callable[[str], None] | None:
        """See `GradientReducer.early`."""
        return self._reducer.early(step)

    def reduce(self, step: int) -> float:
        """See `GradientReducer.reduce`."""
        return self._reducer.reduce(step)

    def mirror(self) -> None:
        """See `GradientReducer.mirror`."""
        self._reducer.mirror()

    def publish(self, frozen: bool = False) -> None:
        """See `WeightPublisher.publish`."""
        self._publisher.publish(frozen)

    def wait_expert_weights(self) -> None:
        """See `WeightPublisher.wait_expert_weights`."""
        self._publisher.wait_expert_weights()

    @property
    def publish_s(self) -> float:
        """Seconds of the last publication; see `WeightPublisher`."""
        return self._publisher.seconds

    @property
    def publish_bytes(self) -> int:
        """Bytes that the last publication brought to this rank from others."""
        return self._publisher.received_bytes
