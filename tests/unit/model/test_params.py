"""Parameter specs match the module, and initial values depend on (seed, name) alone."""

from __future__ import annotations

import pytest
import torch

from elastic_moe.config.schema import ModelConfig
from elastic_moe.model.init import init_param
from elastic_moe.model.params import param_specs
from elastic_moe.model.transformer import Transformer
from elastic_moe.types import ParamSpec

CONFIGS = [
    ModelConfig(),
    ModelConfig(num_dense_layers=0, num_layers=2, num_shared_experts=0),
    ModelConfig(num_dense_layers=2, num_layers=2),
    ModelConfig(num_shared_experts=3, num_heads=6, num_kv_heads=3, head_dim=8),
]


@pytest.mark.parametrize("cfg", CONFIGS, ids=range(len(CONFIGS)))
def test_specs_are_the_modules_parameters(cfg: ModelConfig) -> None:
    specs = param_specs(cfg)
    assert len({spec.name for spec in specs}) == len(specs)
    dense = {spec.name: spec.shape for spec in specs if spec.expert is None and spec.optimizer == "adamw"}
    biases = {spec.name: spec.shape for spec in specs if spec.optimizer == "bias"}
    model = Transformer(cfg)
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == dense
    assert {name: tuple(b.shape) for name, b in model.named_buffers()} == biases
    moe_layers = cfg.num_layers - cfg.num_dense_layers
    assert len([spec for spec in specs if spec.expert is not None]) == 3 * cfg.num_experts * moe_layers
    assert len(biases) == moe_layers


def test_expert_specs_say_where_they_belong() -> None:
    specs = {spec.name: spec for spec in param_specs(ModelConfig())}
    gate = specs["layers.2.moe.experts.7.gate"]
    assert (gate.layer, gate.moe_layer, gate.expert, gate.shape, gate.decay) == (2, 1, 7, (64, 128), True)
    assert specs["layers.2.moe.experts.7.down"].shape == (128, 64)
    bias = specs["layers.2.moe.router.bias"]
    assert (bias.layer, bias.moe_layer, bias.expert, bias.optimizer, bias.decay) == (2, 1, None, "bias", False)
    assert not specs["layers.0.attn_norm.weight"].decay
    assert specs["layers.0.mlp.up.weight"].decay


def test_init_depends_on_seed_and_name_alone() -> None:
    spec = ParamSpec("a", (64, 64), std=0.5)
    first = init_param(spec, 3)
    torch.manual_seed(123)
    torch.randn(7)
    assert torch.equal(first, init_param(spec, 3))
    assert not torch.equal(first, init_param(spec, 4))
    assert not torch.equal(first, init_param(ParamSpec("b", (64, 64), std=0.5), 3))
    assert first.dtype == torch.float32
    assert abs(float(first.std()) - 0.5) < 0.02
    assert abs(float(first.mean())) < 0.03
    assert torch.equal(init_param(ParamSpec("n", (3,), init="ones"), 0), torch.ones(3))
    assert torch.equal(init_param(ParamSpec("n", (3,), init="zeros"), 0), torch.zeros(3))


def test_initialize_sets_every_dense_tensor() -> None:
    cfg = ModelConfig(vocab_size=32, hidden_size=16, num_layers=2, num_experts=4, dense_hidden=16, expert_hidden=8)
    model = Transformer(cfg)
    model.initialize(5)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    for spec in param_specs(cfg):
        if spec.expert is None:
            assert torch.equal(tensors[spec.name], init_param(spec, 5)), spec.name
