"""The records of a real run are the declared ones (`LocalRun` checks that), the keys of special models among them."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from elastic_moe.config.schema import TrainConfig
from elastic_moe.coordination.coordinator import RunCoordinator
from elastic_moe.data.prepare import Prepared
from tests.dist.test_runtime import CORPUS, with_steps
from tests.local_run import WAIT_S, LocalRun, tiny_config

pytestmark = pytest.mark.timeout(240)


def test_streams_and_multi_token_prediction_have_keys_of_their_own(tmp_path: Path) -> None:
    config = with_steps(tiny_config(tmp_path / "run", CORPUS), 3)
    config = replace(config, model=replace(config.model, residual="mhc", mtp_depth=1))
    with LocalRun(config, 2) as run:
        run.wait_end()
    for record in run.records():
        assert {"gain_forward", "gain_backward", "gain_backward_min", "mtp_loss"} <= set(record)
        assert record["gain_forward"] > 0
        assert record["mtp_loss"] > 0


def test_an_undeclared_key_is_noticed(tmp_path: Path) -> None:
    config = with_steps(tiny_config(tmp_path / "run", CORPUS), 3)
    run = LocalRun(config, 1)
    run.wait_end()
    (run.dir / "metrics.jsonl").open("a").write('{"step": 4, "invented": 1}\n')
    with pytest.raises(AssertionError, match="invented"):
        run.__exit__(None, None, None)


ADDRESS, STEPS = "coordinator", "steps of "  # files in the run directory


def _work_on(config: TrainConfig, _: object, prepared: Prepared, worker: str, node: str) -> None:
    """A worker that reads the coordinator's address from a file, and writes into another how far it has come."""
    from elastic_moe.runtime.local_state import LocalState
    from elastic_moe.runtime.worker import run_worker

    run_dir, commit = Path(config.run.dir), LocalState.commit

    def noted_commit(self: LocalState, vote: object) -> None:
        commit(self, vote)  # type: ignore[arg-type]
        (run_dir / (STEPS + worker)).write_text(str(self.committed))

    LocalState.commit = noted_commit  # type: ignore[method-assign]

    def find() -> tuple[str, int] | None:
        try:
            host, port = (run_dir / ADDRESS).read_text().split()
        except (OSError, ValueError):
            return None
        return host, int(port)

    run_worker(config, find, "secret", node, prepared, worker)


class _RunOfTwoCoordinators(LocalRun):
    """A run whose coordinator can be away."""

    work = staticmethod(_work_on)

    def publish_address(self) -> None:
        host, port = self.coordinator.address
        (self.dir / ADDRESS).write_text(f"{host} {port}")

    def end_coordinator(self) -> None:
        (self.dir / ADDRESS).unlink()
        self.coordinator.close()

    def start_coordinator(self) -> None:
        self.coordinator = RunCoordinator(self.config, "secret", len(self.processes), restarted=True)
        self.publish_address()

    def committed(self, worker: str) -> int:
        try:
            return int((self.dir / (STEPS + worker)).read_text() or 0)
        except OSError:
            return 0


def _until(holds: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < deadline_s, f"waited in vain for {what}"
        threading.Event().wait(0.02)


def test_no_record_is_lost_with_the_first_rank_while_the_coordinator_is_away(tmp_path: Path) -> None:
    """The coordinator is away for 40 steps, the first rank dies, and others tell the next coordinator all records."""
    config = with_steps(tiny_config(tmp_path / "run", CORPUS), 70)
    config = replace(config, checkpoint=replace(config.checkpoint, every_steps=0))
    with _RunOfTwoCoordinators(config, 3) as run:
        run.publish_address()
        run.wait_step(5)
        first = str(run.coordinator.status()["members"][0][0])
        run.end_coordinator()
        recorded = run.records()[-1]["step"]
        _until(lambda: run.committed(first) >= recorded + 40, "40 steps without a coordinator")
        assert run.records()[-1]["step"] == recorded
        run.signal(first, signal.SIGKILL)
        run.processes[first].join(WAIT_S)
        run.start_coordinator()
        run.coordinator.submit({"event": "worker_lost", "worker": first, "reason": "killed"})
        run.wait_end()
        assert [record["step"] for record in run.records()] == list(range(1, 71))
        assert {record["world_size"] for record in run.records()} == {3, 2}
        assert not [event for event in run.events() if event["event"] == "records_dropped"]
