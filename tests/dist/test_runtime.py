"""Runs of real worker processes under real signals: each disturbed run has the losses of an undisturbed one."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path

import pytest

from elastic_moe.config.schema import TrainConfig
from tests.local_run import LocalRun, tiny_config

RTOL, PATIENCE_S = 1e-5, 120.0
CORPUS = Path(__file__).resolve().parents[2] / "elastic_moe" / "plan" / "split" / "split.py"
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of 160 steps of one worker that nothing disturbs."""
    config = tiny_config(tmp_path_factory.mktemp("base") / "run", CORPUS)
    with LocalRun(with_steps(config, 160), 1) as run:
        run.wait_end()
        return run.losses()


def with_steps(config: TrainConfig, steps: int) -> TrainConfig:
    # one schedule for all runs: the learning rate must not depend on how long a test runs
    return replace(config, run=replace(config.run, steps=steps), optim=replace(config.optim, schedule="constant"))


def assert_same(losses: list[float], expected: list[float]) -> None:
    assert losses == pytest.approx(expected[: len(losses)], rel=RTOL)


@pytest.mark.parametrize("workers", [2, 3, 5, 7])
def test_world_size_does_not_change_the_losses(tmp_path: Path, undisturbed: list[float], workers: int) -> None:
    with LocalRun(with_steps(tiny_config(tmp_path / "run", CORPUS), 12), workers, nodes=2) as run:
        assert run.wait_end()["world_size"] == workers
        assert_same(run.losses(), undisturbed)


def test_kills_joins_and_leaves(tmp_path: Path, undisturbed: list[float]) -> None:
    config = with_steps(tiny_config(tmp_path / "run", CORPUS, max_workers=6), 160)
    with LocalRun(config, 4, nodes=3) as run:
        survivor = run.processes["w3"].pid
        run.add(), run.add(), run.add()
        run.wait_step(8)
        run.signal("w1", signal.SIGKILL)
        run.wait_step(16)
        run.signal("w0", signal.SIGKILL)
        run.wait(
            "5 workers without the dead ones",
            lambda s: s["world_size"] == 5 and s["entered"] and not {"w0", "w1"} & {m[0] for m in s["members"]},
        )
        run.coordinator.submit({"event": "drain", "worker": "w2"})
        run.wait("4 workers", lambda s: s["world_size"] == 4 and s["entered"])
        run.signal("w4", signal.SIGKILL)
        run.wait_end()
        assert_same(run.losses(), undisturbed)
        entered = [e for e in run.events() if e["event"] == "entered"]
        assert [e["lost_steps"] for e in entered] == [0] * len(entered)
        assert run.processes["w3"].pid == survivor
        assert len(entered) >= 5


def test_a_worker_that_comes_too_late_or_to_a_node_that_drains_ends_at_once(tmp_path: Path) -> None:
    """It is released and not registered. Without an answer it would wait for `elastic.hold_s`, and then fail."""
    config = with_steps(tiny_config(tmp_path / "run", CORPUS, hold_s=1000.0), 100_000)
    with LocalRun(config, 2) as run:
        run.wait_step(2)
        run.coordinator.submit({"event": "drain", "node": "gone", "deadline_s": 900.0})
        turned_away = run.processes[run.add("gone")]
        turned_away.join(PATIENCE_S)
        run.coordinator.submit({"event": "stop", "reason": "enough"})
        run.wait_end()
        late = run.processes[run.add()]
        late.join(PATIENCE_S)
        assert (turned_away.exitcode, late.exitcode) == (0, 0)


PHASES = ("compute", "reduce", "mirror", "vote", "apply", "publish", "committed")


@pytest.mark.parametrize(
    ("phase", "copies"), [*((phase, "1") for phase in PHASES), *((phase, "node") for phase in PHASES[:2])]
)
def test_death_in_every_phase(tmp_path: Path, undisturbed: list[float], phase: str, copies: str) -> None:
    """On four nodes, or on two whose workers are in groups of their own."""
    config = with_steps(tiny_config(tmp_path / "run", CORPUS), 24)
    config.faults.inject = [f"1:8:{phase}", f"0:16:{phase}"]
    config.balance.copies = copies
    with LocalRun(config, 4, nodes=2 if copies == "node" else 4) as run:
        run.wait_end()
        assert len(list((run.dir / "faults").iterdir())) == 2
        assert_same(run.losses(), undisturbed)
        assert all(e["lost_steps"] == 0 for e in run.events() if e["event"] == "entered")
        assert run.records()[-1]["world_size"] == 2


@pytest.mark.parametrize("phase", ["transfer", "confirm"])
def test_second_death_during_the_repair_of_the_first(tmp_path: Path, undisturbed: list[float], phase: str) -> None:
    config = with_steps(tiny_config(tmp_path / "run", CORPUS, redundancy=2), 30)
    config.faults.inject = ["1:10:reduce", f"0:10:{phase}"]
    with LocalRun(config, 4, nodes=4) as run:
        run.wait_end()
        assert len(list((run.dir / "faults").iterdir())) == 2
        assert_same(run.losses(), undisturbed)
        assert all(e["lost_steps"] == 0 for e in run.events() if e["event"] == "entered")


def test_stopped_worker_is_removed_and_comes_back_with_its_state(tmp_path: Path, undisturbed: list[float]) -> None:
    config = with_steps(tiny_config(tmp_path / "run", CORPUS), 100_000)
    config.elastic.heartbeat_timeout_s = 3.0
    with LocalRun(config, 3) as run:
        run.wait_step(10)
        run.signal("w1", signal.SIGSTOP)
        run.wait("eviction", lambda s: s["world_size"] == 2)
        run.signal("w1", signal.SIGCONT)
        back = run.wait("its return", lambda s: s["world_size"] == 3 and s["entered"])
        run.wait_step(back["step"] + 10)
        run.coordinator.submit({"event": "stop", "reason": "enough"})
        run.wait_end()
        assert [e["worker"] for e in run.events() if e["event"] == "worker_readmitted"] == ["w1"]
        assert all(e["lost_steps"] == 0 for e in run.events() if e["event"] == "entered")
        assert_same(run.losses()[: len(undisturbed)], undisturbed)
        assert [e["worker"] for e in run.events() if e["event"] == "worker_evicted"] == ["w1"]


def test_waits_below_min_workers(tmp_path: Path, undisturbed: list[float]) -> None:
    config = with_steps(tiny_config(tmp_path / "run", CORPUS, min_workers=2), 40)
    with LocalRun(config, 2) as run:
        run.wait_step(10)
        run.signal("w0", signal.SIGKILL)
        run.wait("the hold", lambda s: s["phase"] == "waiting")
        run.add()
        run.wait_end()
        assert_same(run.losses(), undisturbed)


def test_falls_back_to_the_checkpoint_when_no_holder_lives(tmp_path: Path, undisturbed: list[float]) -> None:
    config = with_steps(tiny_config(tmp_path / "run", CORPUS, redundancy=0), 40)
    config.faults.inject = ["1:28:compute"]
    with LocalRun(config, 3) as run:
        run.wait_end()
        fallback = [e for e in run.events() if e["event"] == "entered"][1]
        assert fallback["source"] == "checkpoint"
        assert fallback["lost_steps"] == 27 - fallback["step"] > 0
        assert_same(run.losses(), undisturbed)


def test_resumes_at_another_world_size(tmp_path: Path, undisturbed: list[float]) -> None:
    config = tiny_config(tmp_path / "run", CORPUS)
    with LocalRun(with_steps(config, 20), 3) as run:
        run.wait_end()
    with LocalRun(with_steps(config, 40), 2) as run:
        run.wait_end()
        assert_same(run.losses(), undisturbed)
        assert len(run.losses()) == 40
        entered = [e for e in run.events() if e["event"] == "entered"]
        assert [e["source"] for e in entered] == ["initialisation", "checkpoint"]


def test_all_stopped_at_once_lose_nothing(tmp_path: Path, undisturbed: list[float]) -> None:
    """As when a machine sleeps: longer than the time after which a single silent worker is removed."""
    config = with_steps(tiny_config(tmp_path / "run", CORPUS), 60)
    config.elastic.heartbeat_timeout_s = 2.0
    with LocalRun(config, 3) as run:
        run.wait_step(10)
        for worker in ("w0", "w1", "w2"):
            run.signal(worker, signal.SIGSTOP)
        run.wait("doubt", lambda _: any(e["event"] == "members_in_doubt" for e in run.events()))
        for worker in ("w0", "w1", "w2"):
            run.signal(worker, signal.SIGCONT)
        run.wait_end()
        assert_same(run.losses(), undisturbed)
        assert not any(e["event"] == "worker_evicted" for e in run.events())
        assert all(e["lost_steps"] == 0 for e in run.events() if e["event"] == "entered")
