"""Entering a view: agree on the committed step, roll forward, plan, transfer, confirm.

Failure, join, drain and start are one path, because nothing is assumed about the past. Each rank reports which units it
holds and how far it came. The plan follows from the reports, which are the same on every rank. A rank keeps its old
state until every rank has confirmed its new share, so a death in the middle of a reconfiguration loses nothing. The new
share is no second copy: what stays is in the same memory, and only what arrives is new, see `HeldState`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from typing import Protocol

import numpy as np
import torch

from elastic_moe.config.schema import TrainConfig
from elastic_moe.control.protocol import Recovery, Status, choose
from elastic_moe.control.speeds import MemberSpeed, agreed
from elastic_moe.control.spikes import DataPosition, SpikeGuard
from elastic_moe.control.vote import VoteResult, VoteShape, pack, packed_size, unpack
from elastic_moe.optim.unit_state import UnitState
from elastic_moe.parallel.collectives.group import HOST, Group
from elastic_moe.parallel.transfer import exchange
from elastic_moe.plan.placement import Placement, Topology, copies_of, default_slots, nodes_of, plan_placement
from elastic_moe.plan.shares import Speeds
from elastic_moe.plan.state.ownership import NONE, Ownership, copies_from_roles, homes_from_roles, plan_ownership
from elastic_moe.plan.state.transfers import Transfer, plan_transfers
from elastic_moe.runtime.local_state import LocalState
from elastic_moe.runtime.state import HeldState, merge_roles, union
from elastic_moe.types import Unit, View


@dataclass(frozen=True)
class Reconfigured:
    """The result of a reconfiguration on one rank, with its cost.

    Attributes:
        held: this rank's state in the new view.
        ownership, placement: of the new view.
        speeds: of the ranks, with which the view begins.
        straggles: what each rank tells of itself, see `MemberSpeed`.
        source: origin of the state: "peers", "checkpoint" or "initialisation".
        lost_steps: committed steps that have to be made again.
        rolled_forward: ranks that applied the last vote only now.
        moved_bytes: bytes of state that this rank received.
    """

    held: HeldState
    ownership: Ownership
    placement: Placement
    speeds: Speeds
    straggles: tuple[int, ...]
    source: str
    lost_steps: int
    rolled_forward: int
    moved_bytes: int


@dataclass(frozen=True)
class Restored:
    """What a durable checkpoint holds.

    Attributes:
        step: its step; -1 if there is no checkpoint.
        skipped_batches: batches that the run had left out before.
        state: unit name -> field -> tensor on the CPU.
    """

    step: int = -1
    skipped_batches: int = 0
    state: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)


class DurableState(Protocol):
    """Durable checkpoints, for a reconfiguration in which no rank holds some unit."""

    def restore(self, group: Group, names: Sequence[str], expected: bool) -> Restored:
        """The state of the named units in the newest whole checkpoint; its step is -1 if there is none.

        Collective. `expected`: steps were committed before.
        """
        ...


def agree(
    group: Group,
    local: LocalState,
    roll_forward: Callable[[VoteResult], None],
    shape: tuple[int, int],
    num_units: int,
    only_whole: bool = False,
) -> tuple[np.ndarray, Recovery]:
    """Bring all living ranks to the newest committed step; collective.

    The ranks gather their reports. `control.protocol.choose` decides where they meet, and this function carries it
    out: ranks that roll forward receive the vote's result and apply it; a stale rank counts as holding nothing.

    Args:
        group: the new generation's group.
        local: this rank's state, updated.
        roll_forward: applies a vote's result to all that this rank holds.
        shape: (MoE layers, experts).
        num_units: units of the model.
        only_whole: change nothing unless the ranks together hold every unit.

    Returns:
        roles_RU: uint8 [R, U], the role in which each rank holds each unit at the agreed step.
        decision: the agreed step (-1 if no rank has state), and the ranks that roll forward.
    """
    report = torch.tensor([*astuple(local.status), local.evaluated, *astuple(local.position)], dtype=torch.int64)
    reports_R7 = group.all_gather(report).tolist()
    roles_U = merge_roles(local.holdings) if local.holdings else np.full(num_units, NONE, dtype=np.uint8)
    roles_RU = group.all_gather(torch.from_numpy(roles_U)).numpy().copy()
    statuses = [Status(*status) for *status, _, _, _ in reports_R7]
    decision = choose(statuses, lambda ranks: bool(roles_RU[list(ranks)].any(axis=0).all()))
    roles_RU[list(decision.stale)] = NONE
    if only_whole and not roles_RU.any(axis=0).all():
        return roles_RU, decision
    if decision.committed > 0:
        known = ((status.voted, status.timeline) for status in statuses)
        newest = (decision.committed, decision.timeline)
        leader = next((rank for rank, vote in enumerate(known) if vote == newest), None)
        vote = None
        if leader is not None:
            vote = _broadcast_vote(group, local.vote if group.rank == leader else None, leader, VoteShape(*shape))
            if group.rank in decision.forward:
                roll_forward(vote)
        local.vote = vote if vote is not None and vote.step == decision.committed else None
        if local.guard is not None:
            _share_history(group, local.guard, leader)
    local.timeline = decision.timeline
    current = [rank for rank, status in enumerate(statuses) if status.timeline == decision.timeline]
    current = [rank for rank in current if rank not in decision.stale] or current  # none: the state is lost
    local.position = DataPosition.agreed([DataPosition(*reports_R7[rank][-2:]) for rank in current])
    if not roles_RU[group.rank].any():
        local.holdings.clear()
    local.evaluated = max(evaluated for *_, evaluated, _, _ in reports_R7)
    return roles_RU, decision


def _broadcast_vote(group: Group, vote: VoteResult | None, leader: int, shape: VoteShape) -> VoteResult:
    """The leader's vote on every rank; its step is 0 if the leader has none, as after a checkpoint."""
    packed = torch.zeros(packed_size(VoteResult, shape), dtype=torch.float64)
    if vote is not None:
        packed = torch.from_numpy(pack(vote))
    group.broadcast(packed, leader)
    return unpack(VoteResult, packed.numpy(), shape)


def _share_history(group: Group, guard: SpikeGuard, leader: int | None) -> None:
    """Bring the leader's history of losses to every rank; without a leader nobody keeps one."""
    if leader is None:
        guard.clear()
        return
    packed = torch.from_numpy(guard.pack())
    group.broadcast(packed, leader)
    guard.load(packed.numpy())


class Reconfigurer:
    """Brings one worker's state from view to view.

    Args:
        config: mirrors per unit, slots, copies of experts.
        units: all units.
        shape: (MoE layers, experts).
        local: this worker's state, updated.
        roll_forward: applies a vote's result to all that this worker holds.
        storage: durable checkpoints.
        initial: returns a unit's first weight, fp32 [numel], the same on every rank.
        fault: called as fault(step, phase); may not return.
    """

    def __init__(
        self,
        config: TrainConfig,
        units: Sequence[Unit],
        shape: tuple[int, int],
        local: LocalState,
        roll_forward: Callable[[VoteResult], None],
        storage: DurableState,
        initial: Callable[[Unit], torch.Tensor],
        fault: Callable[[int, str], None],
    ) -> None:
        self._config, self._elastic = config, config.elastic
        self._units, self._shape, self._local = units, shape, local
        self._roll_forward, self._storage, self._initial, self._fault = roll_forward, storage, initial, fault

    def agree(self, group: Group, only_whole: bool = False) -> tuple[np.ndarray, Recovery]:
        """Bring all living ranks to the newest committed step; collective, see `agree`."""
        return agree(group, self._local, self._roll_forward, self._shape, len(self._units), only_whole)

    def enter(self, view: View, group: Group) -> Reconfigured:
        """Carry out the reconfiguration into `view`; collective over its members.

        Raises:
            GroupAborted: a member died on the way; `local` still says truthfully what this rank has.
        """
        roles_RU, decision = self.agree(group)
        known = [MemberSpeed(*one) for one in group.all_gather(torch.tensor(self._local.speed)).tolist()]
        speeds = agreed(view, known) if self._config.balance.by_speed else Speeds.equal(view)
        straggles = tuple(one.straggles for one in known)
        step, rolled = decision.committed, len(decision.forward)
        whole = bool(roles_RU.any(axis=0).all())
        if not whole or self._local.position.go_on_at >= 0:
            placement, ownership = self._plan(view, np.full_like(roles_RU, NONE), None, speeds)
            held, target = self._start_over(group, ownership, step > 0, needed=not whole)
            if held is not None:
                source = "initialisation" if target < 0 else "checkpoint"
                lost = max(0, step - max(target, 0))
                return Reconfigured(held, ownership, placement, speeds, straggles, source, lost, rolled, 0)
            self._local.position = DataPosition(self._local.position.skipped)  # nothing to go back to
        assert step >= 0, "state without a step"
        placement, ownership = self._plan(view, roles_RU, self._local.vote, speeds)
        transfers = plan_transfers(roles_RU, ownership).transfers
        held, moved = self.take_over(group, ownership, transfers, step)
        return Reconfigured(held, ownership, placement, speeds, straggles, "peers", 0, rolled, moved)

    def _plan(
        self, view: View, roles_RU: np.ndarray, vote: VoteResult | None, speeds: Speeds
    ) -> tuple[Placement, Ownership]:
        """Placement and ownership in the view; the same on every rank. The last vote has the experts' loads."""
        elastic, shape = self._elastic, self._shape
        load_LE = np.ones(shape) if vote is None else vote.load_LE + 1.0
        copies = copies_of(self._config, nodes_of(view))
        slots = default_slots(shape[1], view, elastic.spare_slots, elastic.slots_per_worker, *copies)
        topology = Topology(tuple(m.node for m in view.members), speeds.rows, copies.in_nodes)
        homes = homes_from_roles(self._units, roles_RU, view.active_ranks, shape)
        there = np.zeros((shape[0], 0), np.int32), np.zeros(0, np.int32)
        if copies.in_nodes:  # a mirror that computes with its unit is sent no weights
            there = copies_from_roles(self._units, roles_RU, view.active_ranks, shape)
        placement = plan_placement(load_LE, topology, slots, Placement(*there, homes), home_moves=0)
        return placement, plan_ownership(self._units, view, roles_RU, elastic.redundancy, placement.home)

    def take_over(
        self, group: Group, ownership: Ownership, transfers: Sequence[Transfer], step: int
    ) -> tuple[HeldState, int]:
        """Bring the state at the committed `step` to its new owners; collective.

        `local.holdings` has the old state and the new one until every rank has confirmed that it has its own, so a
        death on the way loses nothing. The new one joins only after all ranks have said that their transfers ended
        without an abort: a rank that is aborted may let its peers complete with wrong bytes.

        Returns:
            This rank's new state, and the bytes that it received.
        """
        self._fault(step + 1, "transfer")
        local, roles = self._local, ownership.role(group.rank)
        arrived = HeldState.empty(self._units, _arriving(transfers, roles, group.rank), self._state_device(group))
        moved = _transfer(group, transfers, union(local.holdings).states if local.holdings else {}, arrived)
        new = HeldState.joined(self._units, roles, [*local.holdings, arrived])
        del arrived
        if transfers:
            group.attest()
        self._confirm(group, new, step)
        return new, moved

    def _start_over(
        self, group: Group, ownership: Ownership, expected: bool, needed: bool
    ) -> tuple[HeldState | None, int]:
        """This rank's state from the newest checkpoint or, without one, from initial values; collective.

        Args:
            group: the view's collectives.
            ownership: in the view.
            expected: steps were committed before.
            needed: the ranks do not hold the whole state themselves; else initial values are no way to go on.

        Returns:
            The state, None if there is no checkpoint and none is needed; the checkpoint's step, -1 without one.
        """
        roles = ownership.role(group.rank)
        own = [int(u) for u in np.flatnonzero(roles != NONE)]
        found = self._storage.restore(group, [self._units[u].name for u in own], expected)
        if found.step < 0 and not needed:
            return None, -1
        self._local.holdings.clear()  # its memory is free before the new state is made

        def state_of(index: int) -> UnitState:
            """A unit's state, of which nothing is kept here."""
            unit = self._units[index]
            if found.step >= 0:
                return UnitState.stored(unit, found.state.pop(unit.name))
            return UnitState.initial(unit, self._initial(unit))

        new = HeldState.build(self._units, roles, state_of, self._state_device(group))
        self._local.begin_timeline(group.generation, max(found.step, 0), found.skipped_batches)
        self._confirm(group, new, max(found.step, 0))
        return new, found.step

    def _state_device(self, group: Group) -> torch.device:
        """Where master weights and optimizer state lie."""
        return HOST if self._elastic.state_on == "host" else group.device

    def _confirm(self, group: Group, new: HeldState, step: int) -> None:
        """Wait until every rank has its new state, then drop the old one."""
        local = self._local
        local.committed, local.reduced = step, -1
        every = self._elastic.check_every_steps
        if every and (step + 1) % every == 0:
            new.seal()
        local.holdings.append(new)
        self._fault(step + 1, "confirm")
        group.barrier()
        for old in local.holdings[:-1]:
            old.release()
        local.holdings[:] = [new]
        new.settle()


def _arriving(transfers: Sequence[Transfer], roles: np.ndarray, rank: int) -> np.ndarray:
    """The roles, uint8 [U], of the units that others send to this rank; NONE of all others."""
    units = [transfer.unit for transfer in transfers if transfer.dst == rank]
    arriving = np.full_like(roles, NONE)
    arriving[units] = roles[units]
    return arriving


def _transfer(group: Group, transfers: Sequence[Transfer], known: Mapping[int, UnitState], arrived: HeldState) -> int:
    """Carry out the planned transfers.

    Args:
        group: the view's collectives.
        transfers: of all ranks.
        known: unit index -> state on this rank, to be sent.
        arrived: takes what is sent to this rank.

    Returns:
        The bytes that this rank received.
    """
    outgoing: list[list[torch.Tensor]] = [[] for _ in range(group.world_size)]
    incoming: list[list[torch.Tensor]] = [[] for _ in range(group.world_size)]
    for transfer in transfers:
        if transfer.src == group.rank:
            outgoing[transfer.dst] += known[transfer.unit].fields.values()
        if transfer.dst == group.rank:
            incoming[transfer.src] += arrived.states[transfer.unit].fields.values()
    if transfers:
        exchange(group, outgoing, incoming, device=arrived.device)
    return sum(tensor.nbytes for tensors in incoming for tensor in tensors)
