"""Our own export format: transformers runs the code beside the weights, and training can go on from the directory."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from elastic_moe.config.schema import ModelConfig
from elastic_moe.errors import UserError
from elastic_moe.model.experts.local import LocalExperts
from elastic_moe.model.hf.checkpoint import load_model, named_tensors, read_fields, write_checkpoint
from elastic_moe.model.hf.families import OWN
from elastic_moe.model.hf.own_format import SHAPE
from elastic_moe.model.transformer import Transformer

transformers = pytest.importorskip("transformers")
BASE: dict[str, Any] = {
    "vocab_size": 47, "hidden_size": 16, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8,
    "rope_dim": 4, "value_dim": 6, "kv_latent": 10, "dense_hidden": 20, "num_experts": 6, "experts_per_token": 2,
    "expert_hidden": 8, "init_std": 0.3,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "the quickstart's": {"attention": "mla", "residual": "mhc"},
    "mHC, learned head, groups, MTP": {
        "attention": "mla", "residual": "mhc", "readout": "learned", "query_latent": 9, "num_groups": 3,
        "groups_per_token": 2, "mtp_depth": 1, "mix_eps": 1e-6, "attention_bias": True, "rope_interleave": False,
        "rope_factor": 4.0, "rope_original_len": 8, "rope_mscale": 1.0, "rope_mscale_all_dim": 0.7,
        "routed_scaling": 2.5,
    },
    "HC, GQA": {
        "residual": "hc", "num_streams": 3, "qk_norm": True, "attention_bias": True, "output_bias": False,
        "rope_fraction": 0.5, "router_score": "softmax", "normalize_gates": False, "num_shared_experts": 2,
    },
    "mHC, GQA, hash layer, limit": {
        "residual": "mhc", "num_hash_layers": 1, "swiglu_limit": 0.5, "router_score": "sqrtsoftplus",
        "num_shared_experts": 0, "rope_factor": 2.0, "rope_original_len": 8,
    },
    "plain, softmax with latent attention": {"attention": "mla", "router_score": "softmax", "normalize_gates": False},
}  # fmt: skip


def made(name: str) -> tuple[ModelConfig, Transformer, LocalExperts]:
    """A model in which nothing is zero or one."""
    cfg = ModelConfig(**{**BASE, **MODELS[name], "seq_balance_weight": 0.0})
    experts = LocalExperts(cfg)
    model = Transformer(cfg, experts)
    model.initialize(1)
    generator = torch.Generator().manual_seed(2)
    for path, tensor in named_tensors(model, experts).items():
        if not path.endswith("table"):
            tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.1)
    return cfg, model, experts


def exported(name: str, where: Path) -> tuple[ModelConfig, Transformer, LocalExperts]:
    cfg, model, experts = made(name)
    tensors = named_tensors(model, experts)
    assert write_checkpoint(where, cfg, lambda spec: tensors[spec.name], 32, shard_bytes=20_000) == []
    return cfg, model, experts


def loaded(where: Path) -> Any:
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        where, trust_remote_code=True, output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@pytest.mark.parametrize("name", MODELS)
def test_transformers_computes_the_same(name: str, tmp_path: Path) -> None:
    """Logits, loss and gradients."""
    cfg, model, experts = exported(name, tmp_path / "out")
    theirs = loaded(tmp_path / "out")
    tokens, targets = torch.randint(0, cfg.vocab_size, (2, 2, 13), generator=torch.Generator().manual_seed(3))
    expected = model(tokens)
    assert (theirs(tokens).logits - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))

    model.loss(tokens, targets, mtp_weight=0.0).loss_sum.backward()
    logits = theirs(tokens).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").backward()
    grads = {path: p.grad for path, p in model.named_parameters()} | experts.named_views(of_grad=True)
    for path, parameter in theirs.named_parameters():
        grad = grads[path]
        other = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert grad is not None
        assert (grad - other).abs().max() <= 1e-4 * float(other.abs().max()) + 1e-5, path


@pytest.mark.parametrize("name", MODELS)
def test_training_can_go_on_from_the_directory(name: str, tmp_path: Path) -> None:
    """Every parameter comes back bit by bit, those of multi-token prediction too."""
    cfg, model, experts = exported(name, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == OWN
    again, model_again, experts_again = load_model(tmp_path / "out")
    assert {k: getattr(again, k) for k in SHAPE} == {k: getattr(cfg, k) for k in SHAPE}
    before, after = named_tensors(model, experts), named_tensors(model_again, experts_again)
    assert before.keys() == after.keys()
    for path, tensor in before.items():
        assert torch.equal(tensor, after[path]), path


def test_generation_uses_the_cache_and_the_mask(tmp_path: Path) -> None:
    exported("the quickstart's", tmp_path / "out")
    model = loaded(tmp_path / "out")
    prompt = torch.tensor([[5, 6, 7, 8]])
    with_cache = model.generate(prompt, max_new_tokens=6, do_sample=False)
    without = model.generate(prompt, max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(with_cache, without)
    padded = torch.tensor([[0, 0, 5, 6, 7, 8], [1, 2, 5, 6, 7, 8]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    both = model.generate(padded, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(both[0, 2:], with_cache[0])


def test_a_shape_that_is_not_known_is_a_sentence(tmp_path: Path) -> None:
    exported("the quickstart's", tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    for change, message in (
        ({"format": 2}, "format 2 is not 1"),
        ({"shape": {**config["shape"], "new": 1}}, "shape has an unknown new"),
        ({"shape": {k: v for k, v in config["shape"].items() if k != "residual"}}, "shape lacks residual"),
        ({"shape": {**config["shape"], "num_layers": "many"}}, "num_layers"),
    ):
        path.write_text(json.dumps({**config, **change}))
        with pytest.raises(UserError, match=message):
            read_fields(tmp_path / "out")


def test_every_field_is_shape_or_training() -> None:
    """A new field of the shape must be known to the code that travels with an export, or it would be ignored there."""
    code = "".join(path.read_text() for path in Path(write_checkpoint.__code__.co_filename).parent.glob("remote/*.py"))
    of_csa = {
        "layer_kinds", "window", "csa_rate", "hca_rate", "compress_theta", "index_heads", "index_dim", "index_topk",
        "output_groups", "output_latent",
    }  # fmt: skip
    unused = {
        item.name for item in dataclasses.fields(ModelConfig) if item.name in SHAPE and f".{item.name}" not in code
    }
    assert unused - of_csa <= {"mtp_depth", "init_std"}
