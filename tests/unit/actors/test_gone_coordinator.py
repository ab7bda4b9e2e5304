"""A driver ends when Ray has known no coordinator for as long as workers wait for one, and not before."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from elastic_moe.actors import driver
from elastic_moe.actors.stop import Stop
from elastic_moe.config.schema import ElasticConfig, RunConfig, TrainConfig
from elastic_moe.run_log import TEXT, RunLog


def test_a_coordinator_is_waited_for_as_long_as_workers_wait(tmp_path: Path) -> None:
    config = TrainConfig(run=RunConfig(dir=str(tmp_path)), elastic=ElasticConfig(hold_s=100.0))
    run = driver._Driver("name", config, cast(Any, None), Stop(), (), RunLog(TEXT, "run"))

    def gone(is_gone: bool, silent_s: float) -> str:
        return str(run._gone(cast(Any, SimpleNamespace(is_gone=is_gone, silent_s=silent_s))) or "")

    assert gone(True, 99.0) == ""
    assert gone(False, 101.0) == "", "one that is restarting, or busy"
    assert gone(True, 101.0) == "the run's coordinator is gone, and was not started again in 101 s"
