"""`elastic_moe.Run` on the directory of a real run that an older version left behind, and on damaged ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import elastic_moe
from elastic_moe.metrics.jsonl import read_jsonl
from elastic_moe.run_dir import LIVE

OLD = Path(__file__).resolve().parents[2] / "data" / "old_run" / "run"


@pytest.fixture
def run(tmp_path: Path) -> elastic_moe.Run:
    shutil.copytree(OLD, tmp_path / "run")
    return elastic_moe.Run(tmp_path / "run")


def test_tables_have_what_the_files_have(run: elastic_moe.Run) -> None:
    records, events = read_jsonl(run.dir / "metrics.jsonl"), read_jsonl(run.dir / "events.jsonl")
    metrics = run.metrics()
    assert metrics["loss"].tolist() == [record["loss"] for record in records]
    assert metrics["step"].is_unique
    assert run.events()["event"].tolist() == [event["event"] for event in events]


def test_status_follows_the_events(run: elastic_moe.Run) -> None:
    last = read_jsonl(run.dir / "metrics.jsonl")[-1]
    status = run.status()
    assert (status.step, status.loss, status.steps) == (last["step"], last["loss"], run.config.run.steps)
    with (run.dir / "events.jsonl").open("a") as file:
        file.write(json.dumps({"event": "finished", "step": last["step"], "time": 1.0, "reason": "all done"}) + "\n")
    assert (run.status().state, run.status().reason) == ("finished", "all done")
    with (run.dir / "events.jsonl").open("a") as file:
        file.write(json.dumps({"event": "view", "step": last["step"], "time": 2.0}) + "\n")
    assert run.status().state == "ended"
    (run.dir / LIVE).write_text("{}")
    assert run.status().state == "running"
    (run.dir / "events.jsonl").unlink()
    (run.dir / LIVE).unlink()
    assert run.status().state == "new"
    assert "step" in repr(run)


def test_checkpoints_and_model(run: elastic_moe.Run) -> None:
    checkpoints = run.checkpoints(verify=True)
    assert set(checkpoints["state"]) == {"complete"}
    model = run.model(int(checkpoints["step"].max()))
    with torch.no_grad():
        logits = model(torch.tensor([[1, 2, 3]]))
    assert logits is not None
    text = run.generate("the ", max_tokens=8, seed=1)
    assert text.startswith("the ")
    assert text == run.generate("the ", max_tokens=8, seed=1)
    shutil.rmtree(run.dir / "checkpoints")
    assert run.checkpoints().columns.tolist() == ["step", "state", "reason", "bytes", "stays"]
    with pytest.raises(elastic_moe.UserError):
        run.model()


def test_a_notebook_shows_the_report(run: elastic_moe.Run) -> None:
    shown = run._repr_html_()
    assert shown.startswith("<iframe srcdoc=")
    assert run.report().is_file()
    (run.dir / "metrics.jsonl").unlink()
    assert "<iframe" not in run._repr_html_()


def test_another_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(elastic_moe.UserError, match=r"is not the directory of a run: it has no config.yaml"):
        elastic_moe.Run(tmp_path)
