"""The estimate of a micro-batch's activations beside the memory of a process that makes one step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from elastic_moe.cli.activations import activation_bytes
from elastic_moe.config.schema import DataConfig, ModelConfig, TrainConfig

SEQUENCES, LENGTH = 8, 128
BASE: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 256, "num_layers": 6, "num_experts": 8, "experts_per_token": 2,
    "expert_hidden": 192, "dense_hidden": 512, "num_heads": 4, "num_kv_heads": 2, "head_dim": 64,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mla": {"attention": "mla", "kv_latent": 64, "rope_dim": 32, "value_dim": 64},
    "mhc": {"residual": "mhc"},
    "logits": {"vocab_size": 32768, "num_layers": 2},
}
STEP = """
import json, sys, torch
from elastic_moe.config.schema import ModelConfig
from elastic_moe.model.experts.local import LocalExperts
from elastic_moe.model.transformer import Transformer

def memory(key):  # KiB
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1])

for keys in json.loads(sys.argv[1]):
    cfg = ModelConfig(**keys)
    experts = LocalExperts(cfg, seed=1)
    model = Transformer(cfg, experts)
    model.initialize(1)
    for parameter in (*model.parameters(), *experts.parameters()):
        parameter.grad = torch.zeros_like(parameter)
    experts.direct = True
    tokens = torch.randint(0, cfg.vocab_size, (int(sys.argv[2]), int(sys.argv[3])))
    model.loss(tokens[:1], tokens[:1]).loss_sum.backward()  # what the libraries need
    before = memory("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
    model.loss(tokens, tokens).loss_sum.backward()
    print(memory("VmHWM") - before)
    del experts, model, parameter
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak of a process cannot be reset")
@pytest.mark.parametrize("name", MODELS)
def test_estimates_are_near_what_a_process_needs(name: str) -> None:
    """Tensors have pages of their own there, which the allocator gives back at once."""
    policies = ["none"] if name == "logits" else ["none", "selective", "full", "3"]
    models = [{**BASE, **MODELS[name], "recompute": policy} for policy in policies]
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", STEP, json.dumps(models), str(SEQUENCES), str(LENGTH)]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    peaks = dict(zip(policies, [1024 * int(line) for line in run.stdout.splitlines()], strict=True))
    data = DataConfig(micro_batch=SEQUENCES, seq_len=LENGTH)
    for policy, keys in zip(policies, models, strict=True):
        estimate = activation_bytes(TrainConfig(device="cpu", model=ModelConfig(**keys), data=data), 1)
        assert estimate == pytest.approx(peaks[policy], rel=0.15), (policy, estimate / 2**20, peaks[policy] / 2**20)
    if name != "logits":
        assert peaks["selective"] < 0.6 * peaks["none"]
        assert peaks["full"] < 0.5 * peaks["none"]
