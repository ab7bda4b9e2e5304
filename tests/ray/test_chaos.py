"""The soak's program on a real cluster: an undisturbed run and one under faults, with all checks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.long  # a minute of faults, and the undisturbed run before it
@pytest.mark.timeout(1800)
def test_a_run_under_faults_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    out = tmp_path / "soak.json"
    command = [sys.executable, "-m", "scripts.chaos", "--runs", "1", "--seed", "3", "--steps", "40", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1700)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    assert result["failed_seeds"] == []
    (run,) = result["runs"]
    assert run["faults"], "nothing happened to the run"
    assert all(fault["met"] for fault in run["faults"] if fault["kind"].startswith("kill"))
