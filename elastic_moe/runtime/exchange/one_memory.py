"""A rank that is alone computes with its master weights, and sums gradients where the update reads them.

Publication and reduction then have nothing to copy, and weights and gradients exist once. The tensors of the model keep
their identity and change the memory in which they lie. A tensor that does not fit, because its units do not lie one
after another, stays where it is, and is copied in every step.

With mirrors this would not do. A weight that changes at rest must be found and replaced before anybody computes with
it; alone, the run goes back to a checkpoint, and what was computed with the weight is lost with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from elastic_moe.plan.state.schedule import Layout
from elastic_moe.runtime.exchange.windows import ComputeTensors
from elastic_moe.runtime.state import HeldState


def computes_with_masters(layout: Layout, grads: ComputeTensors, held: HeldState) -> bool:
    """Whether this rank computes with its master weights, which are fp32. Arguments as in `share`."""
    of_update = next(iter(grads.dense.values()))
    alone = layout.view.world_size == 1 and len(held.states) == len(layout.units) and not held.damaged
    return alone and of_update.dtype == torch.float32 and of_update.device.type == held.device.type


def share(layout: Layout, weights: ComputeTensors, grads: ComputeTensors, held: HeldState) -> bool:
    """Lay compute weights and gradients into the held state. Does nothing where this rank is not alone.

    Nor where gradients are fp64, since the update reads fp32, nor where the state lies on another device. Returns
    whether it has.

    Args:
        layout: the view, and the experts in slots.
        weights, grads: the tensors themselves, not aliases; `weights.dense` has the buffers too.
        held: the state, of all units.
    """
    if not computes_with_masters(layout, grads, held):
        return False
    _lay(layout, weights, lambda u: held.states[u].weight)
    _lay(layout, grads, held.grads.of)
    return True


def part(tensors: Iterable[torch.Tensor]) -> None:
    """Give tensors that lie in a state memory of their own. Their values are to be published anew."""
    for tensor in tensors:
        tensor.data = torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _lay(layout: Layout, tensors: ComputeTensors, place: Callable[[int], torch.Tensor]) -> None:
    """Give each tensor the memory of its units. `place`: unit -> where its elements are to lie."""
    units_of: dict[str, list[int]] = {}
    for u, unit in enumerate(layout.units):
        for part in unit.parts if unit.expert is None else ():
            units_of.setdefault(part.param, []).append(u)
    for name, tensor in tensors.dense.items():
        units = sorted(units_of[name], key=lambda u: layout.units[u].parts[0].start)
        room = _joined([place(u) for u in units])
        if room is not None:
            tensor.data = room.view(tensor.shape)
    unit_of = {(unit.moe_layer, unit.expert): u for u, unit in enumerate(layout.units) if unit.expert is not None}
    for layer, stacks in enumerate(tensors.slots):
        slots = {slot: expert for (at, expert), slot in layout.slot_of.items() if at == layer}
        if len(slots) != len(stacks[0]):
            continue  # empty slots have no unit
        room = _joined([place(unit_of[layer, slots[slot]]) for slot in range(len(slots))])
        if room is None:
            continue
        rows, start = room.view(len(slots), -1), 0
        for stack in stacks:
            numel = stack[0].numel()
            stack.data = rows[:, start : start + numel].view(stack.shape)
            start += numel


def _joined(pieces: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """1-D tensors that lie one after another in memory as one of them; None if they do not."""
    first, end = pieces[0], pieces[0].storage_offset()
    for piece in pieces:
        if piece.untyped_storage().data_ptr() != first.untyped_storage().data_ptr() or piece.storage_offset() != end:
            return None
        end += piece.numel()
    return first.as_strided((end - first.storage_offset(),), (1,))
