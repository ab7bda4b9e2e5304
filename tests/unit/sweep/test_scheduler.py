"""The scheduler of a sweep in virtual time: whatever the cluster loses, every trial comes to its end.

Processes, clock and cluster are simulated here, so that a thousand seconds cost none. `tests/ray/test_sweeps.py` has
the real ones.
"""

from __future__ import annotations

import random
import signal
from pathlib import Path
from typing import Any

import pytest
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig

from elastic_moe.config.build import build
from elastic_moe.config.schema import ClusterConfig, SweepConfig
from elastic_moe.sweep import scheduler as module
from elastic_moe.sweep.gains import Gains
from elastic_moe.sweep.scheduler import Scheduler, Shared
from elastic_moe.sweep.trial import TrialRecord
from elastic_moe.sweep.trials import Trial

STEPS, STARTING_S, SAVING_S, LIMIT_S = 100, 15.0, 4.0, 5000.0


class World:
    """Clock, cluster and processes. A trial makes a step a second for each worker that the cluster has for it.

    Args:
        capacities: (since when, workers that there is room for).
        useful: more workers of one trial than this make nothing faster.
    """

    def __init__(self, rng: random.Random, capacities: list[tuple[float, int]], useful: int = 1 << 20) -> None:
        self.rng, self.now_s, self._capacities, self.useful = rng, 0.0, capacities, useful
        self.processes: list[Process] = []
        self.made: dict[int, float] = {}  # trial -> step

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds
        assert self.now_s < LIMIT_S, "the sweep does not end"
        room = self.capacity
        for process in self.processes:
            process.train(seconds, min(room, process.trial.allowed))
            room -= min(room, process.trial.allowed)

    @property
    def used(self) -> int:
        return sum(process.trial.allowed for process in self.processes if self.now_s >= process.ready_s)

    @property
    def capacity(self) -> int:
        return [workers for since_s, workers in self._capacities if since_s <= self.now_s][-1]


class Process:
    """A driver: it starts, makes steps, and saves when it is asked to end. Some die."""

    def __init__(self, world: World, trial: Trial, step: float) -> None:
        self.world, self.trial, self.step = world, trial, step
        self.ready_s = world.now_s + STARTING_S
        self.ends_s = float("inf")
        self.dies = world.rng.random() < 0.1
        world.processes.append(self)

    def train(self, seconds: float, workers: int) -> None:
        if self.world.now_s >= self.ready_s and self.ends_s == float("inf"):
            speed = min(workers, self.world.useful)
            self.step = min(STEPS, self.step + seconds * speed)
            training = {
                "world_size": workers,
                "workers": workers,
                "step": int(self.step),
                "tokens_per_s": 100.0 * speed,
            }
            self.trial.status = training if int(self.step) else {}
            if self.step >= STEPS or (self.dies and self.step > STEPS / 2):
                self.ends_s = self.world.now_s
        self.world.made[self.trial.number] = self.step

    def ask_to_stop(self) -> None:
        self.ends_s = min(self.ends_s, self.world.now_s + SAVING_S)

    def code(self) -> int | None:
        if self.world.now_s < self.ends_s:
            return None
        if self in self.world.processes:
            self.world.processes.remove(self)
        return -signal.SIGKILL if self.dies and self.step < STEPS else 0

    def result(self) -> JobReturn | None:
        if self.dies and self.step < STEPS:
            return None
        returned = JobReturn(status=JobStatus.COMPLETED)
        returned.return_value = None
        return returned

    def end(self, patience_s: float) -> None:
        pass


def run(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, trials: int, max_workers: int, min_gain: float = 0.2
) -> tuple[list[Trial], list[str]]:
    """Run a sweep. Returns its trials and what it told."""
    config = build({"cluster": {"workers": max_workers}, "run": {"steps": STEPS}})

    def start(trial: Trial, *_: Any) -> None:
        trial.ends_early, trial.status = "", {}
        trial.process = Process(world, trial, world.made.get(trial.number, 0.0))  # type: ignore[assignment]

    monkeypatch.setattr(Trial, "start", start)
    monkeypatch.setattr(Trial, "poll", lambda _: None)
    monkeypatch.setattr(Trial, "ask_to_stop", lambda trial, _: trial.process.ask_to_stop())
    monkeypatch.setattr(Trial, "returns", lambda _, status, value: JobReturn(status=status, _return_value=value))
    monkeypatch.setattr(module, "time", world)
    monkeypatch.setattr(module, "room", lambda _: (world.capacity, max(0, world.capacity - world.used)))
    monkeypatch.setattr(module, "objectives", lambda *_: [])
    monkeypatch.setattr(module, "last_step", lambda run_dir: int(world.made.get(int(run_dir.name), 0)))
    batch = [Trial(DictConfig({}), tmp_path / str(n), config, TrialRecord(n, [f"seed={n}"])) for n in range(trials)]
    told: list[str] = []
    shared = Shared(ClusterConfig(), SweepConfig(), "")
    assert Scheduler(batch, shared, None, Gains(min_gain), {}, tmp_path, told.append).run() == 0
    return batch, told


def test_a_trial_that_gave_way_trains_again_when_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four trials with a worker each; half of the cluster is lost for a while."""
    world = World(random.Random(4), [(0, 4), (40, 2), (300, 4)])
    trials, told = run(world, monkeypatch, tmp_path, trials=4, max_workers=1)
    assert sum("gives way" in line for line in told) == 2
    assert sum("waits after step" in line for line in told) == 2
    assert sum(", again after step" in line for line in told) >= 2
    assert [trial.record.state for trial in trials] == ["finished"] * 4


@pytest.mark.parametrize("seed", range(40))
def test_every_trial_ends_whatever_the_cluster_loses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    rng = random.Random(seed)
    changes = sorted(rng.uniform(0, 600) for _ in range(rng.randint(1, 12)))
    capacities = [(0.0, 4), *((since_s, rng.randint(0, 6)) for since_s in changes), (700.0, rng.randint(1, 4))]
    trials, told = run(World(rng, capacities), monkeypatch, tmp_path, rng.randint(1, 8), rng.randint(1, 4))
    assert [trial.record.state for trial in trials] == ["finished"] * len(trials), told
    assert [trial.record.step for trial in trials] == [STEPS] * len(trials)


def moves(told: list[str]) -> list[str]:
    return [line for line in told if " -> " in line]


def test_workers_that_make_nothing_faster_are_given_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six trials on four workers: the first that may grow shows that it does not pay, and no other one grows."""
    world = World(random.Random(4), [(0, 4)], useful=1)
    trials, told = run(world, monkeypatch, tmp_path, trials=6, max_workers=4)
    assert [trial.record.state for trial in trials] == ["finished"] * 6
    grown = [line for line in moves(told) if not line.endswith(" 1 workers")]
    assert len({line.split(":")[0] for line in grown}) <= 2, told  # the two that train at the end may grow together
    assert sum("at most (sweep.min_gain=0.2)" in line for line in told) == 1, told
    assert moves(told)[-1].endswith(" -> 1 workers")


def test_workers_that_make_a_trial_faster_stay_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    took_s = []
    for min_gain in (0.0, 0.2):
        world = World(random.Random(4), [(0, 4)])
        trials, told = run(world, monkeypatch, tmp_path, trials=5, max_workers=4, min_gain=min_gain)
        assert [trial.record.state for trial in trials] == ["finished"] * 5
        assert not [line for line in told if "sweep.min_gain" in line]
        assert any(line.endswith(" 4 workers") for line in told), told
        took_s.append(world.now_s)
    assert took_s[1] <= took_s[0] + 15, "to measure costs seconds"
