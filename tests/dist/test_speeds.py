"""Workers of unequal speed in real runs: shares follow what is measured, the losses do not change, deaths disturb not.

A worker is made slow by a real throttle: it is stopped whenever it has used more than its part of a core.
"""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from elastic_moe.config.schema import TrainConfig
from scripts.benchmarks.throttle import Throttle
from tests.dist.test_runtime import CORPUS, with_steps
from tests.local_run import LocalRun, tiny_config

WORKERS = 3
FAST, SLOW = 0.4, 0.1  # of a core
pytestmark = pytest.mark.timeout(400)


def _config(run_dir: Path, copies: str = "1", **elastic: Any) -> TrainConfig:
    """Larger than the other tests' model, so that the layers and not the messages take the time of a step."""
    config = with_steps(tiny_config(run_dir, CORPUS, **elastic), 100_000)
    model = replace(config.model, hidden_size=64, dense_hidden=512, expert_hidden=64)
    data = replace(config.data, global_batch=48, micro_batch=2 if elastic.get("reproducible") else 8)
    return replace(config, model=model, data=data, balance=replace(config.balance, copies=copies, by_speed=True))


def _throttled(run: LocalRun, slow: str) -> Throttle:
    """All workers get the same part of a core, but for the slow one."""
    return Throttle({p.pid: SLOW if name == slow else FAST for name, p in run.processes.items()})


def _shares(run: LocalRun) -> dict[int, list[int]]:
    """Step -> the shares from then on."""
    return {event["step"]: event["shares"] for event in run.events() if event["event"] == "speeds"}


def _rank(run: LocalRun, worker: str) -> int:
    return [member[0] for member in run.coordinator.status()["members"]].index(worker)


def _wait_for_shares(run: LocalRun, worker: str, below: float) -> int:
    """Wait until a worker has less than so much of the mean share; the step of the change."""

    def small(_: dict[str, Any]) -> bool:
        shares = list(_shares(run).values())
        return bool(shares) and shares[-1][_rank(run, worker)] < below * sum(shares[-1]) / len(shares[-1])

    run.wait(f"a small share of {worker}", small)
    return max(_shares(run))


def _stop(run: LocalRun) -> list[float]:
    run.coordinator.submit({"event": "stop", "reason": "enough"})
    run.wait_end()
    return run.losses()


@pytest.mark.parametrize("copies", ["1", "all"])
def test_the_share_of_a_throttled_worker_falls(tmp_path: Path, copies: str) -> None:
    with LocalRun(_config(tmp_path / "run", copies), WORKERS) as run:
        run.wait_step(4)
        with _throttled(run, "w1"):
            step = _wait_for_shares(run, "w1", 0.7)
            run.wait("the straggler's name", lambda _: any(event["event"] == "straggler" for event in run.events()))
            run.wait_step(step + 6)
        _stop(run)
        events, rank = run.events(), 0
        straggler = next(event for event in events if event["event"] == "straggler")
        rank = straggler["rank"]
        assert (straggler["workers"], straggler["phase"]) == (["w1"], "compute")
        assert straggler["factor"] > 1.5
        last = [event for event in events if event["event"] == "speeds"][-1]
        assert last["sequences"][rank] == min(last["sequences"])
        assert last["rows"][rank] == min(last["rows"])
        assert sum(last["shares"]) == 48


def test_reproducible_losses_do_not_depend_on_shares_nor_on_a_death_among_their_changes(tmp_path: Path) -> None:
    """The shares change, a worker that has got a small one dies, one with a large one too, and another joins."""
    with LocalRun(_config(tmp_path / "a" / "run", reproducible=True, max_workers=4), 4, nodes=2) as run:
        run.wait_step(3)
        with _throttled(run, "w1"):
            _wait_for_shares(run, "w1", 0.8)
            run.signal("w3", signal.SIGKILL)
            status = run.wait("three workers", lambda s: s["world_size"] == 3 and s["entered"])
            run.wait_step(status["step"] + 2)
            run.add()
            status = run.wait("four workers", lambda s: s["world_size"] == 4 and s["entered"])
            run.wait_step(status["step"] + 4)
            run.signal("w1", signal.SIGKILL)
            status = run.wait("three workers again", lambda s: s["world_size"] == 3 and s["entered"])
            run.wait_step(status["step"] + 2)
        disturbed = _stop(run)
        assert _shares(run)
        assert all(share % 2 == 0 for shares in _shares(run).values() for share in shares), "whole micro-batches"
        assert all(event["lost_steps"] == 0 for event in run.events() if event["event"] == "entered")
    off = _config(tmp_path / "b" / "run", reproducible=True)
    off = replace(off, balance=replace(off.balance, by_speed=False))
    with LocalRun(with_steps(off, len(disturbed)), 1) as run:
        run.wait_end()
        assert run.losses() == disturbed


def test_a_death_right_after_a_change_of_shares(tmp_path: Path) -> None:
    """Each rank makes the change by itself after the vote. Whoever dies then leaves the others with what it had."""
    with LocalRun(_config(tmp_path / "run"), WORKERS) as run:
        run.wait_step(3)
        with _throttled(run, "w1"):
            step = _wait_for_shares(run, "w1", 0.7)
            run.signal("w0", signal.SIGKILL)
            status = run.wait("two workers", lambda s: s["world_size"] == 2 and s["entered"])
            run.wait_step(status["step"] + 8)
        losses = _stop(run)
        rank = _rank(run, "w1")
        later = [shares for changed, shares in _shares(run).items() if changed > step]
        assert all(shares[rank] < 0.8 * sum(shares) / len(shares) for shares in later if len(shares) == 2)
        assert losses[-1] < losses[0]
        assert all(event["lost_steps"] == 0 for event in run.events() if event["event"] == "entered")
