"""The programs of scripts/examples run as their users run them: as processes, on real texts, with real deaths."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient

import elastic_moe
from elastic_moe.data.tokenizer import BpeTokenizer

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "scripts" / "examples"
TEXTS = ROOT / "elastic_moe" / "control"
PATIENCE_S = 600


def run_example(name: str, *arguments: object, code: int = 0) -> str:
    """Run a program to its end. Returns what it printed, standard error first."""
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    env.pop("RAY_ADDRESS", None)
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=PATIENCE_S)
    assert result.returncode == code, result.stderr + result.stdout
    return result.stderr + result.stdout


@pytest.mark.timeout(2 * PATIENCE_S)
def test_own_data_and_the_notebook_that_reads_the_run(tmp_path: Path) -> None:
    printed = run_example("own_data.py", TEXTS, "--run", tmp_path / "run", "--steps", 6)
    run = elastic_moe.Run(tmp_path / "run")
    assert run.status().state == "finished"
    assert run.metrics()["step"].tolist() == [1, 2, 3, 4, 5, 6]
    assert f"drawn in {run.dir / 'report.html'}" in printed
    run_example("own_data.py", TEXTS, "--run", tmp_path / "run", "--steps", 8)
    assert run.metrics()["step"].tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert "does not exist" in run_example("own_data.py", tmp_path / "nowhere", "--run", tmp_path / "other", code=2)

    notebook = nbformat.read(EXAMPLES / "read_a_run.ipynb", as_version=4)
    env = {**os.environ, "RUN": str(run.dir), "PYTHONPATH": str(ROOT)}
    NotebookClient(notebook, timeout=PATIENCE_S).execute(env=env)
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in shown if output["output_type"] == "error"]
    assert "<iframe" in shown[-1]["data"]["text/html"]


@pytest.mark.long
@pytest.mark.timeout(PATIENCE_S)
def test_a_killed_worker_costs_no_step(tmp_path: Path) -> None:
    printed = run_example("kill_demo.py", "--run", tmp_path / "run", "--steps", 40, "--every", 15)
    run = elastic_moe.Run(tmp_path / "run")
    assert len(run.events().query("event == 'worker_lost'")) >= 1
    assert run.metrics()["step"].tolist() == list(range(1, 41))
    assert "committed steps lost: 0" in printed


@pytest.mark.long
@pytest.mark.timeout(2 * PATIENCE_S)
def test_a_model_of_transformers_is_trained_and_written_back(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=512,
            hidden_size=32,
            intermediate_size=32,
            moe_intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            num_experts=4,
            num_experts_per_tok=2,
            max_position_embeddings=1024,
        )
    ).save_pretrained(tmp_path / "model")
    BpeTokenizer.train([path.read_text() for path in TEXTS.glob("*.py")], 500).export(tmp_path / "model")
    run_example(
        "fine_tune.py", tmp_path / "model", TEXTS, "--to", tmp_path / "out", "--run", tmp_path / "run", "--steps", 4
    )
    old = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    new = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not torch.equal(old.get_input_embeddings().weight, new.get_input_embeddings().weight)


@pytest.mark.long
@pytest.mark.timeout(2 * PATIENCE_S)
def test_a_sweep_makes_no_finished_run_again(tmp_path: Path) -> None:
    arguments = (TEXTS, "--dir", tmp_path, "--steps", 4, "--lr", 1e-3, 2e-3)
    printed = run_example("sweep.py", *arguments)
    assert "lr_0.001" in printed
    assert "lr_0.002" in printed
    before = (tmp_path / "lr_0.001" / "metrics.jsonl").read_bytes()
    run_example("sweep.py", *arguments)
    assert (tmp_path / "lr_0.001" / "metrics.jsonl").read_bytes() == before
