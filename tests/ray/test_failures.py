"""Runs that are given up although members live: these save the committed state first."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from elastic_moe.actors import fit
from elastic_moe.errors import UserError
from tests.ray.test_full_runs import WORKERS, FullRun, add_node, full_run

Until = Callable[..., None]
REFUSAL = "device is cuda, and a worker sees no GPU"
train = fit.train_function


def train_or_refuse(settings: dict[str, Any]) -> dict[str, Any]:
    """The train function, for a worker that starts before the file `refuse` is there; else bad input."""
    if (Path(settings["config"].run.dir) / "refuse").exists():
        raise UserError(REFUSAL)
    return train(settings)


def assert_saved(run: FullRun, until: Until) -> None:
    until(lambda: not run.thread.is_alive(), "the run has ended", 240.0)
    assert [event["step"] for event in run.events("checkpoint")][-1] == run.steps(), "no committed step is lost"
    assert len(run.events("failed")) == 1


@pytest.mark.timeout(600)
def test_a_worker_with_bad_input_ends_the_run_with_the_others_state_saved(
    cluster: Cluster, tmp_path: Path, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "train_function", train_or_refuse)
    add_node(cluster, WORKERS)
    with full_run(tmp_path) as run:
        until(lambda: run.steps() >= 5 and run.world() == WORKERS, "three workers train", 240.0)
        (tmp_path / "run" / "refuse").touch()
        os.kill(run.members()[1][2], signal.SIGKILL)
        assert_saved(run, until)
        assert REFUSAL in run.events("failed")[0]["reason"]
        (failure,) = getattr(run.error, "worker_failures", {}).values()
        assert isinstance(failure, UserError)


@pytest.mark.timeout(600)
def test_a_request_that_the_run_fails_ends_it_with_its_state_saved(
    cluster: Cluster, tmp_path: Path, until: Until
) -> None:
    """As the driver asks where it cannot go on itself."""
    add_node(cluster, WORKERS)
    with full_run(tmp_path) as run:
        until(lambda: run.steps() >= 5 and run.world() == WORKERS, "three workers train", 240.0)
        run.link.submit({"event": "fail", "reason": "the driver cannot go on"})
        assert_saved(run, until)
        assert "the driver cannot go on" in str(run.error)
