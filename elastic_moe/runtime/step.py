"""One training step: compute, reduce, mirror, vote, apply, publish. Completing the vote is the commit (DESIGN.md section 3).

Gradients are sums over tokens; they are divided by the global token count when the update is applied, so nothing depends on who computed which
share. Until the next step begins, every rank keeps the reduced gradients it holds: a rank that missed the vote's result rolls forward with it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from elastic_moe.config.schema import TrainConfig
from elastic_moe.control.vote import Ballot, Measures, VoteResult, VoteShape, pack, result_of, unpack
from elastic_moe.data.shards import TokenShard
from elastic_moe.model.backend import TrainableExperts
from elastic_moe.model.sampling import pick
from elastic_moe.model.transformer import STATS, Transformer
from elastic_moe.optim.schedule import lr_at
from elastic_moe.parallel.collectives.group import Group
from elastic_moe.parallel.reproducible import Grid
from elastic_moe.plan.batch import sample_ids, split_batch
from elastic_moe.runtime.exchange.exchanger import Exchanger, Layout
from elastic_moe.runtime.gradients import DenseGradients
from elastic_moe.runtime.state import HeldState
from elastic_moe.types import ModelStats

RECENT_RECORDS = 16


@dataclass
class Progress:
    """How far this worker's state has come.

    Attributes:
        committed: last step whose update is in the held state; -1 before any state exists.
        reduced: step whose reduced gradients are complete here (own and mirrored); -1 for none.
        vote: result of the last committed step's vote.
        evaluated: last step that was evaluated.
        records: metrics of the last committed steps, made at the commit, so that the next leader can report what a dead one did not.
    """

    committed: int = -1
    reduced: int = -1
    vote: VoteResult | None = None
    evaluated: int = -1
    records: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=RECENT_RECORDS))


@dataclass(frozen=True)
class StepResult:
    """What a completed step says to the loop: the metrics record, what the members agreed on at the vote, the session from now on."""

    record: dict[str, Any]
    reconfigure: bool
    stop: bool
    session: GenerationContext


@dataclass(frozen=True)
class GenerationContext:
    """Everything one generation of one worker needs to make steps; rebuilt at each reconfiguration and change of placement.

    Attributes:
        switch_s: seconds that the change of placement took which made this session; 0 where there was none since the last step.
    """

    rank: int
    layout: Layout
    group: Group
    experts: TrainableExperts
    exchanger: Exchanger
    held: HeldState
    shares: list[slice]
    switch_s: float = 0.0


def share_of_batch(layout: Layout, global_batch: int, whole: int = 1) -> list[slice]:
    """Slice of the global batch per rank, in multiples of `whole` sequences; draining ranks get an empty one."""
    members = layout.view.members
    shares = split_batch(-(-global_batch // whole), [0.0 if m.draining else m.speed for m in members])
    return [slice(min(s.start * whole, global_batch), min(s.stop * whole, global_batch)) for s in shares]


def _extras(vote: VoteResult) -> dict[str, float]:
    """Metrics that only some models have: the token after the next, the indexers, the streams."""
    stats = vote.stats
    extras: dict[str, float] = {}
    if stats.gain_forward:
        extras["gain_forward"] = stats.gain_forward
        extras["gain_backward"] = stats.gain_backward
        extras["gain_backward_min"] = stats.gain_backward_min
    if stats.mtp_tokens:
        extras["mtp_loss"] = stats.mtp_sum / stats.mtp_tokens
    if stats.index_sum:
        extras["index_loss"] = stats.index_sum / max(vote.tokens, 1.0)
    return extras


class StepRunner:
    """Makes training and evaluation steps on the current session.

    Args:
        config: the run's configuration.
        model: the compute model, whose expert backend belongs to the current generation.
        train, val: token shards.
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
        val: TokenShard,
        fault: Callable[[int, str], None],
        autocast: Callable[[], torch.autocast],
        device: torch.device,
    ) -> None:
        self._config, self._model, self._train, self._val = config, model, train, val
        self._fault, self._autocast, self._device = fault, autocast, device
        self._started_s = time.perf_counter()
        tokens = config.data.global_batch * config.data.seq_len
        self.grid = Grid(tokens) if config.elastic.reproducible else None
        self.gradients = DenseGradients(model, self.grid)

    def _micro_batches(self, shard: TokenShard, ids: np.ndarray, session: GenerationContext):
        """This rank's micro-batches; every rank yields equally many, empty ones at the end where it has fewer."""
        config = self._config.data
        mine = ids[session.shares[session.rank]]
        longest = max(share.stop - share.start for share in session.shares)
        for start in range(0, longest, config.micro_batch):
            tokens, targets = shard.batch(mine[start : start + config.micro_batch], config.seq_len)
            yield torch.from_numpy(tokens).to(self._device), torch.from_numpy(targets).to(self._device)

    def train_step(
        self,
        session: GenerationContext,
        progress: Progress,
        control_flags: Callable[[], tuple[bool, bool]],
        rebalance: Callable[[GenerationContext, VoteResult], GenerationContext] = lambda session, _: session,
    ) -> StepResult:
        """Make step `progress.committed + 1` and commit it.

        Args:
            session: the current generation.
            progress: updated in place as phases complete.
            wanted: read just before the vote: (a newer planned view is here, stop is requested).
            rebalance: may give another session for the steps that follow, in which the new weights are then published.

        Raises:
            GroupAborted: the generation ended before the step was complete; `progress` says how far it came.
        """
        config, held = self._config, session.held
        step = progress.committed + 1
        self._started_s = time.perf_counter()
        self._fault(step, "compute")
        ids = sample_ids(config.seed, step - 1, config.data.global_batch, self._train.num_samples(config.data.seq_len))
        session.experts.begin_step()
        self.gradients.zero()
        ce_sum, tokens = 0.0, 0
        stats = np.zeros(len(STATS))
        late = step > config.model.mtp_switch * config.run.steps
        mtp_weight = config.model.mtp_late_weight if late else config.model.mtp_weight
        watch = session.shares[session.rank].start == 0 and session.rank in session.layout.view.active_ranks
        load_LE = torch.zeros((config.model.num_moe_layers, config.model.num_experts), dtype=torch.int64)
        for inputs, targets in self._micro_batches(self._train, ids, session):
            with self._autocast():
                out = self._model.loss(inputs, targets, mtp_weight, watch)
            watch = False  # the batch's first sequence: the same one at every world size
            out.loss_sum.backward()
            self.gradients.add()
            stats += out.stats.numpy()
            ce_sum += float(out.ce_sum)
            tokens += int(out.num_tokens)
            load_LE += out.load_LE.cpu()
        session.exchanger.wait_expert_weights()  # they have long arrived, unless the model has no experts
        self._fault(step, "reduce")
        progress.reduced = -1
        square = session.exchanger.reduce()
        self._fault(step, "mirror")
        session.exchanger.mirror()
        progress.reduced = step
        self._fault(step, "vote")
        reconfigure, stop = control_flags()
        view, work = session.layout.view, session.experts.statistics()
        expert_rows_R = np.zeros(view.world_size)
        expert_rows_R[session.rank] = work.local_tokens
        ballot = Ballot(
            ce_sum=ce_sum,
            tokens=tokens,
            grad_square=square if np.isfinite(square) else 0.0,
            nonfinite=float(not np.isfinite(square)),
            reconfigure=float(reconfigure),
            stop=float(stop),
            stats=ModelStats(*stats.tolist()),
            measures=Measures(
                expert_s=work.compute_s,
                expert_rows=work.local_tokens,
                cross_node_rows=work.cross_node_rows,
                publish_s=session.exchanger.publish_s,
                publish_bytes=session.exchanger.publish_bytes,
                switch_s=session.switch_s,
            ),
            load_LE=load_LE.numpy().astype(np.float64),
            expert_rows_R=expert_rows_R,
        )
        vector = torch.from_numpy(pack(ballot))
        session.group.all_reduce(vector)
        total = unpack(
            Ballot, vector.numpy(), VoteShape(config.model.num_moe_layers, config.model.num_experts, view.world_size)
        )
        vote = result_of(total, step, view, work.layer_time_L.numpy())
        self._fault(step, "apply")
        self.commit(held, progress, vote)
        self._fault(step, "publish")
        if not total.all_reconfigure:
            session = rebalance(session, vote)
            session.exchanger.publish()
        record = progress.records[-1]
        record["step_s"] = time.perf_counter() - self._started_s
        record["tokens_per_s"] = vote.tokens / record["step_s"]
        return StepResult(record, total.all_reconfigure, total.stop > 0, session)

    def commit(self, held: HeldState, progress: Progress, vote: VoteResult) -> None:
        """Apply a vote's result to the held state. Purely local, so a rank that has the result cannot fail to commit."""
        lr = lr_at(vote.step, self._config.run.steps, self._config.optim)
        held.apply(vote, lr, self._config.optim, self._config.model)
        progress.committed, progress.vote = vote.step, vote
        if progress.records and progress.records[-1]["step"] == vote.step:
            return
        step_s = time.perf_counter() - self._started_s
        progress.records.append(
            {
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
                "time": time.time(),
                **_extras(vote),
            }
        )

    @torch.no_grad()
    def evaluate(self, session: GenerationContext) -> float:
        """Mean validation loss over the first `run.eval_sequences` sequences of the validation shard; collective."""
        config = self._config
        available = self._val.num_samples(config.data.seq_len)
        ids = np.arange(min(config.run.eval_sequences, available), dtype=np.int64)
        shares = share_of_batch(session.layout, len(ids))
        total = torch.zeros(2, dtype=torch.float64)
        for inputs, targets in self._micro_batches(self._val, ids, replace(session, shares=shares)):
            with self._autocast():
                out = self._model.loss(inputs, targets)
            total += torch.tensor([float(out.ce_sum), float(out.num_tokens)], dtype=torch.float64)
        session.group.all_reduce(total)
        return float(total[0] / total[1])

    @torch.no_grad()
    def sample(self, session: GenerationContext, prompt: list[int], num_tokens: int, seed: int) -> list[int]:
        """Generate text with the sharded model; collective. The first active rank holds the text, the others join its all-to-alls.

        Returns:
            Prompt and generated tokens on the first active rank, the prompt elsewhere.
        """
        leads = session.rank == session.layout.view.active_ranks[0]
        tokens = list(prompt)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(num_tokens):
            context = torch.tensor([tokens[-self._config.data.seq_len :]] if leads else [], dtype=torch.int64)
            context = context.reshape(1 if leads else 0, -1 if leads else 1).to(self._device)
            with self._autocast():
                logits = self._model(context)
            if leads:
                tokens.append(pick(logits[0, -1], 0.8, 0.95, generator))
        return tokens
