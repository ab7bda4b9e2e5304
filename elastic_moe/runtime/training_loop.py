"""The only loop over steps: it trains in one view until the run ends or a newer view is agreed on."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from elastic_moe.config.schema import TrainConfig
from elastic_moe.control.nonfinite import NonFiniteCount
from elastic_moe.control.rebalance import Rebalancer
from elastic_moe.control.spikes import ROLLBACKS, RollbackCount
from elastic_moe.control.vote import Ballot, VoteResult, Wishes
from elastic_moe.data.tokenizer import load_tokenizer
from elastic_moe.errors import Diverged, FaultyWorker, GoesBack, GroupAborted, StateUnclear
from elastic_moe.runtime.evaluate import Evaluator
from elastic_moe.runtime.local_state import LocalState
from elastic_moe.runtime.reconfigure import Reconfigurer
from elastic_moe.runtime.reporter import Reporter
from elastic_moe.runtime.saver import Saver
from elastic_moe.runtime.session import ContextBuilder, GenerationContext
from elastic_moe.runtime.step import StepResult, StepRunner


class TrainingLoop:
    """Makes steps, and after each of them the record, a checkpoint and an evaluation where they are due.

    Args:
        config: the run's configuration.
        tokenizer_path: of the run's tokenizer.
        local: this worker's state.
        runner: makes steps.
        evaluator: measures the validation loss and samples text.
        saver: saves the state when that is due.
        reporter: sends records and events.
        fault: called as fault(step, phase) after each step; may not return.
    """

    def __init__(
        self,
        config: TrainConfig,
        tokenizer_path: str | Path,
        local: LocalState,
        runner: StepRunner,
        evaluator: Evaluator,
        saver: Saver,
        reporter: Reporter,
        fault: Callable[[int, str], None],
    ) -> None:
        self._config, self._tokenizer_path, self._local = config, tokenizer_path, local
        self._runner, self._evaluator, self._saver = runner, evaluator, saver
        self._reporter, self._fault = reporter, fault
        self._nonfinite = NonFiniteCount()
        self._repaired = 0  # steps in which copies of this worker were wrong
        self._unclear = 0  # times that nobody could tell a right copy
        self._rollbacks = RollbackCount()

    def train(
        self,
        context: GenerationContext,
        wishes: Callable[[], Wishes],
        rebalance: Callable[[GenerationContext, VoteResult], GenerationContext],
        by_speed: Callable[[GenerationContext, Ballot, int], GenerationContext] = lambda context, *_: context,
    ) -> str:
        """Make steps in one view.

        Args:
            context: of the view.
            wishes: as in `StepRunner.train_step`.
            rebalance: as in `StepRunner.train_step`.
            by_speed: called after each step that stays in the view; may return another context.

        Returns:
            "finished" or "stopped" at the end of the run, "" when a newer view is to be entered.

        Raises:
            FaultyWorker: this worker's numbers alone were not finite, or its state was repaired, too often.
            Diverged: no update was possible for too many steps, or copies of state differed too often, or spikes came
                again and again.
            GoesBack: the step was a spike, and the run goes back.
        """
        self._nonfinite = NonFiniteCount(self._nonfinite.in_a_row)
        self._saver.begin_view()
        stop = False
        while self._local.committed < self._config.run.steps and not stop:
            try:
                result = self._runner.train_step(context, self._local, wishes, rebalance)
            except StateUnclear as unclear:
                self._report_unclear(context, unclear)
                raise
            context, stop = result.context, result.stop
            self._after_commit(result)
            self._check_numbers(result)
            self._check_repairs(result)
            self._fault(self._local.committed, "committed")
            if result.reconfigure:
                return ""
            context = by_speed(context, result.total, result.sequences)
        self._finish(context, stop)
        return "stopped" if stop else "finished"

    def _after_commit(self, result: StepResult) -> None:
        """Send the record; save a checkpoint and evaluate where that is due."""
        config, local = self._config, self._local
        local.forget_recorded(self._reporter.recorded)
        if result.context.leads:
            self._reporter.record(result.record)
            if local.vote is not None:
                self._reporter.load(local.vote)
        if local.position.go_on_at >= 0:
            return  # the run goes back
        last, started_s = local.committed == config.run.steps or result.stop, time.perf_counter()
        if self._saver.save_if_due(result.context, result.save or last):
            local.held_s += time.perf_counter() - started_s
        if not result.reconfigure and _due(local.committed, config.run.eval_every_steps):
            self._evaluate(result.context)

    def _check_numbers(self, result: StepResult) -> None:
        """Report a step without an update, and leave or end the run when there are too many; alike on every rank."""
        context, skipped = result.context, bool(result.record["skipped"])
        view, limits = context.layout.view, self._config
        members = [view.members[rank] for rank in result.total.nonfinite_ranks]
        workers = [member.worker for member in members]
        self._nonfinite = count = self._nonfinite.after(skipped, workers, len(view.active_ranks))
        if not skipped:
            self._rollbacks.after_update(self._local.committed)
            return
        vote = self._local.vote
        spike = vote is not None and vote.spike
        if context.leads and vote is not None and spike:
            self._reporter.spike(vote, count.in_a_row)
        elif context.leads:
            self._reporter.not_finite(self._local.committed, members, count.in_a_row)
        if spike and limits.optim.spike == "stop":
            self._end(context, f"the loss or the gradient of step {self._local.committed} is far above those before")
        if self._local.position.go_on_at >= 0:
            self._go_back()
        if limits.optim.max_skipped and count.in_a_row >= limits.optim.max_skipped:
            what = f"{count.in_a_row} steps in a row, up to step {self._local.committed}, had no update"
            self._end(context, f"{what}, because their gradients were not finite or far above those before")
        own = view.members[context.rank].worker
        if limits.elastic.max_faults and workers == [own] and count.alone.get(own, 0) >= limits.elastic.max_faults:
            self._leave(context, f"its gradients alone were not finite in {count.alone[own]} steps")

    def _go_back(self) -> NoReturn:
        """Leave this generation, so that the next one goes on from a checkpoint, with the data after the spike."""
        what = f"the loss or the gradient of step {self._local.committed} is far above those before"
        if not self._rollbacks.after_spike(self._local.committed):
            raise Diverged(
                f"{what}, as {ROLLBACKS} times before, after which the run went back to a checkpoint; the run has "
                "diverged: go on from an earlier checkpoint with a lower optim.lr."
            )
        raise GoesBack(f"{what}: the run goes back to the newest checkpoint, and leaves the data in between out")

    def _end(self, context: GenerationContext, why: str) -> NoReturn:
        """End the run, with its state saved if it is finite; collective."""
        if context.held.finite:
            self._saver.save(context)
        self._saver.wait_written(context)
        raise Diverged(f"{why}; the run has diverged: go on from an earlier checkpoint with a lower optim.lr.")

    def _leave(self, context: GenerationContext, why: str) -> NoReturn:
        """Report that this worker is faulty, and leave the run."""
        reason = f"{why}; it leaves the run."
        self._reporter.event("worker_faulty", self._local.committed, reason=reason)
        own = context.layout.view.members[context.rank]
        raise FaultyWorker(f"worker {own.worker} on node {own.node}: {reason}")

    def _check_repairs(self, result: StepResult) -> None:
        """Report copies of state that were replaced, and leave when they were this worker's too often."""
        context, limit = result.context, self._config.elastic.max_faults
        if context.leads:
            self._reporter.repaired(self._local.committed, context.layout, result.repairs)
        if all(repair.rank != context.rank for repair in result.repairs):
            return
        self._repaired += 1
        if limit and self._repaired >= limit:
            self._leave(context, f"its state was wrong, and was repaired, in {self._repaired} steps")

    def _report_unclear(self, context: GenerationContext, unclear: StateUnclear) -> None:
        """Report copies of which none is known to be right, and end the run when that happens again and again."""
        if context.leads:
            self._reporter.unclear(self._local.committed, unclear)
        self._unclear += 1
        limit = self._config.elastic.max_faults
        if limit and self._unclear >= limit:
            raise Diverged(
                f"copies of the state have differed {self._unclear} times, the last time on workers "
                f"{', '.join(unclear.workers)} (nodes {', '.join(unclear.nodes)}), and nobody could tell which was "
                "right; go on without these nodes, or with elastic.redundancy=2."
            ) from unclear

    def _evaluate(self, context: GenerationContext) -> None:
        config, local = self._config, self._local
        started = time.perf_counter()
        losses = self._evaluator.losses(context, config.run.eval_sequences, config.data.seq_len)
        local.evaluated = local.committed
        if context.leads:
            weights = [config.data.mixture.get(name, 1.0) for name in losses]
            loss = sum(w * one for w, one in zip(weights, losses.values(), strict=True)) / sum(weights)
            by_corpus: dict[str, Any] = {"val_losses": losses} if config.data.mixture else {}
            eval_s = time.perf_counter() - started
            self._reporter.event("evaluated", local.committed, val_loss=loss, eval_s=eval_s, **by_corpus)

    def _finish(self, context: GenerationContext, stopped: bool) -> None:
        """The end of a run: checkpoint, last evaluation, sample. Every part may be repeated after a failure."""
        context.exchanger.wait_expert_weights()
        self._saver.save(context)
        if not stopped and self._local.evaluated != self._local.committed:
            self._evaluate(context)
        self._saver.confirm(context)
        if not stopped and self._config.run.sample_tokens:
            text, started_s = None, time.perf_counter()
            try:
                text = self._sample(context)
            except GroupAborted:
                raise
            except Exception as error:  # noqa: BLE001 - all is saved: a text is not worth the run
                self._reporter.event("sample_failed", self._local.committed, reason=f"{type(error).__name__}: {error}")
            context.group.attest()
            if text is not None and context.leads:
                sample_s = time.perf_counter() - started_s
                self._reporter.event("sample", self._local.committed, text=text, sample_s=sample_s)

    def _sample(self, context: GenerationContext) -> str:
        """The prompt, and on the first active rank what the model makes of it; collective."""
        config = self._config
        tokenizer = load_tokenizer(self._tokenizer_path)
        prompt = tokenizer.encode(config.run.sample_prompt)
        tokens = self._evaluator.sample(context, prompt, config.run.sample_tokens, config.data.seq_len, config.seed)
        return tokenizer.decode(tokens)


class Rebalance:
    """Carries out changes of placement in one view.

    Args:
        balancer: decides, alike on every rank.
        builder: builds the contexts.
        reconfigurer: moves state to new homes.
        local: this worker's state.
        reporter: sends events.
    """

    def __init__(
        self,
        balancer: Rebalancer,
        builder: ContextBuilder,
        reconfigurer: Reconfigurer,
        local: LocalState,
        reporter: Reporter,
    ) -> None:
        self._balancer, self._builder, self._reconfigurer = balancer, builder, reconfigurer
        self._local, self._reporter = local, reporter

    def __call__(self, context: GenerationContext, vote: VoteResult) -> GenerationContext:
        """The context for the steps that follow; collective where homes move."""
        balancer, view = self._balancer, context.layout.view
        change = balancer.propose(vote)
        if context.leads:
            for record in balancer.finished:
                self._reporter.rebalanced(record)
        balancer.finished.clear()
        if change is None:
            return context
        started = time.perf_counter()
        before, held = balancer.placement, context.held
        balancer.accept(change)
        if change.ownership is not None:
            step = self._local.committed
            context.exchanger.close()  # so that what leaves this rank is freed
            held, _ = self._reconfigurer.take_over(context.group, change.ownership, change.transfers, step)
        context.experts.adopt(change.placement)
        new = self._builder.build(
            view, context.group, context.experts, held, balancer.ownership, balancer.placement, context.speeds
        )
        if context.leads:
            self._reporter.changed_placement(self._local.committed, view, before, change)
        return replace(new, switch_s=time.perf_counter() - started)


def _due(step: int, every_steps: int) -> bool:
    """Whether `step` is a multiple of `every_steps`; 0 means never."""
    return every_steps > 0 and step % every_steps == 0
