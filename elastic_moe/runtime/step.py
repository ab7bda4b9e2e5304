"""One training step: compute, reduce, mirror, vote, apply, publish, record. Completing the vote is the commit.

Gradients are sums over tokens. The update divides them by the global token count, so nothing depends on which rank
computed which share. Until the next step begins, every rank keeps the reduced gradients that it holds: a rank that
missed the vote's result rolls forward with them (DESIGN.md section 3).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import torch

from elastic_moe.config.schema import TrainConfig
from elastic_moe.control.twins import Repair
from elastic_moe.control.vote import Ballot, Measures, Spent, VoteResult, VoteShape, Wishes, pack, result_of, unpack
from elastic_moe.data.shards import TokenShard
from elastic_moe.model.transformer import Transformer
from elastic_moe.optim.schedule import lr_at
from elastic_moe.parallel.reproducible import Grid
from elastic_moe.plan.batch_sizes import BatchSizes
from elastic_moe.runtime.batches import BatchReader, MicroBatches, with_last
from elastic_moe.runtime.gradients import DenseGradients
from elastic_moe.runtime.local_state import LocalState
from elastic_moe.runtime.session import GenerationContext
from elastic_moe.runtime.step_clock import StepClock
from elastic_moe.runtime.twins import TwinCheck
from elastic_moe.types import ModelStats


@dataclass(frozen=True)
class StepResult:
    """Outcome of a completed step.

    Attributes:
        record: the step's record for metrics.jsonl.
        reconfigure: all members agreed to leave this view.
        stop: a member was asked to end the run.
        save: a member wants a checkpoint of this step.
        context: for the steps that follow.
        total: the sum of the ballots.
        sequences: of the batch.
        repairs: copies of state that were wrong and have been replaced.
    """

    record: dict[str, Any]
    reconfigure: bool
    stop: bool
    save: bool
    context: GenerationContext
    total: Ballot
    sequences: int
    repairs: tuple[Repair, ...]


@dataclass(frozen=True)
class ComputedShare:
    """Sums over this rank's micro-batches.

    Attributes:
        ce_sum, tokens: cross-entropy in nats, and number of targets.
        stats: statistics of the model.
        load_LE: int64, tokens that this rank routed to each expert.
    """

    ce_sum: float
    tokens: int
    stats: ModelStats
    load_LE: torch.Tensor


class StepRunner:
    """Makes training steps.

    Args:
        config: the run's configuration.
        model: the compute model, whose expert backend belongs to the current generation.
        train: the training shard.
        batches: makes micro-batches.
        fault: called as fault(step, phase) at every phase; may not return.
        autocast: context manager factory for mixed precision.

    Attributes:
        grid: of exact sums, for the expert backend; None unless `elastic.reproducible`.
        gradients: sums of the dense part's gradients.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: Transformer,
        train: TokenShard,
        batches: MicroBatches,
        fault: Callable[[int, str], None],
        autocast: Callable[[], AbstractContextManager[object]],
    ) -> None:
        self._config, self._model, self._batches = config, model, batches
        self._reader = BatchReader(config, train)
        self._fault, self._autocast = fault, autocast
        self._clock = StepClock()
        self._sizes = BatchSizes(config.data)
        tokens = config.data.global_batch * config.data.seq_len  # of the largest batch: its grid serves the others too
        self.grid = Grid(tokens) if config.elastic.reproducible else None
        self.gradients = DenseGradients(model, self.grid)
        self._twins = TwinCheck(config)

    def train_step(
        self,
        context: GenerationContext,
        local: LocalState,
        wishes: Callable[[], Wishes],
        rebalance: Callable[[GenerationContext, VoteResult], GenerationContext] = lambda context, _: context,
    ) -> StepResult:
        """Make step `local.committed + 1` and commit it; collective.

        Args:
            context: the current generation.
            local: updated in place as phases complete.
            wishes: called just before the vote.
            rebalance: may return another context for the steps that follow; the new weights are published in it.

        Raises:
            GroupAborted: the generation ended before the step was complete; `local` says how far it came.
            StateUnclear: copies of a unit differ; the run goes back.
        """
        step = local.committed + 1
        self._clock.start(context.group.waited)
        local.reduced = (
            -1
        )  # gradients come where reduced ones are: of experts at home, and of all where a rank is alone
        self._begin(step, "compute")
        batch = local.position.batch_of(step)
        share = self._compute(step, context, batch)
        self._begin(step, "reduce")
        grad_square = context.exchanger.reduce(step)
        self._begin(step, "mirror")
        context.exchanger.mirror()
        local.reduced = step
        self._begin(step, "vote")
        total = self._vote(context, self._ballot(context, share, grad_square, wishes(), local.held_s))
        guard = local.guard
        spike = guard is not None and total.finite and guard.is_spike(total.loss, total.grad_norm)
        vote = result_of(total, step, context.layout.view, spike, context.speeds)
        self._begin(step, "apply")
        self._twins.before_update(step, context.held)
        committed_at_s = self._apply(local, vote)
        try:
            repairs = self._twins.after_update(step, context, total.save > 0)
            self._begin(step, "publish")
            if not total.all_reconfigure:
                context = rebalance(context, vote)
                context.exchanger.publish()
        finally:  # a committed step has a record, also if the generation ends while its weights are published
            self._record(local, vote, committed_at_s)
        return StepResult(
            local.records[-1],
            total.all_reconfigure,
            total.stop > 0,
            total.save > 0,
            context,
            total,
            self._sizes.size(batch),
            repairs,
        )

    def _begin(self, step: int, phase: str) -> None:
        """A phase of the step begins, and the one before it ends."""
        self._clock.begin(phase)
        self._fault(step, phase)

    def roll_forward(self, local: LocalState, vote: VoteResult) -> None:
        """Commit a step whose vote this rank took part in without seeing its result. Purely local."""
        self._clock.stop()
        self._record(local, vote, self._apply(local, vote))

    def _compute(self, step: int, context: GenerationContext, batch: int) -> ComputedShare:
        """Forward and backward passes of this rank's share of a batch."""
        config, model = self._config, self._config.model
        shares = context.shares(self._sizes.size(batch))
        share = self._reader.take(batch, shares[context.rank])
        self._clock.data_s += self._reader.waited_s
        context.experts.begin_step()
        self.gradients.zero()
        tokens, device = 0, self._batches.device
        ce_sum = torch.zeros((), dtype=torch.float64, device=device)
        stats = torch.tensor(astuple(ModelStats()), dtype=torch.float64, device=device)
        late = step > model.mtp_switch * config.run.steps
        mtp_weight = model.mtp_late_weight if late else model.mtp_weight
        mine = shares[context.rank]
        watch = mine.start == 0 and (mine.stop > 0 or context.leads)
        load_LE = torch.zeros((model.num_moe_layers, model.num_experts), dtype=torch.int64, device=device)
        for (inputs, targets), is_last in with_last(self._clock.reading(self._batches.of(share, shares))):
            with self._autocast():
                out = self._model.loss(inputs, targets, mtp_weight, watch)
            watch = False  # the batch's first sequence: the same one at every world size
            with self.gradients.telling(context.exchanger.early(step) if is_last else None):
                out.loss_sum.backward()
            self.gradients.add()
            stats += out.stats
            ce_sum += out.ce_sum
            tokens += out.num_tokens
            load_LE += out.load_LE
        context.exchanger.wait_expert_weights()  # no-op if there is a MoE layer: the first one has waited already
        return ComputedShare(float(ce_sum), tokens, ModelStats(*stats.tolist()), load_LE.cpu())

    def _ballot(
        self, context: GenerationContext, share: ComputedShare, grad_square: float, wishes: Wishes, held_s: float
    ) -> Ballot:
        """This rank's contribution to the vote. `held_s`: training stood still for a checkpoint."""
        work, exchanger, clock = context.experts.statistics(), context.exchanger, self._clock

        def own(value: float) -> np.ndarray:
            """An array of all ranks' values with this rank's in its place."""
            value_R = np.zeros(context.layout.view.world_size)
            value_R[context.rank] = value
            return value_R

        slowest_LN = np.zeros((len(work.slowest_L), context.layout.apart_nodes))
        if (node := context.layout.counts_for) is not None:
            slowest_LN[:, node] = work.slowest_L
        finite = math.isfinite(grad_square)
        all_own = finite and context.layout.view.world_size == 1  # the reduced gradients are its own
        own_finite = math.isfinite(share.ce_sum) and (all_own or self.gradients.finite())
        apart_s = work.dispatched_s + clock.data_s
        return Ballot(
            ce_sum=share.ce_sum,
            tokens=share.tokens,
            grad_square=grad_square if finite else 0.0,
            nonfinite=float(not (finite and own_finite)),
            reconfigure=float(wishes.reconfigure),
            stop=float(wishes.stop),
            save=float(wishes.save),
            stats=share.stats,
            measures=Measures(
                expert_s=work.compute_s,
                expert_rows=work.local_tokens,
                cross_node_rows=work.cross_node_rows,
                publish_s=exchanger.publish_s,
                publish_bytes=exchanger.publish_bytes,
                switch_s=context.switch_s,
                wait_s=clock.waited_s,
            ),
            load_LE=share.load_LE.numpy().astype(np.float64),
            nonfinite_R=own(not own_finite),
            expert_rows_R=own(work.local_tokens),
            slowest_LN=slowest_LN,
            spent=Spent(
                dense_s_R=own(max(0.0, clock.own_s("compute") - apart_s)),
                expert_s_R=own(work.dispatched_s),
                data_s_R=own(clock.data_s),
                exchange_s_R=own(clock.own_s("reduce", "mirror")),
                checkpoint_s_R=own(held_s),
            ),
        )

    def _vote(self, context: GenerationContext, ballot: Ballot) -> Ballot:
        """Sum of all ranks' ballots. When the all-reduce completes, the step is committed."""
        vector = torch.from_numpy(pack(ballot))
        context.group.all_reduce(vector)
        model, layout = self._config.model, context.layout
        lengths = layout.view.world_size, layout.apart_nodes
        return unpack(Ballot, vector.numpy(), VoteShape(model.num_moe_layers, model.num_experts, *lengths))

    def _apply(self, local: LocalState, vote: VoteResult) -> float:
        """Apply a vote's result to the held state. Purely local, so a rank with the result cannot fail to commit.

        Returns:
            Wall clock of the commit, seconds.
        """
        lr = self._lr(vote.step)
        for held in local.holdings:
            held.apply(vote, lr, self._config.optim, self._config.model)
        local.commit(vote)
        return time.time()

    def _lr(self, step: int) -> float:
        """Learning rate of a step's update."""
        return lr_at(step, self._config.run.steps, self._config.optim, self._sizes.tokens_through)

    def _record(self, local: LocalState, vote: VoteResult, committed_at_s: float) -> None:
        """Make the step's record."""
        lr = self._lr(vote.step)
        ended_s = time.perf_counter()
        record = step_record(vote, lr, ended_s - self._clock.started_s, committed_at_s)
        if phases := self._clock.seconds(ended_s):
            record |= {f"{phase}_s": round(seconds, 6) for phase, seconds in phases.items()}
            record["data_s"] = round(self._clock.data_s, 6)
        if local.held_s:
            record["held_s"], local.held_s = local.held_s, 0.0
        local.add_record(record)


def step_record(vote: VoteResult, lr: float, step_s: float, time_s: float) -> dict[str, Any]:
    """A step's record for metrics.jsonl; `metrics/schema.py` declares its keys.

    Args:
        vote: result of the step's vote.
        lr: learning rate of its update.
        step_s: duration on this rank.
        time_s: wall clock of the commit.
    """
    return {
        "step": vote.step,
        "loss": vote.loss,
        "tokens": int(vote.tokens),
        "lr": lr,
        "grad_norm": vote.grad_norm,
        "generation": vote.generation,
        "world_size": vote.world_size,
        "step_s": step_s,
        "tokens_per_s": vote.tokens / step_s,
        "balance": vote.balance,
        "layer_balance": [round(1 / float(t), 4) for t in vote.layer_time_L],
        "layer_max_load": [round(float(w.max() / max(w.mean(), 1e-9)), 3) for w in vote.load_LE],
        "cross_node_rows": int(vote.measures.cross_node_rows),
        "imbalance_s": vote.imbalance_s,
        "straggler_s": vote.straggler_s,
        "time": time_s,
        "skipped": not vote.updates,
        **_optional_metrics(vote),
    }


def _optional_metrics(vote: VoteResult) -> dict[str, float]:
    """Metrics of multi-token prediction, of other losses and of residual streams, where the model has them."""
    stats = vote.stats
    metrics: dict[str, float] = {}
    if stats.gain_forward:
        metrics["gain_forward"] = stats.gain_forward
        metrics["gain_backward"] = stats.gain_backward
        metrics["gain_backward_min"] = stats.gain_backward_min
    if stats.mtp_tokens:
        metrics["mtp_loss"] = stats.mtp_sum / stats.mtp_tokens
    if stats.z_sum:
        metrics["z_loss"] = stats.z_sum / max(vote.tokens, 1.0)
    if stats.router_z_sum:
        metrics["router_z_loss"] = stats.router_z_sum / max(vote.tokens, 1.0)
    if stats.index_sum:
        metrics["index_loss"] = stats.index_sum / max(vote.tokens, 1.0)
    return metrics
