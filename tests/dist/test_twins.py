"""Whole runs in which bits of the state flip, or updates go differently on one worker: found, decided, repaired."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from elastic_moe.config.schema import BalanceConfig, TrainConfig
from elastic_moe.data.prepare import Prepared
from tests.local_run import LocalRun, _work, tiny_config

pytestmark = pytest.mark.timeout(600)

WAIT_S = 240.0
CORPUS = Path(__file__).resolve().parents[2] / "elastic_moe" / "plan" / "split" / "split.py"
BIT = 1 << 27  # of the exponent: the number changes by a factor of 2^16

Flip = tuple[str, int, str, str, str]
"""Worker, step, phase ("rest" before the vote, "update" after the update), role and field of the unit that changes."""


def _flip(held: Any, role: str, field: str) -> None:
    """Flip a bit of the first expert with this role: all of them are used in every step."""
    from elastic_moe.plan.state.ownership import MIRROR, PRIMARY

    wanted = {"primary": PRIMARY, "mirror": MIRROR}[role]
    unit = next(u for u, unit in enumerate(held.units) if unit.expert is not None and held.roles[u] == wanted)
    held.states[unit].fields[field].view(torch.int32)[0] ^= BIT


def _disturbed(
    flips: list[Flip], config: TrainConfig, address: Any, prepared: Prepared, worker: str, node: str
) -> None:
    """A worker of whose state bits flip."""
    from elastic_moe.runtime.step import StepRunner
    from elastic_moe.runtime.twins import TwinCheck

    vote, after = StepRunner._vote, TwinCheck.after_update
    left = list(flips)

    def inflict(step: int, phase: str, held: Any) -> None:
        for flip in [flip for flip in left if flip[:3] == (worker, step, phase)][:1]:
            left.remove(flip)  # the same step comes again after the run went back
            _flip(held, *flip[3:])

    def disturbed_vote(self: StepRunner, context: Any, ballot: Any) -> Any:
        inflict(self._step, "rest", context.held)  # type: ignore[attr-defined]
        return vote(self, context, ballot)

    def disturbed_update(self: TwinCheck, step: int, context: Any, saved: bool) -> Any:
        inflict(step, "update", context.held)
        return after(self, step, context, saved)

    compute = StepRunner._compute

    def with_step(self: StepRunner, step: int, context: Any, batch: int) -> Any:
        self._step = step  # type: ignore[attr-defined]
        return compute(self, step, context, batch)

    StepRunner._compute = with_step  # type: ignore[method-assign]
    StepRunner._vote = disturbed_vote  # type: ignore[method-assign]
    TwinCheck.after_update = disturbed_update  # type: ignore[method-assign]
    _work(config, address, prepared, worker, node)


@contextmanager
def _run(config: TrainConfig, flips: list[Flip], workers: int = 3) -> Iterator[LocalRun]:
    class Disturbed(LocalRun):
        work = staticmethod(partial(_disturbed, flips))

    with Disturbed(config, workers) as run:
        yield run


@pytest.fixture(scope="module")
def configured(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TrainConfig]:
    """Makes configurations of runs whose losses must be equal bit for bit."""

    def make(**elastic: Any) -> TrainConfig:
        values = {"reproducible": True, "check_every_steps": 1} | elastic
        config = tiny_config(tmp_path_factory.mktemp("twins") / "run", CORPUS, **values)
        return replace(
            config,
            run=replace(config.run, steps=12),
            checkpoint=replace(config.checkpoint, every_steps=4),
            balance=BalanceConfig(every_steps=0),
        )

    return make


@pytest.fixture(scope="module")
def undisturbed(configured: Callable[..., TrainConfig]) -> list[float]:
    with _run(configured(), []) as run:
        run.wait_end()
        assert not [e for e in run.events() if e["event"].startswith("state_")]
        return run.losses()


def _told(run: LocalRun, kind: str) -> list[dict[str, Any]]:
    return [event for event in run.events() if event["event"] == kind]


def test_bits_that_flip_at_rest_are_repaired_before_they_are_used(
    configured: Callable[..., TrainConfig], undisturbed: list[float]
) -> None:
    flips: list[Flip] = [
        ("w1", 3, "rest", "primary", "weight"),
        ("w2", 5, "rest", "mirror", "m"),
        ("w0", 7, "rest", "primary", "v"),
        ("w1", 9, "rest", "mirror", "weight"),
    ]
    with _run(configured(), flips) as run:
        run.wait_end()
        told = [(e["step"], *e["workers"], *e["nodes"], len(e["units"])) for e in _told(run, "state_repaired")]
        assert told == [(3, "w1", "n1", 1), (5, "w2", "n2", 1), (7, "w0", "n0", 1), (9, "w1", "n1", 1)]
        assert all(view["planned"] for view in _told(run, "view")), "nobody was lost for it"
        assert run.losses() == undisturbed


def test_without_a_comparison_the_same_flip_changes_the_losses(
    configured: Callable[..., TrainConfig], undisturbed: list[float]
) -> None:
    with _run(configured(check_every_steps=0), [("w1", 3, "rest", "primary", "weight")]) as run:
        run.wait_end()
        assert not _told(run, "state_repaired")
        losses = run.losses()
    assert losses[:3] == undisturbed[:3]
    assert losses[3:] != undisturbed[3:]


def test_a_worker_whose_state_is_wrong_again_and_again_leaves(
    configured: Callable[..., TrainConfig], undisturbed: list[float]
) -> None:
    flips: list[Flip] = [("w1", step, "rest", "mirror", "weight") for step in (3, 5, 6)]
    with _run(configured(max_faults=3), flips) as run:
        run.wait_end()
        run.processes["w1"].join(WAIT_S)
        assert run.processes["w1"].exitcode != 0
        assert [e["step"] for e in _told(run, "state_repaired")] == [3, 5, 6]
        (faulty,) = _told(run, "worker_faulty")
        assert (faulty["worker"], faulty["node"], faulty["step"]) == ("w1", "n1", 6)
        assert {record["world_size"] for record in run.records()[7:]} == {2}
        assert run.losses() == undisturbed


def test_an_update_that_went_differently_is_outvoted_by_two_others(
    configured: Callable[..., TrainConfig], undisturbed: list[float]
) -> None:
    flips: list[Flip] = [("w1", 3, "update", "primary", "weight"), ("w2", 5, "update", "mirror", "v")]
    with _run(configured(redundancy=2), flips) as run:
        run.wait_end()
        told = [(e["step"], *e["workers"]) for e in _told(run, "state_repaired")]
        assert told == [(3, "w1"), (5, "w2")]
        assert run.losses() == undisturbed


def test_where_nobody_can_tell_the_run_goes_back_to_its_checkpoint(
    configured: Callable[..., TrainConfig], undisturbed: list[float]
) -> None:
    with _run(configured(), [("w1", 8, "update", "primary", "weight")]) as run:
        run.wait_end()
        (unclear,) = _told(run, "state_unclear")
        assert unclear["step"] == 8
        assert "w1" in unclear["workers"]
        assert len(unclear["workers"]) == 2
        (entered,) = [e for e in _told(run, "entered") if e["source"] == "checkpoint"]
        assert (entered["step"], entered["lost_steps"]) == (4, 4)
        assert run.losses() == undisturbed


def test_a_run_in_which_nobody_can_tell_again_and_again_ends(configured: Callable[..., TrainConfig]) -> None:
    flips: list[Flip] = [("w1", 6, "update", "mirror", "m")] * 3
    with _run(configured(max_faults=3), flips) as run:
        for process in run.processes.values():
            process.join(WAIT_S)
            assert process.exitcode == 1
        assert len(_told(run, "state_unclear")) == 3
