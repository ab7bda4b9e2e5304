"""A worker whose GPU is lost when a collective fails: it leaves with CUDA's words, and the others go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from elastic_moe.data.prepare import Prepared
from tests.dist.test_runtime import CORPUS, with_steps
from tests.local_run import LocalRun, _work, tiny_config

pytestmark = pytest.mark.timeout(600)
WORDS = "CUDA error: an illegal memory access was encountered"


def _losing(config: Any, address: Any, prepared: Prepared, worker: str, node: str) -> None:
    """A worker; the first one that loses a peer finds its GPU lost too."""
    from elastic_moe.runtime.worker import Worker

    def check(self: Worker) -> None:
        try:
            (Path(config.run.dir) / "lost").touch(exist_ok=False)
        except FileExistsError:
            return
        raise RuntimeError(WORDS)

    Worker._check_gpu = check  # type: ignore[method-assign]
    _work(config, address, prepared, worker, node)


class LosingRun(LocalRun):
    work = staticmethod(_losing)


def test_a_worker_without_its_gpu_leaves_and_the_others_go_on(tmp_path: Path) -> None:
    config = with_steps(tiny_config(tmp_path / "run", CORPUS, redundancy=2), 16)
    config.faults.inject = ["0:8:reduce"]
    with LosingRun(config, 4, nodes=4) as run:
        assert run.wait_end()["world_size"] == 2
        lost = [event["reason"] for event in run.events() if event["event"] == "worker_lost"]
        assert sorted(WORDS in reason for reason in lost) == [False, True], lost
        assert [event["lost_steps"] for event in run.events() if event["event"] == "entered"][-1] == 0
        assert len(run.losses()) == 16
