"""Loss curves of small runs are those of the committed file: twelve steps on two workers, real processes, without Ray.

The curves were made once, by the code before a large refactoring. Rounding differs between kinds of processors, so they
agree to 1e-4, not to the bit; a change of the mathematics shows in the first steps.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from elastic_moe.config.schema import TrainConfig
from tests.dist.test_equality import deepseek, default_scale
from tests.dist.test_runtime import with_steps
from tests.local_run import LocalRun, tiny_config

HERE = Path(__file__).parent / "losses"
CURVES = json.loads((HERE / "two_workers.json").read_text())


def _config(name: str, run_dir: Path) -> TrainConfig:
    steps = len(CURVES[name]["losses"])
    config = tiny_config(run_dir, HERE / "corpus.txt", reproducible=name == "deepseek")
    if name == "deepseek":
        return deepseek(default_scale(with_steps(config, steps)))
    return replace(config, run=replace(config.run, steps=steps))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", sorted(CURVES))
def test_the_losses_are_those_of_the_committed_curve(tmp_path: Path, name: str) -> None:
    with LocalRun(_config(name, tmp_path / "run"), 2) as run:
        run.wait_end()
        assert run.losses() == pytest.approx(CURVES[name]["losses"], rel=1e-4)
        assert [r["grad_norm"] for r in run.records()] == pytest.approx(CURVES[name]["grad_norms"], rel=1e-3)
