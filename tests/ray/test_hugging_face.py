"""From a Hugging Face directory through an elastic run and back, by command lines; transformers is the oracle."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from elastic_moe.data.shards import TokenShard
from elastic_moe.data.tokenizer import BpeTokenizer
from elastic_moe.plan.batch import sample_ids

transformers = pytest.importorskip("transformers")
ROOT = Path(__file__).resolve().parents[2]
CORPUS = ROOT / "elastic_moe" / "plan"
PROMPT = "def split_tokens("


def call(module: str, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", f"elastic_moe.{module}", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr[-2000:]
    return done


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random DeepSeek-V3 with a tokenizer of its own, whose vocabulary is smaller than the model's."""
    where = tmp_path_factory.mktemp("origin")
    torch.manual_seed(0)
    config = transformers.DeepseekV3Config(
        vocab_size=400, hidden_size=32, num_hidden_layers=3, first_k_dense_replace=1, intermediate_size=48,
        moe_intermediate_size=16, num_attention_heads=2, num_key_value_heads=2, n_routed_experts=8, n_group=2,
        topk_group=1, num_experts_per_tok=2, n_shared_experts=1, q_lora_rank=None, kv_lora_rank=16,
        qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, initializer_range=0.1, max_position_embeddings=64,
        num_mtp_layers=0,
    )  # fmt: skip
    model = transformers.DeepseekV3ForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers[1:]:
            layer.mlp.gate.e_score_correction_bias.normal_(std=0.1)
    model.save_pretrained(where)
    texts = [path.read_text() for path in CORPUS.glob("*.py")]
    BpeTokenizer.train(texts, 380).export(where)
    return where


@pytest.fixture(scope="module")
def run_dir(origin: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("runs") / "run"
    call(
        "train", f"run.dir={where}", f"model.init_from={origin}", f"data.corpus={CORPUS}", "data.seq_len=32",
        "data.global_batch=4", "data.micro_batch=2", "run.steps=3", "cluster.workers=2", "tracking.wandb=off",
        "run.sample_tokens=0", "run.eval_every_steps=0", "checkpoint.every_steps=2", "optim.warmup_steps=0",
    )  # fmt: skip
    return where


@pytest.mark.timeout(480)
def test_the_first_loss_is_the_oracles(origin: Path, run_dir: Path) -> None:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    (train_path,) = (run_dir.parent / ".cache").glob("*/train.bin")
    shard = TokenShard.open(train_path)
    ids = sample_ids(0, 0, 4, shard.num_samples(32))
    tokens, targets = (torch.from_numpy(np.asarray(part)) for part in shard.batch(ids, 32))
    model = transformers.AutoModelForCausalLM.from_pretrained(origin)
    logits = model(tokens, use_cache=False).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert records[0]["loss"] == pytest.approx(float(expected), rel=1e-5)
    assert records[2]["loss"] != records[0]["loss"]


@pytest.mark.timeout(480)
def test_export_and_generate(run_dir: Path, tmp_path: Path) -> None:
    assert "step 3" in call("export", str(run_dir), "--to", str(tmp_path / "hf")).stdout
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    model, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    prompt = tokenizer(PROMPT, return_tensors="pt")
    greedy = model.generate(**prompt, do_sample=False, max_new_tokens=12, use_cache=False)
    arguments = ("--prompt", PROMPT, "--max-tokens", "12", "--temperature", "0")
    texts = [call("generate", path, *arguments).stdout for path in (str(run_dir), str(tmp_path / "hf"))]
    expected = tokenizer.decode(greedy[0], skip_special_tokens=True) + "\n"
    assert texts[0] == texts[1] == expected.replace("\r\n", "\n").replace("\r", "\n"), "as a text pipe reads it"
    warm = call("generate", str(run_dir / "checkpoints" / "step_00000002"), *arguments[:4], "--seed", "1").stdout
    assert warm.startswith(PROMPT)
    assert len(warm) > len(PROMPT)

    half = call(
        "export", str(run_dir / "checkpoints" / "step_00000002"), "--to", str(tmp_path / "b"), "--dtype", "bf16"
    )
    assert "step 2" in half.stdout
    rough = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype="auto")
    assert rough.dtype == torch.bfloat16


def test_what_cannot_be_done_is_one_sentence(origin: Path, run_dir: Path, tmp_path: Path) -> None:
    for arguments, words in (
        (("export", str(tmp_path), "--to", str(tmp_path / "x")), "neither a run directory"),
        (("export", str(run_dir), "--to", str(origin)), "not empty"),
        (("export", str(run_dir), "--to", str(tmp_path / "x"), "--step", "1"), "step 1"),
        (("generate", str(run_dir / "checkpoints" / "step_00000009"), "--prompt", "a"), "step 9"),
        (("train", f"model.init_from={tmp_path}", f"run.dir={tmp_path / 'r'}"), "config.json cannot be read"),
    ):
        done = call(*arguments, code=2)
        assert words in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
