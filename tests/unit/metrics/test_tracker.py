"""Tracking is a guest: it is offline without an account, and nothing that it does stops or delays a run."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from elastic_moe.config.schema import TrackingConfig
from elastic_moe.errors import UserError
from elastic_moe.metrics.sinks.background import MAX_QUEUED
from elastic_moe.metrics.sinks.wandb import Tracker, has_account, wandb_mode

HERE = {"HOME": "/nonexistent"}


class Memory:
    """A backend that remembers, and fails or stalls where it is told to."""

    def __init__(self, fails_at: str = "", stall: threading.Event | None = None) -> None:
        self.fails_at, self.stall = fails_at, stall
        self.calls: list[tuple[str, Any]] = []

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

    def finish(self) -> None:
        self._call("finish", None)


def tracker_of(backend: Memory, failures: list[str], setting: str = "auto", **config: Any) -> Tracker:
    return Tracker(TrackingConfig(wandb=setting), "unused", config, HERE, failures.append, backend=lambda: backend)


def test_everything_arrives_in_order() -> None:
    backend, failures = Memory(), []
    tracker = tracker_of(backend, failures, run={"steps": 3, "dirs": ["a"]})
    tracker.log({"step": 1, "loss": 2.0, "name": "text", "layers": [0.5, 1], "names": ["text"]}, 1)
    tracker.log({"step": 2, "loss": 1.0}, 2)
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
def test_failure_is_reported_once_and_never_raised(fails_at: str) -> None:
    failures: list[str] = []
    tracker = tracker_of(Memory(fails_at), failures)
    for step in range(10):
        tracker.log({"loss": 1.0}, step)
    assert not tracker.close()
    assert tracker.failed
    assert len(failures) == 1
    assert "no route" in failures[0]
    tracker.log({"loss": 1.0}, 11)
    assert not tracker.close()


def test_failure_to_start_and_to_report() -> None:
    def make() -> Memory:
        raise SystemExit(1)

    def report(reason: str) -> None:
        raise RuntimeError(reason)

    tracker = Tracker(TrackingConfig(), "unused", {}, HERE, report, backend=make)
    assert not tracker.close()


def test_stalled_tracker_never_blocks() -> None:
    stall, failures = threading.Event(), []
    backend = Memory(stall=stall)
    tracker = tracker_of(backend, failures)
    for step in range(MAX_QUEUED + 50):
        tracker.log({"loss": 1.0}, step)
    assert tracker.dropped >= 49
    assert not tracker.close(timeout_s=0.05)
    stall.set()
    assert tracker.close()  # the end came through once there was room
    assert backend.calls[-1] == ("finish", None)


def test_off_starts_nothing() -> None:
    before = threading.active_count()
    tracker = tracker_of(Memory(), [], setting="off")
    tracker.log({"loss": 1.0}, 1)
    assert threading.active_count() == before
    assert tracker.close()


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


def test_offline_runs_of_wandb_itself(tmp_path: Path) -> None:
    failures: list[str] = []
    for name in ("a", "b"):  # one after the other, as in a sweep
        tracker = Tracker(TrackingConfig(), tmp_path / name, {"seed": 0}, HERE, failures.append)
        tracker.log({"loss": 1.0}, 1)
        assert tracker.close(timeout_s=60), failures
        assert list(tmp_path.glob(f"{name}/wandb/offline-run-*/*.wandb"))
    left = [child.name() for child in psutil.Process().children() if child.name().startswith("wandb")]
    assert left == []
