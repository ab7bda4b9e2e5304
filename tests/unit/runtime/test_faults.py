"""A configured fault fires at its rank, step and phase, and once in a run directory."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from elastic_moe.config.schema import FaultConfig
from elastic_moe.runtime.faults import Faults


@pytest.fixture
def signals(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The (process, signal) pairs that were sent, none of which is delivered."""
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append((pid, number)))
    return sent


def test_a_fault_fires_at_its_point_only(tmp_path: Path, signals: list[tuple[int, int]]) -> None:
    faults = Faults(FaultConfig(inject=["1:5:vote", "2:6:reduce:stop"]), tmp_path / "faults")
    for rank, step, phase in ((1, 5, "apply"), (1, 4, "vote"), (0, 5, "vote")):
        faults.at(rank, step, phase)
    assert not signals
    assert not (tmp_path / "faults").exists()
    faults.at(1, 5, "vote")
    faults.at(2, 6, "reduce")
    assert signals == [(os.getpid(), signal.SIGKILL), (os.getpid(), signal.SIGSTOP)]
    assert {path.name for path in (tmp_path / "faults").iterdir()} == {"rank1-step5-vote", "rank2-step6-reduce"}


def test_a_fault_fires_once_in_a_run_directory(tmp_path: Path, signals: list[tuple[int, int]]) -> None:
    for _ in range(2):  # the second object is that of a replacement worker
        faults = Faults(FaultConfig(kill_worker_at_step=3, kill_rank=2), tmp_path)
        for step in (2, 3, 3):
            faults.at(2, step, "committed")
    assert signals == [(os.getpid(), signal.SIGKILL)]


def test_without_faults_nothing_happens(tmp_path: Path, signals: list[tuple[int, int]]) -> None:
    Faults(FaultConfig(), tmp_path).at(1, 0, "committed")
    assert not signals
