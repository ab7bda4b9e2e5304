"""Comparison of the copies of every unit, and repair of those that are wrong; see `control/twins.py`.

In a step with a comparison, state that changed at rest is found just before the update (the seal does not match), and
updates that went differently just after it. Wrong copies are replaced before weights are published, so nobody ever
computes with them. What is damaged counts as not held meanwhile: should the generation end, the next one brings it from
its twin like anything else that a rank lacks.
"""

from __future__ import annotations

import numpy as np
import torch

from elastic_moe.config.schema import TrainConfig
from elastic_moe.control.twins import Repair, Verdict, judge, signed_digests
from elastic_moe.coordination.save_steps import SaveSteps
from elastic_moe.errors import GroupAborted, StateUnclear
from elastic_moe.optim.unit_state import UnitState
from elastic_moe.parallel.transfer import exchange
from elastic_moe.plan.state.ownership import NONE
from elastic_moe.runtime.session import GenerationContext
from elastic_moe.runtime.state import HeldState


class TwinCheck:
    """Compares and repairs copies where a comparison is due: every `elastic.check_every_steps`, and in steps whose
    state is saved, so that no checkpoint has state on which its holders disagree. A save that only the step's vote
    brings comes without a seal: the copies are compared all the same.
    """

    def __init__(self, config: TrainConfig) -> None:
        self._every_steps, self._last_step = config.elastic.check_every_steps, config.run.steps
        self._saves = SaveSteps(config)

    def before_update(self, step: int, held: HeldState) -> None:
        """Find state that has changed since the update before; local."""
        if self._due(step):
            held.verify()

    def after_update(self, step: int, context: GenerationContext, saved: bool) -> tuple[Repair, ...]:
        """Compare the copies after the update of `step`; collective if a comparison is due.

        Args:
            step: that was committed.
            context: of the view.
            saved: the vote has decided that this step is saved.

        Returns:
            The copies that were wrong and have been replaced, alike on every rank.

        Raises:
            StateUnclear: nobody can tell the right copy of some unit; all ranks hold theirs for damaged.
            GroupAborted: the generation ended.
        """
        due = self._due(step) or (saved and self._every_steps > 0)
        if due or self._due(step + 1):
            context.held.seal()
        return self._compare(context) if due else ()

    def _due(self, step: int) -> bool:
        every = self._every_steps
        saved = step == self._last_step or self._saves.due(step)
        return every > 0 and (step % every == 0 or saved)

    def _compare(self, context: GenerationContext) -> tuple[Repair, ...]:
        held, group, ownership = context.held, context.group, context.layout.ownership
        assert held.seal_U is not None
        digests_2U = signed_digests(held.seal_U, ownership, context.rank)
        signal = torch.tensor([*digests_2U.sum(axis=1).tolist(), len(held.damaged)])
        group.all_reduce(signal)
        if not signal.any():
            return ()
        damaged_U = np.zeros(len(held.units), dtype=np.int64)
        damaged_U[list(held.damaged)] = 1
        doubts_3U = torch.from_numpy(np.stack([*digests_2U, damaged_U]))
        group.all_reduce(doubts_3U)
        units_N = np.flatnonzero(doubts_3U.numpy().any(axis=0))
        own_3N = np.stack([held.seal_U.view(np.int64), ownership.role(context.rank).astype(np.int64), damaged_U])
        sums_RN, roles_RN, damaged_RN = group.all_gather(torch.from_numpy(own_3N[:, units_N])).numpy().swapaxes(0, 1)
        verdict = judge(units_N.tolist(), sums_RN, roles_RN != NONE, damaged_RN == 0)
        held.drop(verdict.unclear)
        held.drop([repair.unit for repair in verdict.repairs if repair.rank == context.rank])
        if verdict.unclear:
            raise self._unclear(context, verdict)
        right = {
            repair.unit: int(sums_RN[repair.source, np.searchsorted(units_N, repair.unit)])
            for repair in verdict.repairs
        }
        self._replace(context, verdict, right)
        return verdict.repairs

    def _replace(self, context: GenerationContext, verdict: Verdict, right: dict[int, int]) -> None:
        """Bring right copies to the ranks with wrong ones; collective. `right`: unit -> signed checksum."""
        held, rank, world = context.held, context.rank, context.layout.view.world_size
        outgoing: list[list[torch.Tensor]] = [[] for _ in range(world)]
        incoming: list[list[torch.Tensor]] = [[] for _ in range(world)]
        right_here: dict[int, UnitState] = {}
        for repair in verdict.repairs:
            unit = repair.unit
            if repair.source == rank:
                outgoing[repair.rank] += held.states[unit].fields.values()
            if repair.rank == rank:
                fields, numel = held.units[unit].rule.fields, held.units[unit].numel
                right_here[unit] = UnitState.empty(fields, numel, held.device)
                incoming[repair.source] += right_here[unit].fields.values()
        exchange(context.group, outgoing, incoming, device=held.device)
        roles_U = context.layout.ownership.role(rank)
        assert held.seal_U is not None
        for unit, state in right_here.items():
            held.repair(unit, state, int(roles_U[unit]))
            if int(held.seal_U[unit : unit + 1].view(np.int64)[0]) != right[unit]:
                held.drop([unit])
                raise GroupAborted(f"the right copy of {held.units[unit].name} did not arrive as it was sent")

    def _unclear(self, context: GenerationContext, verdict: Verdict) -> StateUnclear:
        view, ownership = context.layout.view, context.layout.ownership
        units = list(verdict.unclear)
        ranks = {*ownership.primary[units].tolist(), *ownership.mirrors[units].ravel().tolist()} - {-1}
        holders = [view.members[rank] for rank in sorted(ranks)]
        names = tuple(context.held.units[unit].name for unit in units)
        return StateUnclear(
            f"the copies of {len(names)} unit(s), {names[0]} first, differ and nobody can tell which is right",
            names,
            tuple(member.worker for member in holders),
            tuple(member.node for member in holders),
        )
