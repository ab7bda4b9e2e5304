"""The benchmarks of deaths and of memory still run: in their quick form, as processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.benchmarks.failures import QUICK

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_quick_form_gives_the_rows_of_both_sides(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    command = [sys.executable, "-m", "scripts.benchmarks.failures", "--quick", "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1700)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(file.read_text())["rows"]
    assert [row["death"] for row in rows] == list(QUICK)
    assert [row["steps_lost"] for row in rows] == [0, 0]
    for row in rows:
        assert row["to_next_step_s"] > 0
        assert row["stock"]["to_next_step_s"] > 0
        assert row["stock"]["steps_lost"] > 0, "it goes back to the newest checkpoint, which is half an interval old"


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_view_change_needs_no_second_copy_of_the_state(tmp_path: Path) -> None:
    """A worker is killed and replaced. The others hold two thirds of the state meanwhile, and not half of it."""
    file = tmp_path / "figures.json"
    command = [sys.executable, "-m", "scripts.benchmarks.memory", "--quick", "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(file.read_text())["compared"]["medium"]["rows"]
    assert found["own_over_described"] == pytest.approx(1, abs=0.2)
    assert found["change_over_described"] == pytest.approx(1, abs=0.2)
    assert found["change_over_steady"] < 1.5, "twice where old and new state stood side by side"
