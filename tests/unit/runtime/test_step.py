"""One step of a group of one: its phases, its record, and the state that each kind of failure leaves behind."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonschema import Draft202012Validator

from elastic_moe.control.spikes import FEWEST, SpikeGuard
from elastic_moe.control.vote import VoteResult, Wishes
from elastic_moe.data.shards import TokenShard, TokenShardWriter
from elastic_moe.errors import GroupAborted
from elastic_moe.metrics.json_schema import json_schema
from elastic_moe.model.params import param_specs
from elastic_moe.model.transformer import Transformer
from elastic_moe.optim.schedule import lr_at
from elastic_moe.parallel.collectives.abort import AbortSignal
from elastic_moe.parallel.collectives.backend import GroupMember
from elastic_moe.parallel.collectives.group import Group
from elastic_moe.parallel.collectives.store import Rendezvous
from elastic_moe.parallel.experts import experts_of
from elastic_moe.plan.shares import Batching
from elastic_moe.plan.state.units import build_units
from elastic_moe.run_dir import METRICS
from elastic_moe.runtime.batches import MicroBatches
from elastic_moe.runtime.initial import InitialWeights
from elastic_moe.runtime.local_state import LocalState
from elastic_moe.runtime.reconfigure import Reconfigurer, Restored
from elastic_moe.runtime.session import ContextBuilder, GenerationContext
from elastic_moe.runtime.step import StepResult, StepRunner
from elastic_moe.types import Member, View
from tests.local_run import tiny_config

PHASES = ["compute", "reduce", "mirror", "vote", "apply", "publish"]
VOCABULARY = 64
CPU = torch.device("cpu")
VIEW = View(3, (Member("w0", "n0", 0),))


class NoStorage:
    """There is no checkpoint."""

    def restore(self, group: Group, names: Sequence[str], expected: bool) -> Restored:
        return Restored()


@dataclass
class Lone:
    """The only worker of a run. `on_phase` is called at every phase; `phases` has (step, phase) of each."""

    shard: TokenShard
    local: LocalState = field(default_factory=LocalState)
    phases: list[tuple[int, str]] = field(default_factory=list)
    on_phase: Callable[[str], object] = lambda phase: None

    def __post_init__(self) -> None:
        config = tiny_config(Path("unused"), Path("unused"))
        self.config = config = replace(
            config,
            model=replace(config.model, vocab_size=VOCABULARY),
            data=replace(config.data, seq_len=8, global_batch=4, micro_batch=2),
        )
        specs = param_specs(config.model)
        units = build_units(specs, config.model.max_unit_elements)
        shape = (config.model.num_moe_layers, config.model.num_experts)
        self.model = model = Transformer(config.model, None)
        self.runner = StepRunner(
            config, model, self.shard, MicroBatches(config.data, CPU), self._fault, contextlib.nullcontext
        )
        self.group = Group(GroupMember(VIEW.generation, 0, 1), Rendezvous("nowhere", 0, "", 1.0), AbortSignal())
        reconfigurer = Reconfigurer(
            config,
            units,
            shape,
            self.local,
            self.roll_forward,
            NoStorage(),
            InitialWeights(config.model, specs, config.seed),
            lambda step, phase: None,
        )
        result = reconfigurer.enter(VIEW, self.group)
        model.experts = experts = experts_of(self.group, result.placement, config.model, CPU)
        builder = ContextBuilder(
            units,
            model,
            self.runner.gradients.tensors,
            shape[0],
            Batching(config.data.global_batch, config.data.micro_batch),
        )
        self.context = builder.build(VIEW, self.group, experts, result.held, result.ownership, result.placement)
        self.context.exchanger.publish(frozen=True)

    def _fault(self, step: int, phase: str) -> None:
        self.phases.append((step, phase))
        self.on_phase(phase)

    def roll_forward(self, vote: VoteResult) -> None:
        self.runner.roll_forward(self.local, vote)

    def step(
        self,
        reconfigure: bool = False,
        stop: bool = False,
        rebalance: Callable[[GenerationContext, VoteResult], GenerationContext] = lambda context, _: context,
    ) -> StepResult:
        return self.runner.train_step(self.context, self.local, lambda: Wishes(reconfigure, stop), rebalance)

    def weights(self) -> dict[str, torch.Tensor]:
        """Master weights by unit."""
        held = self.context.held
        return {held.units[u].name: state.weight.clone() for u, state in held.states.items()}

    def compute_weights(self) -> dict[str, torch.Tensor]:
        """Weights of the compute model, without its experts."""
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def learned(self) -> set[str]:
        """Names of the units with a gradient."""
        return {unit.name for unit in self.context.held.units if unit.rule.has_gradient}


def workers(tmp_path: Path) -> Callable[[], Lone]:
    """Makes workers that begin alike."""
    writer = TokenShardWriter(tmp_path / "train.bin", VOCABULARY)
    writer.append([(i * i + i // 7) % VOCABULARY for i in range(2000)])
    writer.close()
    return lambda: Lone(TokenShard.open(tmp_path / "train.bin"))


@pytest.fixture
def lone(tmp_path: Path) -> Callable[[], Lone]:
    return workers(tmp_path)


def _changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def _lost_at(worker: Lone, phase: str) -> Callable[[str], None]:
    """Ends the generation of this worker when it comes to a phase."""

    def abort(reached: str) -> None:
        if reached == phase:
            worker.on_phase = lambda phase: None
            raise GroupAborted("a peer died")

    return abort


def test_the_phases_come_in_order_and_each_leaves_the_state_it_says(lone: Callable[[], Lone]) -> None:
    worker, seen = lone(), dict[str, tuple[int, int, int]]()
    local = worker.local

    def look(phase: str) -> None:
        seen[phase] = local.committed, local.reduced, len(local.records)

    worker.on_phase = look
    for step in (1, 2):
        worker.phases.clear()
        seen.clear()
        result = worker.step()
        assert worker.phases == [(step, phase) for phase in PHASES]
        assert seen["compute"][:2] == (step - 1, -1), "the gradients of the step before are overwritten from here on"
        assert seen["reduce"][:2] == seen["mirror"][:2] == (step - 1, -1)
        assert seen["vote"] == (step - 1, step, step - 1)
        assert seen["apply"] == (step - 1, step, step - 1), "the result of the vote is not yet applied"
        assert seen["publish"] == (step, step, step - 1)
        assert (local.committed, len(local.records)) == (step, step)
        assert local.vote is not None
        assert local.vote.step == step
        assert not result.reconfigure
        assert not result.stop
        assert result.context is worker.context


def test_a_step_changes_every_unit_with_a_gradient_and_publishes_it(lone: Callable[[], Lone]) -> None:
    worker = lone()
    weights, compute = worker.weights(), worker.compute_weights()
    worker.step()
    assert worker.learned() <= _changed(weights, worker.weights())
    assert _changed(compute, worker.compute_weights()) == set(compute)


def test_a_record_is_made_once_and_as_declared(lone: Callable[[], Lone]) -> None:
    worker = lone()
    validator = Draft202012Validator(json_schema(METRICS))
    for step in (1, 2, 3):
        began_s, began = time.time(), time.perf_counter()
        published_s: list[float] = []

        def rebalance(context: GenerationContext, _: VoteResult, at: list[float] = published_s) -> GenerationContext:
            at.append(time.time())
            return context

        result = worker.step(rebalance=rebalance)
        took_s = time.perf_counter() - began
        record, vote = result.record, worker.local.vote
        validator.validate(record)
        assert [r["step"] for r in worker.local.records] == list(range(1, step + 1))
        assert record is worker.local.records[-1]
        assert vote is not None
        assert record["loss"] == vote.loss
        assert record["tokens"] == 4 * 8
        assert record["lr"] == lr_at(step, worker.config.run.steps, worker.config.optim)
        assert (record["generation"], record["world_size"]) == (VIEW.generation, 1)
        assert 0 < record["step_s"] <= took_s
        assert record["tokens_per_s"] == record["tokens"] / record["step_s"]
        assert record["step_s"] / 2 < sum(record[f"{phase}_s"] for phase in PHASES) <= record["step_s"] + 1e-5
        assert began_s <= record["time"] <= published_s[0], "the time is that of the commit"


def test_gradients_that_are_not_finite_are_committed_without_an_update(lone: Callable[[], Lone]) -> None:
    worker = lone()
    worker.step()
    before = worker.weights()

    def poison(phase: str) -> None:
        if phase == "reduce":
            next(iter(worker.runner.gradients.tensors.values())).fill_(math.nan)

    worker.on_phase = poison
    result = worker.step()
    vote = worker.local.vote
    assert vote is not None
    assert not vote.finite
    assert (vote.step, worker.local.committed) == (2, 2)
    assert not _changed(before, worker.weights()), "the biases of the routers rest too"
    assert (result.record["step"], result.record["grad_norm"], result.record["skipped"]) == (2, 0.0, True)
    assert result.total.nonfinite_ranks == (0,)
    Draft202012Validator(json_schema(METRICS)).validate(result.record)
    assert math.isfinite(result.record["loss"])
    worker.on_phase = lambda phase: None
    result = worker.step()
    assert (result.record["skipped"], result.total.nonfinite_ranks) == (False, ())
    assert worker.learned() <= _changed(before, worker.weights()), "the step after it updates again"
    assert all(torch.isfinite(weight).all() for weight in worker.weights().values())


def test_a_spike_is_committed_without_an_update_and_counts_in_the_history(lone: Callable[[], Lone]) -> None:
    worker = lone()
    loss = worker.step().record["loss"]
    worker.local.guard = guard = SpikeGuard()
    for i in range(FEWEST):
        guard.add(loss + 1.0 + 0.001 * (i % 2), 1.0 + 0.001 * (i % 2))
    before = worker.weights()

    def enlarge(phase: str) -> None:
        if phase == "reduce":
            next(iter(worker.runner.gradients.tensors.values())).mul_(2.0**20)

    worker.on_phase = enlarge
    result = worker.step()
    vote = worker.local.vote
    assert vote is not None
    assert (vote.finite, vote.spike, vote.updates) == (True, True, False)
    assert not _changed(before, worker.weights())
    assert (result.record["skipped"], result.total.nonfinite_ranks, worker.local.committed) == (True, (), 2)
    worker.on_phase = lambda phase: None
    assert not worker.step().record["skipped"]
    assert sum(map(math.isfinite, guard.pack().tolist())) == 2 * (FEWEST + 2)


@pytest.mark.parametrize("phase", ["compute", "reduce", "mirror", "vote"])
def test_an_abort_before_the_vote_leaves_the_step_to_be_made_again(lone: Callable[[], Lone], phase: str) -> None:
    worker, twin = lone(), lone()
    before = worker.weights()
    worker.on_phase = _lost_at(worker, phase)
    with pytest.raises(GroupAborted):
        worker.step()
    assert worker.local.committed == 0
    assert not worker.local.records
    assert worker.local.reduced == (1 if phase == "vote" else -1)
    assert not _changed(before, worker.weights())
    assert worker.step().record["loss"] == twin.step().record["loss"]
    assert not _changed(worker.weights(), twin.weights())


def test_a_rank_that_missed_the_result_rolls_forward_to_the_same_state(lone: Callable[[], Lone]) -> None:
    worker, twin = lone(), lone()
    record = twin.step().record
    worker.on_phase = _lost_at(worker, "apply")
    with pytest.raises(GroupAborted):
        worker.step()
    assert (worker.local.committed, worker.local.reduced) == (0, 1)
    assert not worker.local.records
    assert twin.local.vote is not None
    worker.roll_forward(twin.local.vote)
    assert not _changed(worker.weights(), twin.weights())
    assert (worker.local.committed, worker.local.vote) == (1, twin.local.vote)
    phases = {"data_s"} | {f"{phase}_s" for phase in PHASES}  # a rank that makes no step has none
    own_clock = {"step_s", "tokens_per_s", "time"} | phases
    assert [r.keys() for r in worker.local.records] == [record.keys() - phases]
    assert {k: v for k, v in worker.local.records[0].items() if k not in own_clock} == {
        k: v for k, v in record.items() if k not in own_clock
    }


def test_an_abort_while_weights_are_published_leaves_a_record(lone: Callable[[], Lone]) -> None:
    worker, twin = lone(), lone()

    def lost(context: GenerationContext, vote: VoteResult) -> GenerationContext:
        raise GroupAborted("a peer died")

    with pytest.raises(GroupAborted):
        worker.step(rebalance=lost)
    twin.step()
    assert (worker.local.committed, [r["step"] for r in worker.local.records]) == (1, [1])
    assert not _changed(worker.weights(), twin.weights())
    worker.context.exchanger.publish()
    worker.step()
    assert [r["step"] for r in worker.local.records] == [1, 2]


def test_all_ranks_leave_a_view_before_the_weights_are_published(
    lone: Callable[[], Lone], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = lone()

    def unexpected(*_: Any) -> GenerationContext:
        raise AssertionError("the placement of a view that ends does not change, and the next view publishes")

    monkeypatch.setattr(worker.context.exchanger, "publish", unexpected)

    result = worker.step(reconfigure=True, stop=True, rebalance=unexpected)
    assert result.reconfigure
    assert result.stop
    assert result.record["step"] == worker.local.committed == 1


def test_the_weights_are_published_in_the_context_of_a_change(lone: Callable[[], Lone]) -> None:
    worker, published = lone(), list[Any]()
    changed = replace(worker.context, switch_s=1.5)
    publish = worker.context.exchanger.publish

    def spy(frozen: bool = False) -> None:
        published.append(worker.local.committed)
        publish(frozen)

    worker.context.exchanger.publish = spy  # type: ignore[method-assign]
    result = worker.step(rebalance=lambda context, vote: changed)
    assert result.context is changed
    assert published == [1]
    worker.context = changed
    worker.step()
    assert worker.local.vote is not None
    assert worker.local.vote.measures.switch_s == 1.5
