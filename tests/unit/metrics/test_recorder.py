"""The recorder writes every step once, in order, in whole lines, whatever happened before."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import pytest

from elastic_moe.metrics.jsonl import read_jsonl
from elastic_moe.metrics.recorder import MAX_EARLY, Recorder
from elastic_moe.run_dir import EVENTS, METRICS


def steps_in(run_dir: Path) -> list[int]:
    return [record["step"] for record in read_jsonl(run_dir / METRICS)]


def test_records_once_and_in_order(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, clock=lambda: 12.5)
    assert [bool(recorder.record({"step": step, "loss": 1.0})) for step in (1, 2, 2, 1, 3)] == [
        True,
        True,
        False,
        False,
        True,
    ]
    assert steps_in(tmp_path) == [1, 2, 3]
    assert recorder.last == {"time": 12.5, "step": 3, "loss": 1.0}
    recorder.close()


def test_continues_an_existing_run(tmp_path: Path) -> None:
    first = Recorder(tmp_path)
    first.record({"step": 7})
    first.close()
    second = Recorder(tmp_path)
    assert second.last_step == 7
    assert not second.record({"step": 7})
    assert second.record({"step": 8})
    assert steps_in(tmp_path) == [7, 8]
    second.close()


@pytest.mark.parametrize("torn", [b'{"step": 3, "lo', b'{"step": 3, "lo\n', b"\0\0\0\0\n"])
def test_torn_end_is_cut(tmp_path: Path, torn: bytes) -> None:
    first = Recorder(tmp_path)
    first.record({"step": 1})
    first.record({"step": 2})
    first.close()
    with (tmp_path / METRICS).open("ab") as stream:
        stream.write(torn)
    second = Recorder(tmp_path)
    assert second.record({"step": 3})
    assert steps_in(tmp_path) == [1, 2, 3]
    second.close()


def test_set_aside_after(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    for step in range(1, 8):
        recorder.record({"step": step})
    assert recorder.set_aside_after(9, 1) == 0
    assert recorder.set_aside_after(4, 1) == 3
    assert (steps_in(tmp_path), recorder.last_step) == ([1, 2, 3, 4], 4)
    assert recorder.record({"step": 5})
    assert recorder.set_aside_after(0, 2) == 5
    assert (steps_in(tmp_path), recorder.last_step) == ([], 0)
    assert recorder.record({"step": 1})
    recorder.close()
    assert [record["step"] for record in read_jsonl(tmp_path / "metrics.t1.jsonl")] == [5, 6, 7]
    assert [record["step"] for record in read_jsonl(tmp_path / "metrics.t2.jsonl")] == [1, 2, 3, 4, 5]


def test_a_damaged_line_is_told_and_the_rest_stays(tmp_path: Path) -> None:
    first = Recorder(tmp_path)
    for step in range(1, 30):
        first.record({"step": step})
    first.close()
    path = tmp_path / METRICS
    path.write_bytes(path.read_bytes().replace(b'"step": 11}', b'"step": 1\x001}'))
    second = Recorder(tmp_path)
    assert second.last_step == 29
    assert second.record({"step": 30})
    second.close()
    assert steps_in(tmp_path) == [*range(1, 11), *range(12, 31)]
    (event,) = read_jsonl(tmp_path / EVENTS)
    assert (event["event"], event["reason"]) == (
        "records_damaged",
        "1 damaged lines of metrics.jsonl are now in metrics.jsonl.damaged",
    )


def test_events_keep_their_time_and_odd_values(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, clock=lambda: 1.0)
    recorder.event({"event": "a", "loss": float("nan"), "load": np.arange(2), "n": np.int64(3), "path": tmp_path})
    recorder.event({"event": "b", "time": 5.0, "nested": {"x": (1, float("inf"))}})
    assert read_jsonl(tmp_path / EVENTS) == [
        {"time": 1.0, "event": "a", "loss": None, "load": [0, 1], "n": 3, "path": str(tmp_path)},
        {"time": 5.0, "event": "b", "nested": {"x": [1, None]}},
    ]
    recorder.close()


def test_full_disk_delays_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(tmp_path)
    recorder.record({"step": 1})
    real = os.write

    def refuse(descriptor: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", refuse)
        assert recorder.record({"step": 2})
        patch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:5]))  # half a line fits
        assert recorder.record({"step": 3})
        assert steps_in(tmp_path) == [1]
        assert (recorder.last_step, recorder.safe_step) == (3, 1)
    assert recorder.record({"step": 4})
    assert steps_in(tmp_path) == [1, 2, 3, 4]
    assert recorder.safe_step == 4
    recorder.set_aside_after(2, 1)
    assert recorder.safe_step == 2
    recorder.close()


def test_truncate_forgets_delayed_lines_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(tmp_path)
    recorder.record({"step": 1})
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda descriptor, data: 0)
        recorder.record({"step": 2})
        recorder.record({"step": 3})
        assert recorder.set_aside_after(2, 1) == 1
        assert recorder.last_step == 2
    assert recorder.record({"step": 3})
    assert steps_in(tmp_path) == [1, 2, 3]
    recorder.close()


def test_threads(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    threads = [
        threading.Thread(target=lambda: [recorder.event({"event": "x" * 500}) for _ in range(50)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read_jsonl(tmp_path / EVENTS)) == 200
    recorder.close()


def test_steps_that_come_early_wait_for_the_missing_one(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    assert [[r["step"] for r in recorder.record({"step": step})] for step in (1, 3, 4, 3, 2)] == [
        [1],
        [],
        [],
        [],
        [2, 3, 4],
    ]
    assert recorder.record({"step": 6}) == []
    assert recorder.last_step == 4
    recorder.close()
    assert [r["step"] for r in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 6]


def test_a_step_that_never_comes_is_given_up(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    for step in range(2, MAX_EARLY + 3):
        written = recorder.record({"step": step})
    assert [r["step"] for r in written] == list(range(2, MAX_EARLY + 3))
    assert [r["step"] for r in recorder.record({"step": MAX_EARLY + 3})] == [MAX_EARLY + 3]
    recorder.close()
