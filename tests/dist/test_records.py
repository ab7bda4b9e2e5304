"""The records of a real run are the declared ones (`LocalRun` checks that), the keys of special models among them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.dist.test_runtime import CORPUS, with_steps
from tests.local_run import LocalRun, tiny_config

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
