"""Entering a view: form the groups, agree on the committed step, roll forward, plan, transfer, publish.

Failure, join, drain and start are one path, because nothing is assumed about the past: each rank reports which units it holds and how far it
came, and the plan follows from the reports, which are the same on every rank. A rank keeps what it held until every rank confirmed that it has
its new share, so a death in the middle of a reconfiguration loses nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from elastic_moe.config.schema import TrainConfig
from elastic_moe.control.vote import VoteResult, VoteShape, pack, packed_size, unpack
from elastic_moe.optim.unit_state import UnitState
from elastic_moe.parallel.collectives.group import Group
from elastic_moe.parallel.transfer import exchange
from elastic_moe.plan.placement import Placement, Topology, default_slots, plan_placement
from elastic_moe.plan.state.ownership import NONE, Ownership, plan_ownership
from elastic_moe.plan.state.transfers import Transfer, plan_transfers
from elastic_moe.runtime.exchange.exchanger import homes_from_roles
from elastic_moe.runtime.state import HeldState, merge_roles
from elastic_moe.runtime.step import Progress
from elastic_moe.types import ParamSpec, Unit, View

STATE_DEVICE = torch.device("cpu")  # fp32 master weights and optimizer state lie in host memory


@dataclass(frozen=True)
class Entered:
    """The result of a reconfiguration on one rank, with what it cost."""

    held: HeldState
    ownership: Ownership
    placement: Placement
    source: str
    lost_steps: int
    rolled_forward: int
    moved_bytes: int


class Storage:
    """What a reconfiguration asks of durable checkpoints when no living holder is left."""

    def latest_step(self) -> int:
        """Step of the newest complete checkpoint that verifies, or -1."""
        raise LookupError("no checkpoint storage")

    def read(self, step: int, names: Sequence[str]) -> dict[str, dict[str, torch.Tensor]]:
        """State of the named units at that step."""
        raise LookupError("no checkpoint storage")


def agree(
    group: Group,
    progress: Progress,
    holdings: list[HeldState],
    commit: Callable[[HeldState, VoteResult], None],
    shape: tuple[int, int],
    num_units: int,
) -> tuple[np.ndarray, int, int]:
    """Bring all living ranks to the newest committed step; collective.

    A rank that entered the vote of the newest step, but did not see its result, holds all reduced gradients of that step: it takes the result
    from a rank that has it and applies the update. Completing the vote needs every rank's contribution, so no other case exists among
    members of the same view; a rank further behind (a stale one that came back) counts as holding nothing.

    Args:
        group: the new generation's group.
        progress: this rank's progress, updated.
        holdings: this rank's held states.
        commit: applies a vote's result to one held state.
        shape: (MoE layers, experts).
        num_units: units of the model.

    Returns:
        roles_RU: uint8 [R, U] what each rank holds at the agreed step; the agreed step (-1 if nobody has state); ranks rolled forward.
    """
    mine = torch.tensor([progress.committed, progress.reduced, progress.evaluated], dtype=torch.int64)
    status_R3 = group.all_gather(mine).numpy()
    roles_U = merge_roles(holdings) if holdings else np.full(num_units, NONE, dtype=np.uint8)
    roles_RU = group.all_gather(torch.from_numpy(roles_U)).numpy().copy()
    newest = int(status_R3[:, 0].max())
    behind = (status_R3[:, 0] == newest - 1) & (status_R3[:, 1] == newest) & (status_R3[:, 0] >= 0)
    if newest > 0:
        leader = int(np.flatnonzero(status_R3[:, 0] == newest)[0])
        sizes = VoteShape(*shape)
        packed = torch.zeros(packed_size(VoteResult, sizes), dtype=torch.float64)
        if group.rank == leader and progress.vote is not None:
            packed = torch.from_numpy(pack(progress.vote))
        group.broadcast(packed, leader)
        vote = unpack(VoteResult, packed.numpy(), sizes)
        if behind[group.rank]:
            for held in holdings:
                commit(held, vote)
        progress.vote = vote if vote.step == newest else None
    roles_RU[(status_R3[:, 0] != newest) & ~behind] = NONE
    if not roles_RU[group.rank].any():
        holdings.clear()
    progress.evaluated = int(status_R3[:, 2].max())
    return roles_RU, newest, int(behind.sum())


def enter_view(
    config: TrainConfig,
    specs: dict[str, ParamSpec],
    units: Sequence[Unit],
    view: View,
    group: Group,
    progress: Progress,
    holdings: list[HeldState],
    commit: Callable[[HeldState, VoteResult], None],
    storage: Storage,
    shape: tuple[int, int],
    fault: Callable[[int, str], None],
    initial: Callable[[ParamSpec], torch.Tensor],
) -> Entered:
    """Carry out the reconfiguration into `view`; collective over its members.

    `initial` gives a parameter's first value, the same on whichever rank. `holdings` is extended by the new state before the members confirm it, and reduced to it afterwards.

    Raises:
        GroupAborted: a member died on the way; `holdings` and `progress` still say truthfully what this rank has.
    """
    rank = group.rank
    roles_RU, newest, rolled = agree(group, progress, holdings, commit, shape, len(units))
    present = roles_RU.any(axis=0)
    source, lost = "peers", 0
    if not present.all():
        stored = torch.tensor([storage.latest_step() if rank == 0 else 0], dtype=torch.int64)
        group.broadcast(stored, 0)
        target = int(stored[0])
        source = "initialisation" if target < 0 else "checkpoint"
        lost = max(newest, 0) - max(target, 0)
        roles_RU[:] = NONE
        newest = max(target, 0)
    elif newest < 0:
        raise AssertionError("state without a step")

    load_LE = progress.vote.load_LE + 1.0 if progress.vote is not None and source == "peers" else np.ones(shape)
    topology = Topology(tuple(m.node for m in view.members), tuple(m.speed for m in view.members))
    slots = default_slots(shape[1], view, config.elastic.spare_slots, config.elastic.slots_per_worker)
    homes = homes_from_roles(units, roles_RU, view.active_ranks, shape)
    unplaced = Placement(np.zeros((shape[0], 0), np.int32), np.zeros(0, np.int32), homes)
    placement = plan_placement(load_LE, topology, slots, unplaced, home_moves=0)
    ownership = plan_ownership(units, view, roles_RU, config.elastic.redundancy, placement.home)
    if source == "peers":
        transfers = plan_transfers(roles_RU, ownership).transfers
        new, moved = take_over(group, units, ownership, transfers, progress, holdings, fault, newest)
    else:
        roles, moved = ownership.role(rank), 0
        needed = [int(u) for u in np.flatnonzero(roles != NONE)]
        if source == "checkpoint":
            read = storage.read(newest, [units[u].name for u in needed])
            known = {u: UnitState.stored(units[u], read[units[u].name]) for u in needed}
        else:
            known = {u: _initial(units[u], specs, initial) for u in needed}
        new = HeldState.build(units, roles, known, STATE_DEVICE)
        holdings.clear()
        progress.vote = None
        _confirm(group, new, progress, holdings, fault, newest)
    return Entered(new, ownership, placement, source, lost, rolled, moved)


def take_over(
    group: Group,
    units: Sequence[Unit],
    ownership: Ownership,
    transfers: Sequence[Transfer],
    progress: Progress,
    holdings: list[HeldState],
    fault: Callable[[int, str], None],
    step: int,
) -> tuple[HeldState, int]:
    """Bring the state at the committed `step` to its new owners; collective. Returns this rank's new state, and the bytes it received.

    `holdings` has the old state and the new one until every rank has confirmed that it has its own, so a death on the way loses nothing.
    """
    known: dict[int, UnitState] = {}
    for held in holdings:
        known.update(held.states)
    moved = _transfer(group, units, transfers, known, fault, step + 1)
    new = HeldState.build(units, ownership.role(group.rank), known, STATE_DEVICE)
    _confirm(group, new, progress, holdings, fault, step)
    return new, moved


def _confirm(
    group: Group,
    new: HeldState,
    progress: Progress,
    holdings: list[HeldState],
    fault: Callable[[int, str], None],
    step: int,
) -> None:
    progress.committed, progress.reduced = step, -1
    holdings.append(new)
    fault(step + 1, "confirm")
    group.barrier()
    holdings[:] = [new]


def _transfer(
    group: Group,
    units: Sequence[Unit],
    transfers: Sequence[Transfer],
    known: dict[int, UnitState],
    fault: Callable[[int, str], None],
    step: int,
) -> int:
    """Carry out the planned transfers into `known` (unit index -> state). Returns the bytes this rank received."""
    rank, world = group.rank, group.world_size
    fault(step, "transfer")
    outgoing: list[list[torch.Tensor]] = [[] for _ in range(world)]
    arriving: list[list[int]] = [[] for _ in range(world)]
    for transfer in transfers:
        if transfer.src == rank:
            outgoing[transfer.dst].append(known[transfer.unit].pack())
        if transfer.dst == rank:
            arriving[transfer.src].append(transfer.unit)
    if not transfers:
        return 0
    received = exchange(group, outgoing, [[units[u].state_numel for u in peer] for peer in arriving])
    moved = 0
    for peer, tensors in zip(arriving, received, strict=True):
        for u, tensor in zip(peer, tensors, strict=True):
            known[u] = UnitState.unpacked(units[u], tensor)
            moved += tensor.numel() * tensor.element_size()
    return moved


def _initial(unit: Unit, specs: dict[str, ParamSpec], initial: Callable[[ParamSpec], torch.Tensor]) -> UnitState:
    """Initial state of a unit, from the initial values of the parameters it is made of."""
    pieces = []
    for part in unit.parts:
        whole = initial(specs[part.param]).flatten()
        pieces.append(whole[part.start : part.start + part.numel])
    return UnitState.initial(unit, torch.cat(pieces).float())
