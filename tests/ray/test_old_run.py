"""A run made before the configuration keys were renamed: it is resumed, exported, sampled and drawn."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OLD = ROOT / "tests" / "data" / "old_run"

# The command of the old run (tests/data/old_run/README.md) with the present keys.
RESUME = """
    run.dir=run run.steps=10 run.resume=auto cluster.workers=2 data.corpus=corpus.txt data.tokenizer=bytes
    data.seq_len=32 data.global_batch=8 data.micro_batch=2 data.cache_dir=cache model.hidden_size=16 model.num_layers=2
    model.num_heads=2 model.num_kv_heads=1 model.head_dim=8 model.dense_hidden=32 model.num_experts=4
    model.experts_per_token=2 model.expert_hidden=8 model.router_score=softmax optim.grad_clip=0.7
    run.eval_every_steps=3 run.eval_sequences=4 run.sample_tokens=4 balance.every_steps=2 checkpoint.every_steps=3
    checkpoint.keep=2 tracking.wandb=off
""".split()


def call(where: Path, command: str, *arguments: str, code: int = 0) -> str:
    """Run a command; its output, or the error message where it is to fail."""
    done = subprocess.run(
        [sys.executable, "-m", f"elastic_moe.{command}", *arguments],
        cwd=where,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == code, done.stderr[-2000:]
    return done.stderr if code else done.stdout


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A copy of the old run and its corpus."""
    return shutil.copytree(OLD, tmp_path / "old")


@pytest.mark.timeout(480)
def test_the_losses_go_on_as_before(old: Path) -> None:
    """Relative 1e-6: two workers add their gradients in the order in which torch and the processor sum, not ours."""
    call(old, "train", *RESUME)
    records = [json.loads(line) for line in (old / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = {record["step"]: record["loss"] for record in records}
    expected = {int(step): loss for step, loss in json.loads((OLD / "losses.json").read_text()).items()}
    assert sorted(losses) == list(range(1, 11))
    assert {step: losses[step] for step in expected} == pytest.approx(expected, rel=1e-6)


@pytest.mark.timeout(480)
def test_generate_and_report_read_it(old: Path) -> None:
    text = call(old, "generate", "run", "--prompt", "def ", "--max-tokens", "3", "--temperature", "0")
    assert text.startswith("def ")
    call(old, "report", "run")
    assert '"figures":{"step":6' in (old / "run" / "report.html").read_text()


@pytest.mark.timeout(480)
def test_export_reads_it(old: Path) -> None:
    """No family of transformers has this run's softmax router without qk_norm, so code travels with the weights.

    With sigmoid scores, glm4_moe has it.
    """
    config = old / "run" / "config.yaml"
    text = config.read_text()
    assert "  score: softmax" in text
    assert "  clip: 0.7" in text
    assert "step 6" in call(old, "export", "run", "--to", "own")
    assert json.loads((old / "own" / "config.json").read_text())["model_type"] == "elastic_moe"
    config.write_text(text.replace("  score: softmax", "  score: sigmoid"))
    assert "step 6" in call(old, "export", "run", "--to", "hf")
    assert json.loads((old / "hf" / "config.json").read_text())["model_type"] == "glm4_moe"
