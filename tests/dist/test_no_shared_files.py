"""Runs whose workers share no file system with the coordinator: every worker has a mount namespace of its own.

In it, an empty directory hides the run directory, the checkpoints and the corpus. Skipped where this process may not
mount.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from elastic_moe.config.schema import TrainConfig
from elastic_moe.runtime.places import copies_dir
from tests.local_run import LocalRun, tiny_config
from tests.patience import until
from tests.processes import start

CORPUS = Path(__file__).resolve().parents[2] / "elastic_moe" / "plan" / "split" / "split.py"
CLONE_NEWNS = 0x00020000
RTOL = 1e-5
pytestmark = pytest.mark.timeout(600)


def hide(*directories: Path) -> None:
    """Give this process empty directories in the place of these."""
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "no mount namespace")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True, capture_output=True)
    for directory in directories:
        directory.mkdir(parents=True, exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "none", directory], check=True, capture_output=True)


def _try(path: Path) -> None:
    hide(path)


@pytest.fixture(scope="module", autouse=True)
def possible(tmp_path_factory: pytest.TempPathFactory) -> None:
    process = start(_try, tmp_path_factory.mktemp("try"), name="try")
    process.join(60)
    if process.exitcode != 0:
        pytest.skip("needs root and mount namespaces")


def _work_apart(config: TrainConfig, address: tuple[str, int], prepared: Any, worker: str, node: str) -> None:
    """A worker of a node that shares nothing; workers of node "here" see everything."""
    if node != "here":
        hide(Path(config.run.dir).parent, copies_dir())
    assert Path(config.run.dir).is_dir() == (node == "here")
    LocalRun.work(config, address, prepared, worker, node)


class ApartRun(LocalRun):
    work = staticmethod(_work_apart)


def config_of(path: Path, **run: Any) -> TrainConfig:
    config = tiny_config(path / "run", CORPUS, max_workers=4, reproducible=True)
    return replace(config, run=replace(config.run, **run), optim=replace(config.optim, schedule="constant"))


def test_nodes_that_share_no_files_train_save_and_resume(tmp_path: Path) -> None:
    """With a kill, a join and a resume: every loss is that of a run that sees its files, and no step is made twice."""
    with LocalRun(config_of(tmp_path / "base", steps=60), 1) as base:
        base.wait_end()
        expected = base.losses()
    config = config_of(tmp_path / "apart", steps=60)
    with ApartRun(replace(config, run=replace(config.run, steps=30)), 3) as run:
        run.wait_step(12)
        run.signal("w1", signal.SIGKILL)
        run.wait("the view of two", lambda s: s["world_size"] == 2 and s["entered"])
        run.coordinator.submit({"event": "pause"})  # or a slow machine ends the run before the joiner is there
        run.wait("a pause", lambda s: s["phase"] == "waiting")
        run.add("n7")
        until(lambda: len([e for e in run.events() if e["event"] == "files_served"]) == 4, "files of the joiner")
        run.coordinator.submit({"event": "resume"})
        run.wait_end()
        events = run.events()
        served = [e for e in events if e["event"] == "files_served"]
        assert len(served) == 4
        assert all("does not see checkpoint.dir and the corpus" in e["reason"] for e in served)
        logs = "".join(path.read_text() for path in (run.dir / "logs").iterdir())
        assert all(f"starts on node {node}" in logs for node in ("n0", "n1", "n2", "n7"))
        assert {10, 20, 30} <= {e["step"] for e in events if e["event"] == "checkpoint"}
        assert all(e["lost_steps"] == 0 for e in events if e["event"] == "entered")
    with ApartRun(config, 2) as resumed:
        resumed.wait_end()
        assert resumed.losses() == expected
        assert [e["source"] for e in resumed.events() if e["event"] == "entered"][-1] == "checkpoint"


def test_a_node_that_sees_the_files_uses_them(tmp_path: Path) -> None:
    """Nodes of both kinds write one checkpoint together, and the coordinator's death does not end a copy or a save."""
    config = config_of(tmp_path / "mixed", steps=20)
    with ApartRun(config, 0) as run:
        run.add("here")
        run.add("n1")
        run.wait_end()
        assert len([e for e in run.events() if e["event"] == "files_served"]) == 1
        assert {10, 20} <= {e["step"] for e in run.events() if e["event"] == "checkpoint"}
    assert not os.listdir(copies_dir()) or all("corpus" in name for name in os.listdir(copies_dir()))
