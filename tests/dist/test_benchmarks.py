"""Benchmarks that time whole workers still run: in their quick form, as a process of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["overhead", "save"])
def test_the_quick_form_gives_figures(tmp_path: Path, name: str) -> None:
    command = [sys.executable, "-m", f"scripts.benchmarks.{name}", "--quick", "--json", str(tmp_path / "figures.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    figures = json.loads((tmp_path / "figures.json").read_text())
    if name == "overhead":
        assert figures["full_over_plain"] > 0
        assert figures["final_loss"]["full"] == pytest.approx(figures["final_loss"]["plain"], rel=1e-4)
    else:
        assert figures["evictions_and_failures"] == 0
        assert figures["checkpoints"] == 4
        assert figures["mib_per_worker"] > 8
