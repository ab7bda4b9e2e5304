"""A tiny random model of transformers, and its parity with what is read from a directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from elastic_moe.model.hf.checkpoint import HFCheckpoint, load_model
from elastic_moe.model.hf.families import FAMILIES
from elastic_moe.model.params import param_specs

transformers = pytest.importorskip("transformers")


def random_model(config: Any) -> Any:
    """A model of transformers in which nothing is zero or one."""
    model = getattr(transformers, FAMILIES[config.model_type].architecture)(config).float().eval()
    model.set_experts_implementation("eager")  # grouped_mm refuses odd widths
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith("tid2eid"):
                rows = [torch.randperm(config.n_routed_experts)[: tensor.shape[1]] for _ in range(len(tensor))]
                tensor.copy_(torch.stack(rows))
            elif "inv_freq" not in name and tensor.ndim == 1:
                tensor.add_(torch.randn_like(tensor) * 0.3)
            elif name.endswith("position_bias"):
                tensor.copy_(torch.randn_like(tensor))
    return model


def save(model: Any, where: Path, **options: Any) -> Path:
    model.save_pretrained(where, max_shard_size="40KB", **options)
    return where


def assert_parity(theirs: Any, directory: Path, grads: Path, seed: int) -> None:
    """Logits within 1e-5 and every parameter's gradient within 1e-4, relative to their size.

    Args:
        theirs: the model of transformers; its weights are replaced.
        directory: the same model, as we read it.
        grads: directory to write.
        seed: of the tokens.
    """
    cfg, model, experts = load_model(directory, seq_balance_weight=0.0, index_loss_weight=0.0)
    generator = torch.Generator().manual_seed(seed)
    tokens, targets = torch.randint(0, cfg.vocab_size, (2, 2, 24), generator=generator)
    expected = theirs(tokens, use_cache=False).logits
    size = expected.detach().abs().max()
    assert (model(tokens) - expected).abs().max() <= 1e-5 * max(1.0, float(size))

    out = model.loss(tokens, targets)
    loss = torch.nn.functional.cross_entropy(expected.flatten(0, 1), targets.flatten(), reduction="sum")
    assert float(out.ce_sum) == pytest.approx(float(loss.detach()), rel=1e-5)
    out.loss_sum.backward()
    theirs.zero_grad()
    loss.backward()
    with torch.no_grad():  # their gradients, as a checkpoint, read like weights
        for parameter in theirs.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    expected_grads = HFCheckpoint(save(theirs, grads), cfg)
    ours = {name: p.grad for name, p in model.named_parameters()} | experts.named_views(of_grad=True)
    largest = max(float(g.abs().max()) for g in ours.values() if g is not None)
    for spec in param_specs(cfg):
        if spec.optimizer == "adamw":
            expected_grad, grad = expected_grads.read(spec), ours[spec.name]
            assert expected_grad is not None
            assert grad is not None
            bound = 1e-4 * float(expected_grad.abs().max()) + 1e-6 * largest
            assert (grad - expected_grad).abs().max() <= bound, spec.name
