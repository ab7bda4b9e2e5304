"""The coordinator without Ray: records, the roll back when state came from storage, and requests."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from elastic_moe.config.schema import ModelConfig, RunConfig, TrainConfig
from elastic_moe.coordination import records as records_module
from elastic_moe.coordination.coordinator import RunCoordinator
from elastic_moe.coordination.records import StepRecords
from elastic_moe.metrics.jsonl import read_jsonl
from elastic_moe.metrics.recorder import Recorder
from elastic_moe.run_dir import EVENTS, METRICS, OPERATOR


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[RunCoordinator]:
    model = ModelConfig(num_layers=2, num_experts=4, experts_per_token=2)
    config = TrainConfig(run=RunConfig(dir=str(tmp_path), steps=5), model=model)
    coordinator = RunCoordinator(config, "token", 1)
    yield coordinator
    coordinator.close()


def _add(coordinator: RunCoordinator, *steps: int, loss: float = 1.0) -> None:
    for step in steps:
        coordinator._records.add({"step": step, "loss": loss})


def _entered(source: str, generation: int, step: int) -> dict[str, Any]:
    return {"event": "entered", "source": source, "generation": generation, "step": step}


def _steps(records: list[dict[str, Any]]) -> list[int]:
    return [record["step"] for record in records]


@pytest.mark.parametrize("source", ["checkpoint", "initialisation"])
def test_state_from_storage_drops_later_records_once(coordinator: RunCoordinator, tmp_path: Path, source: str) -> None:
    _add(coordinator, 1, 2, 3, 4)
    coordinator._on_event(_entered(source, 2, 2))
    assert _steps(coordinator.records_since(0)) == [1, 2]
    _add(coordinator, 3, loss=0.5)
    coordinator._on_event(_entered(source, 2, 2))  # another member's report of the same generation
    assert [record["loss"] for record in coordinator.records_since(2)] == [0.5]
    started, *events = read_jsonl(tmp_path / EVENTS)
    assert (started["event"], started["restarted"]) == ("started", False)
    assert [event["event"] for event in events] == ["rolled_back", "entered"]
    assert (events[0]["generation"], events[0]["step"], events[0]["lost_steps"]) == (2, 2, 2)


def test_state_from_peers_drops_nothing(coordinator: RunCoordinator) -> None:
    _add(coordinator, 1, 2, 3)
    coordinator._on_event(_entered("peers", 2, 2))
    assert _steps(coordinator.records_since(0)) == [1, 2, 3]


def test_a_second_roll_back_of_a_later_generation_counts(coordinator: RunCoordinator) -> None:
    _add(coordinator, 1, 2)
    coordinator._on_event(_entered("checkpoint", 2, 1))
    _add(coordinator, 2, 3)
    coordinator._on_event(_entered("initialisation", 3, 0))
    assert coordinator.records_since(0) == []


def test_members_that_are_behind_the_records_begin_a_new_timeline(coordinator: RunCoordinator) -> None:
    """Those with the newest state died, and others who had been cut off came back: the run went back to peers."""
    _add(coordinator, 1, 2, 3, 4)
    coordinator._on_event(_entered("peers", 2, 2))
    assert _steps(coordinator.records_since(0)) == [1, 2]
    coordinator._on_event(_entered("peers", 2, 2))
    _add(coordinator, 3)
    coordinator._on_event(_entered("peers", 3, 3))
    assert _steps(coordinator.records_since(0)) == [1, 2, 3]


def test_requests_reach_the_membership(coordinator: RunCoordinator) -> None:
    with pytest.raises(ValueError, match="'explode'"):
        coordinator.submit({"event": "explode"})
    coordinator.submit({"event": "stop", "reason": "enough"})
    coordinator.close()
    coordinator.submit({"event": "stop"})  # has no effect any more
    coordinator.close()


def test_the_next_life_goes_on_with_the_records(tmp_path: Path) -> None:
    config = TrainConfig(run=RunConfig(dir=str(tmp_path), steps=5), model=ModelConfig(num_layers=1))
    first = RunCoordinator(config, "token", 1)
    _add(first, 1, 2)
    first.close()
    second = RunCoordinator(config, "token", 1)
    try:
        _add(second, 2, 3)
        assert _steps(second.records_since(0)) == [1, 2, 3]
        assert _steps(second.records_since(2)) == [3]
    finally:
        second.close()


def test_records_come_from_memory_if_it_has_them_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records_module, "RECENT", 3)
    recorder = Recorder(tmp_path)
    records = StepRecords(tmp_path, recorder)
    for step in range(1, 8):
        records.add({"step": step})
    assert _steps(records.since(2)) == [3, 4, 5, 6, 7]  # from the file
    (tmp_path / METRICS).rename(tmp_path / "away")
    assert _steps(records.since(4)) == [5, 6, 7]
    assert records.since(7) == []
    recorder.close()


def _life(tmp_path: Path, restarted: bool) -> RunCoordinator:
    config = TrainConfig(run=RunConfig(dir=str(tmp_path), steps=5), model=ModelConfig(num_layers=1))
    return RunCoordinator(config, "token", 1, restarted=restarted)


@pytest.mark.parametrize("restarted", [True, False])
def test_a_restarted_coordinator_knows_that_the_run_has_gone_back_and_a_new_start_counts_anew(
    tmp_path: Path, restarted: bool
) -> None:
    """How a view was entered is told again where a coordinator may have died before it read that."""
    first = _life(tmp_path, False)
    _add(first, 1, 2, 3, 4)
    first._on_event(_entered("checkpoint", 2, 2))
    _add(first, 3)
    first.close()
    second = _life(tmp_path, restarted)
    second._on_event(_entered("checkpoint", 2, 2))
    assert _steps(second.records_since(0)) == ([1, 2, 3] if restarted else [1, 2])
    second.close()


def test_views_and_checkpoints_of_an_earlier_start_do_not_count_for_a_restarted_coordinator(tmp_path: Path) -> None:
    """Generations are counted anew in each start, and the coordinator may die before the first view is entered."""
    first = _life(tmp_path, False)
    _add(first, 1, 2, 3, 4)
    first._on_event(_entered("peers", 9, 4))
    first.close()
    config = TrainConfig(run=RunConfig(dir=str(tmp_path), steps=5), model=ModelConfig(num_layers=1))
    second = RunCoordinator(config, "token", 1, restarted=True, began_s=time.time())
    second._on_event(_entered("checkpoint", 1, 2))
    assert _steps(second.records_since(0)) == [1, 2]
    second.close()


@pytest.mark.parametrize("read", [True, False])
def test_how_a_view_was_entered_counts_once_although_it_is_told_again(tmp_path: Path, read: bool) -> None:
    """A worker repeats it to a coordinator that was started again, and steps were recorded since."""
    first = _life(tmp_path, False)
    _add(first, 1, 2)
    if read:
        first._on_event(_entered("peers", 3, 2))
    first.close()
    second = _life(tmp_path, True)
    if read:
        _add(second, 3, 4)
    second._on_event(_entered("peers", 3, 2))
    second.close()
    told = [event for event in read_jsonl(tmp_path / "events.jsonl") if event["event"] == "entered"]
    assert [event["lost_steps"] for event in told] == [0]


def test_of_two_operators_at_once_the_wish_that_counts_is_the_one_that_is_kept(
    coordinator: RunCoordinator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray gives an actor's calls to several threads."""
    note, kept = coordinator._wishes.note, threading.Event()

    def slow_once(request: Any) -> None:
        note(request)
        if not kept.is_set():
            kept.set()
            time.sleep(0.3)  # in which the other operator's request would be taken

    monkeypatch.setattr(coordinator._wishes, "note", slow_once)
    first = threading.Thread(target=lambda: coordinator.submit({"event": "scale", "workers": 2}))
    first.start()
    assert kept.wait(60)
    coordinator.submit({"event": "scale", "workers": 3})
    first.join()
    deadline_s = time.monotonic() + 60
    while sum(event["event"] != "started" for event in read_jsonl(tmp_path / EVENTS)) < 2:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    assert coordinator.status()["limit"] == 3
    assert json.loads((tmp_path / OPERATOR).read_text())["limit"] == 3
