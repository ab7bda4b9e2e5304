"""Carries out changes of shares in one view, and reports them and the stragglers."""

from __future__ import annotations

from dataclasses import replace

from elastic_moe.control.rebalance import Rebalancer
from elastic_moe.control.speeds import Adjustment, SpeedRule
from elastic_moe.control.vote import Ballot
from elastic_moe.runtime.local_state import LocalState
from elastic_moe.runtime.reporter import Reporter
from elastic_moe.runtime.session import GenerationContext


class BySpeed:
    """Takes in the votes of one view.

    A change is local to each rank, and all make it after the same vote: the next batch is divided anew, the next split
    of rows knows the new speeds, and so does the next look at the placement. No state moves.

    Args:
        rule: decides, alike on every rank.
        balancer: plans placements.
        local: this worker's state; knows its speed for the next view.
        reporter: sends events.
    """

    def __init__(self, rule: SpeedRule, balancer: Rebalancer, local: LocalState, reporter: Reporter) -> None:
        self._rule, self._balancer, self._local, self._reporter = rule, balancer, local, reporter

    def __call__(self, context: GenerationContext, total: Ballot, sequences: int) -> GenerationContext:
        """The context for the steps that follow.

        Args:
            context: of the step that was committed.
            total: the sum of its ballots.
            sequences: of its batch.
        """
        rule, step = self._rule, self._local.committed
        rule.resize(sequences)
        change = rule.observe(total)
        self._local.speed = rule.member(context.rank)
        if context.leads:
            self._report(step, context, change)
        rule.news.clear()
        if change is None:
            return context
        self._balancer.use(change.speeds.rows)
        context.experts.adopt(self._balancer.placement, change.speeds.rows)
        return replace(context, speeds=change.speeds)

    def _report(self, step: int, context: GenerationContext, change: Adjustment | None) -> None:
        """Events about who has become a straggler or is one no longer, and about other shares."""
        for news in self._rule.news:
            member = context.layout.view.members[news.rank]
            kind = "straggler" if news.begins else "straggler_recovered"
            who = {"rank": news.rank, "workers": [member.worker], "nodes": [member.node]}
            self._reporter.event(kind, step, **who, factor=round(news.factor, 2), phase=news.phase)
        if change is not None:
            sequences, rows = ([round(speed, 3) for speed in s] for s in (change.speeds.sequences, change.speeds.rows))
            gain_s = round(change.before_s - change.after_s, 6)
            self._reporter.event("speeds", step, shares=change.shares, sequences=sequences, rows=rows, gain_s=gain_s)
