"""Tracking is a guest: it is offline without an account, and nothing that it does stops or delays a run.

A run's curve has each step once, however often the run is resumed, and whatever it went back behind.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest

from elastic_moe.config.schema import TrackingConfig
from elastic_moe.errors import UserError
from elastic_moe.metrics.recorder import Recorder
from elastic_moe.metrics.sinks import tracker as trackers
from elastic_moe.metrics.sinks.marks import Mark, read_mark, write_mark
from elastic_moe.metrics.sinks.tracker import Tracker, check_tracking
from elastic_moe.metrics.sinks.wandb import has_account, wandb_mode

HERE = {"HOME": "/nonexistent"}
STEPS, BACK_AT, BACK_TO = 5000, 3500, 3200  # of the long run: after 3500 steps it goes back to step 3200
STARTS = (1200, 2500, 3400, STEPS)  # last step of each start


class Memory:
    """A backend that remembers, and fails or stalls where it is told to."""

    def __init__(self, fails_at: str = "", stall: threading.Event | None = None, replaces: bool = False) -> None:
        self.fails_at, self.stall, self.replaces, self.run_id = fails_at, stall, replaces, "an id"
        self.calls: list[tuple[str, Any]] = []
        self.marks: list[Mark] = []

    def make(self, mark: Mark) -> Memory:
        self.marks.append(mark)
        return self

    def _call(self, name: str, value: Any) -> None:
        if self.stall is not None:
            self.stall.wait()
        if name == self.fails_at:
            raise ConnectionError("no route")
        self.calls.append((name, value))

    def store_init_configuration(self, values: dict) -> None:
        self._call("config", values)

    def log(self, values: dict, step: int | None) -> None:
        self._call("log", (step, values))

    def flush(self) -> None:
        pass

    def finish(self) -> None:
        self._call("finish", None)

    @property
    def steps(self) -> list[int]:
        return [value[0] for name, value in self.calls if name == "log"]


def tracker_of(
    backend: Memory, run_dir: Path, failures: list[str] | None = None, setting: str = "auto", **config: Any
) -> Tracker:
    found = failures if failures is not None else []
    return Tracker(TrackingConfig(wandb=setting), run_dir, config, HERE, found.append, backend=backend.make)


def write(run_dir: Path, *records: dict[str, Any]) -> None:
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def test_everything_arrives_in_order(tmp_path: Path) -> None:
    backend, failures = Memory(), []
    tracker = tracker_of(backend, tmp_path, failures, run={"steps": 3, "dirs": ["a"]})
    write(tmp_path, {"step": 1, "loss": 2.0, "name": "text", "layers": [0.5, 1], "names": ["text"]})
    write(tmp_path, {"step": 2, "loss": 1.0})
    assert tracker.close()
    assert backend.calls == [
        ("config", {"run.steps": 3, "run.dirs": "['a']"}),
        ("log", (1, {"loss": 2.0, "layers/0": 0.5, "layers/1": 1})),
        ("log", (2, {"loss": 1.0})),
        ("finish", None),
    ]
    assert not failures
    assert not tracker.failed


@pytest.mark.parametrize("fails_at", ["config", "log", "finish"])
def test_failure_is_reported_once_and_the_next_start_sends_the_rest(fails_at: str, tmp_path: Path) -> None:
    failures: list[str] = []
    backend = Memory(fails_at)
    tracker = tracker_of(backend, tmp_path, failures)
    write(tmp_path, *({"step": step, "loss": 1.0} for step in range(1, 11)))
    assert not tracker.close()
    assert tracker.failed
    assert len(failures) == 1
    assert "no route" in failures[0]
    assert not tracker.close()
    backend.fails_at = ""
    assert tracker_of(backend, tmp_path).close()
    assert backend.steps == list(range(1, 11))
    assert backend.marks[1].run_id == "an id"


def test_failure_to_start_and_to_report(tmp_path: Path) -> None:
    def make(_: Mark) -> Memory:
        raise SystemExit(1)

    def report(reason: str) -> None:
        raise RuntimeError(reason)

    tracker = Tracker(TrackingConfig(), tmp_path, {}, HERE, report, backend=make)
    assert not tracker.close()


def test_a_slow_start_loses_nothing(tmp_path: Path) -> None:
    stall = threading.Event()
    backend = Memory(stall=stall)
    tracker = tracker_of(backend, tmp_path)
    write(tmp_path, *({"step": step, "loss": 1.0} for step in range(1, 4001)))
    assert not tracker.close(timeout_s=0.05)
    stall.set()
    assert tracker.close()
    assert backend.steps == list(range(1, 4001))


def test_off_starts_nothing(tmp_path: Path) -> None:
    before = threading.active_count()
    tracker = tracker_of(Memory(), tmp_path, setting="off")
    assert threading.active_count() == before
    assert tracker.close()


def test_goodput_goes_along(tmp_path: Path) -> None:
    line = {"goodput": 0.5, "ettr": 0.6, "failures": 1, "mttr_s": None, "mtbf_s": 9.0, "cost": None}
    (tmp_path / "goodput.jsonl").write_text(json.dumps(line | {"worker_s": {"training": 5.0}}) + "\n")
    write(tmp_path, {"step": 1, "loss": 1.0})
    backend = Memory()
    assert tracker_of(backend, tmp_path).close()
    expected = {"goodput": 0.5, "ettr": 0.6, "failures": 1, "mtbf_s": 9.0, "training_s": 5.0}
    assert backend.calls[1] == ("log", (1, {"loss": 1.0} | {f"goodput/{key}": v for key, v in expected.items()}))


def test_a_mark_that_cannot_be_read_begins_anew(tmp_path: Path) -> None:
    write_mark(tmp_path, "wandb", Mark("id", 3, 5.0))
    write_mark(tmp_path, "mlflow", Mark("other", 4, 5.0))
    assert read_mark(tmp_path, "wandb") == Mark("id", 3, 5.0)
    for text in ("{", "[]", '{"wandb": {"run_id": "x"}}', '{"wandb": 1}'):
        (tmp_path / "tracking.json").write_text(text)
        assert read_mark(tmp_path, "wandb") == Mark()


def test_a_tracker_that_is_not_installed_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"tracking\.backend=mlflow needs the package mlflow"):
        check_tracking(TrackingConfig(backend="mlflow"))
    check_tracking(TrackingConfig(backend="off"))


# --- a long run -------------------------------------------------------------------------------------------------------


def loss(step: int, again: bool) -> float:
    return step + 0.5 * again


def live_through(run_dir: Path, start: Callable[[], Tracker]) -> None:
    """A run of 5,000 steps in four starts. In the last one it goes back once, and makes 300 steps again."""
    clock = 0.0

    def record(recorder: Recorder, steps: range, again: bool) -> None:
        nonlocal clock
        for step in steps:
            clock += 1.0
            recorder.record({"step": step, "loss": loss(step, again), "time": clock})

    first = 1
    for last in STARTS:
        tracker, recorder = start(), Recorder(run_dir)
        if last == STEPS:
            record(recorder, range(first, BACK_AT + 1), False)
            assert tracker.close(timeout_s=120)  # all of it was sent when the run goes back
            recorder.set_aside_after(BACK_TO, 1)
            first, tracker = BACK_TO + 1, start()
        record(recorder, range(first, last + 1), last == STEPS)
        recorder.close()
        assert tracker.close(timeout_s=120)
        first = last + 1


def expected(replaces: bool) -> dict[int, float]:
    """The curve: where steps were made again, the newer value if the tracker can replace values, else the first."""
    end = BACK_TO if replaces else BACK_AT
    return {step: loss(step, again=step > end) for step in range(1, STEPS + 1)}


@pytest.mark.parametrize("replaces", [False, True])
def test_any_tracker_gets_each_step_once(tmp_path: Path, replaces: bool) -> None:
    backend = Memory(replaces=replaces)
    live_through(tmp_path, lambda: tracker_of(backend, tmp_path))
    curve: dict[int, float] = {}
    for step, values in (value for name, value in backend.calls if name == "log"):
        if replaces:
            curve = curve if step > max(curve, default=0) else {s: v for s, v in curve.items() if s < step}
        assert step not in curve
        curve[step] = values["loss"]
    assert curve == expected(replaces)
    assert {mark.run_id for mark in backend.marks} == {"", "an id"}


def _wandb_records(path: Path) -> Iterator[Any]:
    """The records of an offline run: a header of 7 bytes, then LevelDB's log format, with a protocol buffer each."""
    from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportAttributeAccessIssue]

    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        room = 32768 - at % 32768  # in the block
        _, length, kind = struct.unpack_from("<IHB", data, at)
        if room < 7 or kind == 0:
            at += room
            continue
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # the whole, or its last part
            record, parts = Record.FromString(parts), b""
            yield record


def test_wandb_has_one_run_with_each_step_once(tmp_path: Path) -> None:
    failures: list[str] = []
    config = TrackingConfig(group="sweep")
    live_through(tmp_path, lambda: Tracker(config, tmp_path, {"seed": 0}, HERE, failures.append))
    curve: list[tuple[int, float]] = []
    ids, groups = set(), set()
    for path in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb")):
        for record in _wandb_records(path):
            if record.HasField("run"):
                ids.add(record.run.run_id)
                groups.add(record.run.run_group)
            if record.HasField("history"):
                items = {".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
                curve.append((items["_step"], items["loss"]))
    assert not failures
    assert (len(ids), groups) == (1, {"sweep"})
    assert dict(curve) == expected(replaces=False)
    assert len(curve) == STEPS
    assert ids == {read_mark(tmp_path, "wandb").run_id}


def _events(path: Path) -> Iterator[Any]:
    """The events of a file of TensorBoard: TFRecords, each with its length, two checksums, and a protocol buffer."""
    from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

    data, at = path.read_bytes(), 0
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        event = Event()
        event.ParseFromString(data[at + 12 : at + 12 + length])
        at += 16 + length
        yield event


def test_tensorboard_has_each_step_once_and_goes_back_with_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CRC32C_SW_MODE", "auto")  # tensorboardX sets it
    failures: list[str] = []
    config = TrackingConfig(backend="tensorboard")
    live_through(tmp_path, lambda: Tracker(config, tmp_path, {"seed": 0}, HERE, failures.append))
    seen: Counter[int] = Counter()
    curve: dict[int, float] = {}
    for path in sorted(tmp_path.glob("tensorboard/events.*")):
        for event in _events(path):
            if event.HasField("session_log"):  # as TensorBoard reads it: what was written from this step on is void
                seen = Counter({step: count for step, count in seen.items() if step < event.step})
            for value in event.summary.value:
                if value.tag == "loss":
                    seen[event.step] += 1
                    curve[event.step] = value.simple_value
    assert not failures
    assert curve == expected(replaces=True)
    assert set(seen.values()) == {1}
    assert len(seen) == STEPS


# Live through a run with a tracker, then read what it has. Both are global in their process.
IN_A_PROCESS = """
import json, os, sys
from pathlib import Path
from elastic_moe.config.schema import TrackingConfig
from elastic_moe.metrics.sinks.tracker import Tracker
from tests.unit.metrics.test_tracker import HERE, live_through

run_dir, kind, failures, before = Path(sys.argv[1]), sys.argv[2], [], dict(os.environ)
config = TrackingConfig(backend=kind, group="sweep")
live_through(run_dir, lambda: Tracker(config, run_dir, {"seed": 0}, HERE, failures.append))
assert not failures, failures
if kind == "trackio":
    from trackio.sqlite_storage import SQLiteStorage as store
    (run,) = store.get_runs("elastic_moe")
    rows = [(row["step"], row["loss"]) for row in store.get_logs("elastic_moe", run) if "loss" in row]
    config = store.get_run_config("elastic_moe", run)
    found = [run, rows, {"seed": str(config["seed"])}, config["_Group"]]
else:
    import mlflow
    assert "MLFLOW_TRACKING_URI" not in os.environ, "the next run of a sweep would write into the first one's"
    client = mlflow.MlflowClient(f"sqlite:///{run_dir / 'mlflow.db'}")
    (experiment,) = [each for each in client.search_experiments() if each.name == "elastic_moe"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    rows = [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, "loss")]
    found = [run.info.run_id, rows, run.data.params, run.data.tags["group"]]
print("FOUND", json.dumps(found))
"""


@pytest.mark.parametrize("kind", ["mlflow", "trackio"])
def test_mlflow_and_trackio_have_one_run_with_each_step_once(tmp_path: Path, kind: str) -> None:
    if find_spec(kind) is None:
        pytest.skip(f"{kind} is not installed")
    root = Path(__file__).resolve().parents[3]
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    environ = os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio"), "PYTHONPATH": path}
    command = [sys.executable, "-c", IN_A_PROCESS, str(tmp_path), kind]
    done = subprocess.run(command, env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    run, rows, params, group = json.loads(line.removeprefix("FOUND "))
    assert run == read_mark(tmp_path, kind).run_id
    assert sorted(map(tuple, rows)) == sorted(expected(replaces=False).items())
    assert (params, group) == ({"seed": "0"}, "sweep")


@pytest.mark.parametrize(
    ("setting", "environ", "mode"),
    [
        ("auto", {}, "offline"),
        ("auto", {"WANDB_API_KEY": "k"}, "online"),
        ("auto", {"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, "offline"),
        ("auto", {"WANDB_MODE": "online"}, "offline"),
        ("auto", {"WANDB_API_KEY": "k", "WANDB_MODE": "disabled"}, "off"),
        ("online", {}, "offline"),
        ("online", {"WANDB_API_KEY": "k"}, "online"),
        ("offline", {"WANDB_API_KEY": "k"}, "offline"),
        ("off", {"WANDB_API_KEY": "k"}, "off"),
    ],
)
def test_mode(setting: str, environ: Mapping[str, str], mode: str) -> None:
    assert wandb_mode(setting, HERE | dict(environ)) == mode


def test_unknown_mode_is_a_user_error() -> None:
    with pytest.raises(UserError, match=r"tracking\.wandb"):
        wandb_mode("yes", {})


def test_account_in_netrc(tmp_path: Path) -> None:
    path = tmp_path / ".netrc"
    assert not has_account({"HOME": str(tmp_path)})
    path.write_text("machine example.org login a password b\n")
    assert not has_account({"HOME": str(tmp_path)})
    path.write_text("machine api.wandb.ai login user password key\n")
    path.chmod(0o600)
    assert has_account({"HOME": str(tmp_path)})
    assert has_account({"NETRC": str(path)})
    assert not has_account({"HOME": str(tmp_path), "WANDB_BASE_URL": "https://wandb.example.org"})
    path.write_text("nonsense [")
    assert not has_account({"HOME": str(tmp_path)})


def test_wandb_leaves_no_process(tmp_path: Path) -> None:
    failures: list[str] = []
    for name in ("a", "b"):  # one after the other, as in a sweep
        (tmp_path / name).mkdir()
        write(tmp_path / name, {"step": 1, "loss": 1.0})
        tracker = Tracker(TrackingConfig(), tmp_path / name, {"seed": 0}, HERE, failures.append)
        assert tracker.close(timeout_s=60), failures
        assert list(tmp_path.glob(f"{name}/wandb/offline-run-*/*.wandb"))
    left = [child.name() for child in psutil.Process().children() if child.name().startswith("wandb")]
    assert left == []
