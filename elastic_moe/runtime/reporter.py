"""Records and events that a worker sends to the coordinator while it trains. The leader of a view reports for all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from elastic_moe.control.rebalance import Change, moves_between
from elastic_moe.control.twins import Repair
from elastic_moe.control.vote import VoteResult
from elastic_moe.errors import StateUnclear
from elastic_moe.plan.placement import Placement
from elastic_moe.plan.state.schedule import Layout
from elastic_moe.runtime.coordinator_client import CoordinatorClient
from elastic_moe.runtime.local_state import MAX_RECORDS, LocalState
from elastic_moe.runtime.reconfigure import Reconfigured
from elastic_moe.runtime.session import GenerationContext
from elastic_moe.types import Member, View

LOAD_NUMBERS = 1 << 22  # of experts.jsonl before loads are recorded less often: some 30 MB


def load_interval(step: int, every_steps: int, numbers: int) -> int:
    """Steps that a record of the experts' loads covers.

    It is `every_steps` at first, and doubles whenever the run has become twice as long. So the file grows with the
    logarithm of the steps: 58 layers of 256 experts take 0.2 GB in a million steps, and would take 12 GB.

    Args:
        step: the present step.
        every_steps: `balance.log_every_steps`, above 0.
        numbers: of one record.
    """
    records = max(1, LOAD_NUMBERS // numbers)  # at the first interval
    intervals = -(-step // (every_steps * records))
    return every_steps << max(0, intervals - 1).bit_length()


class Reporter:
    """Makes the records of one worker; `metrics/schema.py` declares their keys.

    Args:
        client: the connection to the coordinator.
        load_every_steps: steps between two records of the experts' loads at first (`load_interval`); 0 for none.
        shape: (MoE layers, experts).
    """

    def __init__(self, client: CoordinatorClient, load_every_steps: int, shape: tuple[int, int]) -> None:
        self._client, self._load_every_steps, self._shape = client, load_every_steps, shape
        self._load_LE, self._load_steps = np.zeros(shape), 0  # since the last record

    @property
    def recorded(self) -> int:
        """The records of all steps up to this one are in the run's files; -1 if that is not known."""
        return self._client.inbox.recorded

    def record(self, record: dict[str, Any]) -> None:
        """A step's record."""
        self._client.record(record)

    def recent(self, local: LocalState) -> None:
        """Records that the leader before may not have sent, or that a coordinator that is lost may not have written."""
        if local.dropped:
            reason = f"{local.dropped} steps: without a coordinator, the records of {MAX_RECORDS} steps are kept"
            self.event("records_dropped", local.committed, reason=reason)
            local.dropped = 0
        for record in local.records:
            self._client.record(record)

    def event(self, event: str, step: int, **values: Any) -> None:
        """An event about a step."""
        self._client.event({"event": event, "step": step, **values})

    def rebalanced(self, record: dict[str, Any]) -> None:
        """The outcome of a change of placement."""
        self._client.event(record)

    def not_finite(self, step: int, workers: Sequence[Member], in_a_row: int) -> None:
        """A step without an update. `workers`: whose own numbers were not finite."""
        names, nodes = [m.worker for m in workers], [m.node for m in workers]
        self.event("not_finite", step, workers=names, nodes=nodes, in_a_row=in_a_row)

    def spike(self, vote: VoteResult, in_a_row: int) -> None:
        """A step without an update, because its loss or its gradient was far above those before."""
        self.event("loss_spike", vote.step, loss=vote.loss, grad_norm=vote.grad_norm, in_a_row=in_a_row)

    def repaired(self, step: int, layout: Layout, repairs: Sequence[Repair]) -> None:
        """Copies of state that were wrong and have been replaced: one event per rank."""
        for rank in sorted({repair.rank for repair in repairs}):
            member = layout.view.members[rank]
            units = [layout.units[repair.unit].name for repair in repairs if repair.rank == rank]
            self.event("state_repaired", step, rank=rank, workers=[member.worker], nodes=[member.node], units=units)

    def unclear(self, step: int, unclear: StateUnclear) -> None:
        """Copies of state that differ, and none is known to be right."""
        units, workers, nodes = list(unclear.units), list(unclear.workers), list(unclear.nodes)
        self.event("state_unclear", step, units=units, workers=workers, nodes=nodes, reason=str(unclear))

    def load(self, vote: VoteResult) -> None:
        """Tokens of every expert, summed over the steps since the last record."""
        if not self._load_every_steps:
            return
        self._load_LE, self._load_steps = self._load_LE + vote.load_LE, self._load_steps + 1
        if vote.step % load_interval(vote.step, self._load_every_steps, self._load_LE.size) == 0:
            load = self._load_LE.astype(int).tolist()
            self.event("expert_load", vote.step, steps=self._load_steps, load=load)
            self._load_LE, self._load_steps = np.zeros(self._shape), 0

    def entered(
        self, context: GenerationContext, local: LocalState, result: Reconfigured, form_s: float, reconfigure_s: float
    ) -> None:
        """This rank has its state; the leader also sends the costs, recent records and the placement."""
        view = context.layout.view
        if not context.leads:
            self._client.entered(view.generation, None)
            return
        info = {
            "step": local.committed,
            "source": result.source,
            "lost_steps": result.lost_steps,
            "skipped_batches": local.position.skipped,
            "rolled_forward": result.rolled_forward,
            "moved_bytes": result.moved_bytes,
            "form_s": form_s,
            "reconfigure_s": reconfigure_s,
        }
        self._client.entered(view.generation, info)
        self.recent(local)
        self.entered_placement(local.committed, view, result.placement)

    def entered_placement(self, step: int, view: View, placement: Placement) -> None:
        """The whole placement of a new view."""
        ranks = [[member.worker, member.node] for member in view.members]
        self._placement(step, view, "membership", moves_between(None, placement), {"ranks": ranks})

    def changed_placement(self, step: int, view: View, before: Placement, change: Change) -> None:
        """A change of placement within a view."""
        moves = moves_between(before, change.placement)
        self._placement(step, view, "load", moves, {"expected": change.estimate, "layers": change.layers})

    def _placement(self, step: int, view: View, cause: str, moves: list[list[int]], details: dict[str, Any]) -> None:
        shape = list(self._shape)
        common = {"generation": view.generation, "cause": cause, "shape": shape, "moves": moves}
        self.event("placement", step, **common, **details)
