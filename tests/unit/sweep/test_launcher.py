"""Hydra's own test suites for launchers, with any program as the job; nothing starts Ray."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import ray  # noqa: F401 - it sets an environment variable as it is imported
from hydra.core.plugins import Plugins
from hydra.core.utils import JobStatus
from hydra.plugins.launcher import Launcher
from hydra.test_utils.launcher_common_tests import BatchedSweeperTestSuite, IntegrationTestSuite, LauncherTestSuite

from elastic_moe.sweep.register import FOLDER, register

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    register()
    monkeypatch.setenv("PYTHONPATH", f"{FOLDER}{os.pathsep}{Path(__file__).resolve().parents[3]}")


def test_it_is_found() -> None:
    assert "ElasticLauncher" in [plugin.__name__ for plugin in Plugins.instance().discover(Launcher)]


@pytest.mark.long
@pytest.mark.parametrize(("launcher_name", "overrides"), [("elastic", [])])
class TestLauncher(LauncherTestSuite):
    """Jobs in one batch."""


@pytest.mark.long
@pytest.mark.parametrize(("launcher_name", "overrides"), [("elastic", ["hydra.sweeper.max_batch_size=2"])])
class TestBatches(BatchedSweeperTestSuite):
    """Jobs in several batches."""


@pytest.mark.long
@pytest.mark.parametrize(
    ("task_launcher_cfg", "extra_flags"),
    [({}, ["-m", "hydra/launcher=elastic"])],
)
class TestIntegration(IntegrationTestSuite):
    """Programs of their own."""


def task(config: Any) -> int:
    """Fails in as many ways as `a` names."""
    if config.a == 1:
        raise ValueError("one")
    if config.a == 2:
        os.kill(os.getpid(), 9)
    return 7


def test_a_crash_of_one_job_loses_no_other(hydra_sweep_runner: Any, tmp_path: Path) -> None:
    """The results are in the order of the jobs, whatever became of each."""
    found: list[Any] = []
    sweep = hydra_sweep_runner(
        calling_file=None,
        calling_module="hydra.test_utils.a_module",
        task_function=task,
        config_path="configs",
        config_name="compose.yaml",
        overrides=["hydra/launcher=elastic", "+a=0,1,2,3"],
        temp_dir=tmp_path,
    )
    launcher = next(p for p in Plugins.instance().discover(Launcher) if p.__name__ == "ElasticLauncher")
    launch = launcher.launch

    def kept(self: Any, *arguments: Any, **named: Any) -> Any:
        found.extend(launch(self, *arguments, **named))
        return found

    launcher.launch = kept
    try:
        with pytest.raises(ValueError, match="one"), sweep:
            pass
    finally:
        launcher.launch = launch
    assert [job.status for job in found] == [
        JobStatus.COMPLETED,
        JobStatus.FAILED,
        JobStatus.FAILED,
        JobStatus.COMPLETED,
    ]
    assert found[0].return_value == found[3].return_value == 7
    with pytest.raises(RuntimeError, match="exit code 137"):
        _ = found[2].return_value
