"""What an operator asked for outlives the coordinator, and not the start."""

from __future__ import annotations

from pathlib import Path

from elastic_moe.control.requests import CheckpointRequest, PauseRequest, ResumeRequest, ScaleRequest
from elastic_moe.coordination.wishes import REASON, Wishes
from elastic_moe.metrics.jsonl import read_jsonl
from elastic_moe.metrics.recorder import Recorder


def test_a_coordinator_that_is_started_again_asks_for_the_newest(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    path = tmp_path / "operator.json"
    wishes = Wishes(path, recorder)
    assert list(wishes.known(True)) == [], "nothing was asked for"
    wishes.note(CheckpointRequest())
    assert not path.exists()
    for request in (ScaleRequest(4), PauseRequest(), ScaleRequest(2)):
        wishes.note(request)
    assert list(Wishes(path, recorder).known(True)) == [ScaleRequest(2, REASON), PauseRequest(REASON)]
    wishes.note(ResumeRequest())
    assert list(Wishes(path, recorder).known(True)) == [ScaleRequest(2, REASON)]
    assert list(Wishes(path, recorder).known(False)) == []
    assert not path.exists(), "a new start begins without wishes"
    recorder.close()


def test_a_damaged_file_is_told_and_costs_only_the_wishes(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    path = tmp_path / "operator.json"
    for damaged in ("", "[]", '{"limit": "many", "paused": false}', '{"limit": 2}'):
        path.write_text(damaged)
        assert list(Wishes(path, recorder).known(True)) == []
    missing = Wishes(tmp_path / "away" / "operator.json", recorder)
    missing.note(PauseRequest())
    recorder.close()
    events = read_jsonl(tmp_path / "events.jsonl")
    assert [event["event"] for event in events] == ["wish_unkept"] * 5
    assert "cannot be written" in events[-1]["reason"]
