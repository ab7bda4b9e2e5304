"""Sweeps with `hydra/launcher=elastic`: trials side by side on one cluster, with deaths, reruns and early stopping."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from elastic_moe.metrics.jsonl import read_jsonl
from tests.patience import until

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 400.0
Start = Callable[..., "subprocess.Popen[bytes]"]
pytestmark = [pytest.mark.timeout(1800), pytest.mark.long]


@pytest.fixture
def sweep(head: Any, tiny: list[str], tmp_path: Path) -> Iterator[Start]:
    """Starts a sweep on the cluster; its log is `NAME.log`, and its directory `run`."""
    started: list[subprocess.Popen[bytes]] = []

    def begin(name: str, *more: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "elastic_moe.train", "-m", "hydra/launcher=elastic", "cluster=address"]
        command += [f"cluster.address={head.address}", *tiny, *more]
        env = head.env | {"OMP_NUM_THREADS": "1"}
        with (tmp_path / f"{name}.log").open("w") as log:
            started.append(subprocess.Popen(command, env=env, cwd=ROOT, stdout=log, stderr=log))
        return started[-1]

    yield begin
    for launcher in started:
        launcher.kill()
        launcher.wait()


def steps(run: Path) -> list[int]:
    return [int(record["step"]) for record in read_jsonl(run / "metrics.jsonl")]


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "sweep.csv").open() as file:
        return list(csv.DictReader(file))


def driver_of(launcher: subprocess.Popen[bytes], trial: int) -> psutil.Process | None:
    """The process of a trial, by the file that it was given."""
    for process in psutil.Process(launcher.pid).children():
        with suppress(psutil.Error):
            if any(word.endswith(f"/{trial}.job") for word in process.cmdline()):
                return process
    return None


def span(run: Path) -> tuple[float, float]:
    """Wall clock of the first and of the last record."""
    records = read_jsonl(run / "metrics.jsonl")
    return float(records[0]["time"]), float(records[-1]["time"])


def test_trials_share_a_cluster_and_a_rerun_passes_over_what_is_finished(
    head: Any, tmp_path: Path, sweep: Start
) -> None:
    """Three trials on room for two workers. The driver of one is killed: it is started again, and loses no step."""
    head.start("--num-cpus=2")
    run = tmp_path / "run"
    more = ["seed=0,1,2", "cluster.workers=2", "run.steps=60", "checkpoint.every_steps=5"]
    launcher = sweep("first", *more)
    until(lambda: (run / "0").exists() and len(steps(run / "0")) > 10, "steps of the first trial", PATIENCE_S)
    driver = driver_of(launcher, 0)
    assert driver is not None
    driver.kill()
    log = tmp_path / "first.log"
    assert launcher.wait(PATIENCE_S * 2) == 0, log.read_text()
    rows = table(run)
    assert [row["state"] for row in rows] == ["finished"] * 3, log.read_text()
    assert int(rows[0]["starts"]) == 2
    assert all(float(row["val_loss"]) > 0 for row in rows)
    for trial in range(3):
        assert steps(run / str(trial)) == list(range(1, 61)), "no step is lost, and none is done twice"
    assert span(run / "1")[0] < span(run / "0")[1], "they train side by side"
    again = sweep("again", *more)
    assert again.wait(PATIENCE_S) == 0
    assert (tmp_path / "again.log").read_text().count("is passed over") == 3
    other = sweep("other", *more, "optim.lr=0.5")
    assert other.wait(PATIENCE_S) == 2
    assert "holds another trial than this one (optim.lr: 0.002 -> 0.5)" in (tmp_path / "other.log").read_text()


def test_six_trials_survive_the_loss_of_a_worker_and_of_a_node(head: Any, tmp_path: Path, sweep: Start) -> None:
    """Two nodes with room for two workers each. The workers of the lost node come back when a node does."""
    head.start("--num-cpus=0")
    for name in ("a", "b"):
        _node(head, name)
    run = tmp_path / "run"
    launcher = sweep("six", "seed=0,1,2,3,4,5", "cluster.workers=4", "run.steps=200", "checkpoint.every_steps=10")
    log = tmp_path / "six.log"
    until(lambda: sum(len(steps(run / str(n))) > 5 for n in range(6) if (run / str(n)).exists()) >= 3, "3", PATIENCE_S)
    members = [event for n in range(4) for event in read_jsonl(run / str(n) / "events.jsonl") if event.get("pid")]
    os.kill(next(int(e["pid"]) for e in members if psutil.pid_exists(int(e["pid"]))), signal.SIGKILL)
    _kill_node(head, "b")
    until(lambda: any(len(steps(run / str(n))) > 60 for n in range(6) if (run / str(n)).exists()), "60", PATIENCE_S)
    _node(head, "c")
    assert launcher.wait(PATIENCE_S * 3) == 0, log.read_text()
    assert [row["state"] for row in table(run)] == ["finished"] * 6, log.read_text()
    for trial in range(6):
        assert steps(run / str(trial)) == list(range(1, 201))


def _node(head: Any, name: str) -> None:
    done = head.call("ray", "start", f"--address={head.address}", "--num-cpus=2", f"--node-name={name}")
    assert done.returncode == 0, done.stdout + done.stderr


def _kill_node(head: Any, name: str) -> None:
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            words = process.cmdline()
            if words and words[0].endswith("/raylet") and f"--node-name={name}" in words:
                found.append(process)
    assert found, f"there is no node {name}"
    for process in found:
        process.kill()


def test_a_sweep_that_is_stopped_saves_and_goes_on(head: Any, tmp_path: Path, sweep: Start) -> None:
    """SIGTERM to the launcher: each trial saves, the exit code says so, and the same command goes on."""
    head.start("--num-cpus=2")
    run = tmp_path / "run"
    more = ["seed=0,1", "cluster.workers=1", "run.steps=400", "checkpoint.every_steps=0"]
    launcher = sweep("first", *more)
    until(lambda: all((run / t).exists() and len(steps(run / t)) > 5 for t in ("0", "1")), "steps", PATIENCE_S)
    launcher.terminate()
    assert launcher.wait(PATIENCE_S) == 128 + signal.SIGTERM
    records = [json.loads((run / trial / "trial.json").read_text()) for trial in ("0", "1")]
    assert [record["state"] for record in records] == ["interrupted"] * 2
    assert sweep("again", *more).wait(PATIENCE_S * 2) == 0
    for trial in ("0", "1"):
        assert steps(run / trial) == list(range(1, 401)), "no step is done twice"


def test_optuna_with_successive_halving(head: Any, tmp_path: Path, sweep: Start) -> None:
    """Eight trials in two batches. One whose learning rate is hopeless ends at a rung; the best trial is not ended."""
    pytest.importorskip("optuna")
    head.start("--num-cpus=4")
    run = tmp_path / "run"
    optuna = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=8", "hydra.sweeper.n_jobs=4"]
    optuna += ["hydra.sweeper.direction=minimize", "hydra.sweeper.sampler.seed=1"]
    asha = ["sweep.early_stopping=asha", "sweep.rung_steps=20", "sweep.rung_factor=2", "run.eval_every_steps=10"]
    more = [*optuna, *asha, "cluster.workers=1", "run.steps=120", "optim.lr=tag(log,interval(1e-5,1e-1))"]
    assert sweep("optuna", *more).wait(PATIENCE_S * 3) == 0, (tmp_path / "optuna.log").read_text()
    rows = table(run)
    states = {row["state"] for row in rows}
    assert len(rows) == 8
    assert states == {"finished", "stopped early"}, (tmp_path / "optuna.log").read_text()
    best = min(rows, key=lambda row: float(row["val_loss"]))
    assert best["state"] == "finished"
    assert "best_value" in (run / "optimization_results.yaml").read_text()
    assert sweep("again", *more).wait(PATIENCE_S) == 0
    assert (tmp_path / "again.log").read_text().count("is passed over") == 8, "the seed proposes the same trials"
