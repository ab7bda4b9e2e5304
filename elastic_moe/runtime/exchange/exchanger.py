"""One generation's layout on one rank: who contributes to which gradient, who needs which weight, and where they lie in flat buffers.

Computed once per reconfiguration from (units, ownership, placement), identical on every rank; a step then only copies and calls collectives.
A *unit's views* are 1-D windows on the compute weights: dense parameters, router biases, or one slot of the stacked expert tensors.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from elastic_moe.parallel.collectives.group import Group, Pending
from elastic_moe.plan.placement import Placement
from elastic_moe.plan.state.ownership import Ownership
from elastic_moe.runtime.state import HeldState
from elastic_moe.types import Unit, View


@dataclass(frozen=True)
class ComputeTensors:
    """Where a rank's compute weights lie.

    Attributes:
        dense: parameter or buffer name -> tensor.
        slots: per MoE layer, the stacked slot tensors: gate above up, and down.
    """

    dense: Mapping[str, torch.Tensor]
    slots: Sequence[tuple[torch.Tensor, ...]]


def _empty(world: range) -> list[list[int]]:
    """A schedule, units per peer, with nothing in it."""
    return [[] for _ in world]


class Layout:
    """The exchange schedule of one generation on one rank.

    Args:
        units: all units.
        view: the membership.
        rank: this worker's rank in it.
        ownership: primary and mirrors of every unit.
        placement: experts in slots.
    """

    def __init__(
        self, units: Sequence[Unit], view: View, rank: int, ownership: Ownership, placement: Placement
    ) -> None:
        self.units, self.view, self.rank = units, view, rank
        self.ownership, self.placement = ownership, placement
        world = range(view.world_size)
        primary = ownership.primary.tolist()
        # slot_of[r][(layer, expert)] = index among the rank's own slots
        self.slot_of: list[dict[tuple[int, int], int]] = []
        for r in world:
            span = placement.slots_of(r)
            experts_LS = placement.expert_of_slot[:, span]
            self.slot_of.append(
                {(layer, int(e)): s for layer, row in enumerate(experts_LS) for s, e in enumerate(row) if e >= 0}
            )

        ranks_of: dict[tuple[int, int], list[int]] = {}  # of an expert: who computes with it
        for r, slots in enumerate(self.slot_of):
            for key in slots:
                ranks_of.setdefault(key, []).append(r)
        here = self.slot_of[rank]
        self.grad_out, self.grad_in = _empty(world), _empty(world)
        self.mirror_out, self.mirror_in = _empty(world), _empty(world)
        self.weight_out, self.weight_in = _empty(world), _empty(world)
        self.expert_out, self.expert_in = _empty(world), _empty(world)
        self.frozen_out, self.frozen_in = _empty(world), _empty(world)
        for u, unit in enumerate(units):
            expert = None if unit.expert is None or unit.moe_layer is None else (unit.moe_layer, unit.expert)
            kept = not unit.rule.published_each_step
            if expert is None or expert in here:
                coming = self.frozen_in if kept else self.weight_in if expert is None else self.expert_in
                coming[primary[u]].append(u)
                if unit.rule.has_gradient:
                    self.grad_out[primary[u]].append(u)
            if primary[u] == rank:
                for r in world if expert is None else ranks_of[expert]:
                    going = self.frozen_out if kept else self.weight_out if expert is None else self.expert_out
                    going[r].append(u)
                    if unit.rule.has_gradient:
                        self.grad_in[r].append(u)
            if unit.rule.has_gradient:
                mirrors = ownership.mirrors[u].tolist()
                if primary[u] == rank:
                    for r in sorted(m for m in mirrors if m >= 0):
                        self.mirror_out[r].append(u)
                if rank in mirrors:
                    self.mirror_in[primary[u]].append(u)

    def sizes(self, schedule: Sequence[Sequence[int]]) -> list[int]:
        """Elements per peer of a schedule."""
        return [sum(self.units[u].numel for u in peer) for peer in schedule]

    def windows(self, tensors: ComputeTensors, unit: int) -> list[torch.Tensor]:
        """1-D windows on this rank's compute copy of a unit, in part order."""
        spec = self.units[unit]
        if spec.expert is not None:
            assert spec.moe_layer is not None
            slot = self.slot_of[self.rank][spec.moe_layer, spec.expert]
            return [tensor[slot].reshape(-1) for tensor in tensors.slots[spec.moe_layer]]
        return [tensors.dense[p.param].reshape(-1)[p.start : p.start + p.numel] for p in spec.parts]


class Exchanger:
    """Moves gradients to primaries and mirrors, and weights back, for one layout.

    Args:
        layout: the schedule.
        weights, grads: this rank's compute weights and their gradient tensors (grads have no router biases).
        held: the state this rank owns or mirrors.
        group: the collectives of this generation.

    The experts' weights are the larger part and are needed later than the others: they travel while the next step begins, and
    `wait_expert_weights` waits for them where the first expert is used.

    Attributes:
        publish_s, publish_bytes: what this rank's part in the last publication of weights took, and brought here.
    """

    def __init__(
        self, layout: Layout, weights: ComputeTensors, grads: ComputeTensors, held: HeldState, group: Group
    ) -> None:
        self._layout, self._held, self._group = layout, held, group
        self.publish_s, self.publish_bytes = 0.0, 0
        self._in_flight: tuple[Pending, torch.Tensor, float] | None = None
        self._grad_dtype = next(iter(grads.dense.values())).dtype
        self._grad_windows = [w for peer in layout.grad_out for u in peer for w in layout.windows(grads, u)]
        self._weight_windows = {
            kind: [w for peer in getattr(layout, f"{kind}_in") for u in peer for w in layout.windows(weights, u)]
            for kind in ("weight", "expert", "frozen")
        }
        self._splits = {
            f"{kind}_{way}": layout.sizes(getattr(layout, f"{kind}_{way}"))
            for kind in ("grad", "mirror", "weight", "expert", "frozen")
            for way in ("out", "in")
        }

    def _send(
        self, kind: str, pieces: list[torch.Tensor], dtype: torch.dtype = torch.float32
    ) -> tuple[Pending, torch.Tensor]:
        """Begin an exchange by one of the schedules. Returns it with the tensor that takes what arrives."""
        out_splits, in_splits = self._splits[f"{kind}_in"], self._splits[f"{kind}_out"]
        send = torch.cat(pieces) if pieces else torch.empty(0, dtype=dtype)
        received = torch.empty(sum(out_splits), dtype=dtype)
        return self._group.begin_all_to_all(received, send, out_splits, in_splits), received

    def _swap(self, kind: str, pieces: list[torch.Tensor], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        pending, received = self._send(kind, pieces, dtype)
        pending.wait()
        return received

    def _weights(self, kind: str) -> list[torch.Tensor]:
        """This rank's master weights, in the order of a schedule."""
        return [self._held.states[u].weight for peer in getattr(self._layout, f"{kind}_out") for u in peer]

    def _install(self, kind: str, received: torch.Tensor) -> None:
        """Copy weights that arrived into the compute weights."""
        windows = self._weight_windows[kind]
        if windows:
            torch._foreach_copy_(windows, list(received.split([w.numel() for w in windows])))  # pyright: ignore[reportPrivateImportUsage]

    def reduce(self) -> float:
        """Sum every holder's gradients at the primaries. Returns the sum of squares over the units this rank is primary of."""
        layout, held = self._layout, self._held
        received = self._swap("grad", self._grad_windows, self._grad_dtype)
        sums: dict[int, torch.Tensor] = {}
        pieces = received.split([layout.units[u].numel for peer in layout.grad_in for u in peer])
        for u, piece in zip((u for peer in layout.grad_in for u in peer), pieces, strict=True):
            if u in sums:
                sums[u].add_(piece)
            else:
                sums[u] = piece
        owned = [held.grad_of(u) for u in sorted(sums)]
        if owned:
            torch._foreach_copy_(owned, [sums[u] for u in sorted(sums)])  # pyright: ignore[reportPrivateImportUsage]
        norms = torch._foreach_norm(owned) if owned else ()  # pyright: ignore[reportPrivateImportUsage]
        return float(sum(norm.double() ** 2 for norm in norms))

    def mirror(self) -> None:
        """Send each reduced gradient to the unit's mirrors."""
        layout, held = self._layout, self._held
        received = self._swap("mirror", [held.grad_of(u) for peer in layout.mirror_out for u in peer])
        start = 0
        for u in (u for peer in layout.mirror_in for u in peer):
            target = held.grad_of(u)
            target.copy_(received[start : start + target.numel()])
            start += target.numel()

    def publish(self, frozen: bool = False) -> None:
        """Send updated weights from primaries to every rank that computes with them; also the frozen ones on entering a view.

        Returns while the experts' weights are still coming: see `wait_expert_weights`.
        """
        self.wait_expert_weights()
        started = time.perf_counter()
        pending, incoming = self._send("expert", self._weights("expert"))
        self._in_flight = pending, incoming, started
        self.publish_bytes = 4 * incoming.numel()
        for kind in ("weight", "frozen") if frozen else ("weight",):
            received = self._swap(kind, self._weights(kind))
            self._install(kind, received)
            self.publish_bytes += 4 * received.numel()

    def wait_expert_weights(self) -> None:
        """Wait until the experts' weights are here. Nothing happens when they are."""
        if self._in_flight is None:
            return
        (pending, incoming, started), self._in_flight = self._in_flight, None
        pending.wait()
        self._install("expert", incoming)
        self.publish_s = time.perf_counter() - started


def homes_from_roles(
    units: Sequence[Unit], roles_RU: np.ndarray, active: Sequence[int], shape: tuple[int, int]
) -> np.ndarray:
    """Where each expert's state lives now, for the next placement.

    Args:
        units: all units.
        roles_RU: uint8 [R, U] what each rank holds.
        active: ranks that may own.
        shape: (MoE layers, experts).

    Returns:
        int32 [L, E]: the rank of the strongest living holder (primary before mirror, lowest rank first), -1 if none is active.
    """
    homes = np.full(shape, -1, dtype=np.int32)
    for u, unit in enumerate(units):
        if unit.expert is not None:
            best = max(active, key=lambda r: (int(roles_RU[r, u]), -r))
            if roles_RU[best, u]:
                homes[unit.moe_layer, unit.expert] = best
    return homes
