"""The record of a trial, its objective from the run's files, and the table of a sweep."""

from __future__ import annotations

import csv
import json
import math
import pickle
from pathlib import Path

import pytest

from elastic_moe.config.build import build
from elastic_moe.errors import UserError
from elastic_moe.sweep.table import text_table, write_table
from elastic_moe.sweep.trial import (
    FAILED,
    FINISHED,
    INTERRUPTED,
    STOPPED_EARLY,
    TrialFailed,
    TrialRecord,
    check_same,
    fingerprint_of_trial,
    objective,
    objectives,
    read_trial,
)


def lines(path: Path, *values: object) -> None:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert read_trial(tmp_path) is None
    record = TrialRecord(
        3, ["optim.lr=0.1"], FINISHED, step=9, steps=9, objective=2.5, fingerprint={"keys": {"seed": 0}}
    )
    record.write(tmp_path / "3")
    assert read_trial(tmp_path / "3") == record
    (tmp_path / "3" / "trial.json").write_text('{"trial": 3')
    with pytest.raises(UserError, match=r"trial\.json cannot be read"):
        read_trial(tmp_path / "3")


@pytest.mark.parametrize(
    ("state", "step", "done"),
    [(FINISHED, 9, True), (FINISHED, 8, False), (STOPPED_EARLY, 3, True), (FAILED, 9, False), (INTERRUPTED, 4, False)],
)
def test_what_a_rerun_passes_over(state: str, step: int, done: bool) -> None:
    assert TrialRecord(0, [], state, step=step).done(build({"run": {"steps": 9}})) is done


def test_another_trial_in_the_same_directory_is_refused_with_the_keys_that_differ(tmp_path: Path) -> None:
    before = build({"optim": {"lr": 0.1}, "run": {"steps": 5}})
    record = TrialRecord(0, [], fingerprint=json.loads(json.dumps(fingerprint_of_trial(before))))
    check_same(record, build({"optim": {"lr": 0.1}, "run": {"steps": 50}, "cluster": {"workers": 2}}), tmp_path)
    with pytest.raises(UserError, match=r"holds another trial than this one \(optim.lr: 0.1 -> 0.2\)"):
        check_same(record, build({"optim": {"lr": 0.2}}), tmp_path)


def test_the_objective_comes_from_the_files(tmp_path: Path) -> None:
    assert objective(tmp_path, "val_loss") is None
    evaluated = [
        {"event": "evaluated", "step": step, "val_loss": loss} for step, loss in ((5, 4.0), (10, 3.0), (5, 3.9))
    ]
    lines(tmp_path / "events.jsonl", {"event": "entered", "step": 0}, *evaluated)
    assert objectives(tmp_path, "val_loss") == [(5, 3.9), (10, 3.0)], "a step that came again counts once"
    lines(tmp_path / "metrics.jsonl", *({"step": step, "loss": float(step)} for step in range(1, 13)))
    assert objectives(tmp_path, "loss")[0] == (1, 1.0)
    assert objective(tmp_path, "loss") == sum(range(3, 13)) / 10
    lines(tmp_path / "metrics.jsonl", {"step": 1, "loss": None})
    value = objective(tmp_path, "loss")
    assert value is not None
    assert math.isnan(value)


def test_the_table_has_the_keys_that_differ(tmp_path: Path) -> None:
    one = TrialRecord(0, ["optim.lr=0.1", "run.steps=9"], FINISHED, step=9, steps=9, objective=2.5, starts=1)
    two = TrialRecord(1, ["optim.lr=0.2", "run.steps=9"], FAILED, 1, "it diverged", 4, 9, starts=3)
    write_table(tmp_path / "sweep.csv", [one, two], {0: tmp_path / "0", 1: tmp_path / "1"}, "val_loss")
    with (tmp_path / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["optim.lr"] for row in rows] == ["0.1", "0.2"]
    assert "run.steps" not in rows[0], "it is the same for all"
    assert [row["val_loss"] for row in rows] == ["2.5", ""]
    assert [row["run_dir"] for row in rows] == [str(tmp_path / "0"), str(tmp_path / "1")]
    text = text_table([one, two], "val_loss").splitlines()
    assert len({line.index(word) for line, word in zip(text[1:3], ("0.1", "0.2"), strict=True)}) == 1
    assert text[-1] == "trial 1: it diverged"


def test_a_failure_travels_between_processes() -> None:
    failure = pickle.loads(pickle.dumps(TrialFailed("it diverged", 1, 3)))
    assert (str(failure), failure.code, failure.worst) == ("it diverged", 1, 3)
