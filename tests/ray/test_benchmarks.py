"""The benchmarks of deaths and of memory still run: in their quick form, as processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts.benchmarks.failures import QUICK

ROOT = Path(__file__).resolve().parents[2]


def quick_form(name: str, directory: Path, limit_s: float) -> dict[str, Any]:
    """What a benchmark writes in its quick form."""
    file = directory / "figures.json"
    command = [sys.executable, "-m", f"scripts.benchmarks.{name}", "--quick", "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit_s)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(file.read_text())
    return found


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_quick_form_gives_the_rows_of_both_sides(tmp_path: Path) -> None:
    rows = quick_form("failures", tmp_path, 1700)["rows"]
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
    found = quick_form("memory", tmp_path, 800)["compared"]["medium"]["rows"]
    assert found["own_over_described"] == pytest.approx(1, abs=0.2)
    assert found["change_over_described"] == pytest.approx(1, abs=0.2)
    assert found["change_over_steady"] < 1.5, "twice where old and new state stood side by side"
