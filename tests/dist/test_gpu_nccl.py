"""The script that checks NCCL on a GPU, over gloo: its worlds, its comparison, and its rounds in which a peer dies."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_checks_run_without_a_gpu(tmp_path: Path) -> None:
    path = tmp_path / "checks.json"
    arguments = ["--json", str(path), "--device", "cpu", "--repeats", "1", "--only", "world2,death"]
    command = [sys.executable, "-m", "scripts.benchmarks.gpu_nccl", *arguments]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    cases = json.loads(path.read_text())["cases"]
    assert cases["death"]["passed"] == "4 of 4"
    assert [rank["wrong"] for rank in cases["world2"]["ranks"]] == [[], []]
    assert ended.stdout.count(": ok, ") == 2
