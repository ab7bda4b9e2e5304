"""A model is opened from a run directory, from one of its checkpoints, or refused with a sentence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from elastic_moe.checkpoint.shards import write_shard
from elastic_moe.checkpoint.writer import write_manifest
from elastic_moe.config.schema import DataConfig, ModelConfig, RunConfig, TrainConfig
from elastic_moe.data.tokenizer import BytesTokenizer, with_tokenizer
from elastic_moe.errors import UserError
from elastic_moe.model.init import init_param
from elastic_moe.model.params import param_specs
from elastic_moe.plan.state.units import build_units
from elastic_moe.run_dir import CONFIG, TOKENIZER, checkpoint_root, step_dir
from elastic_moe.saved import open_model

MODEL = ModelConfig(
    hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, dense_hidden=16,
    num_experts=4, experts_per_token=2, expert_hidden=8, vocab_size=257, max_unit_elements=512,
)  # fmt: skip


def config_of(run_dir: Path, **groups: Any) -> TrainConfig:
    return TrainConfig(run=RunConfig(dir=str(run_dir)), model=MODEL, data=DataConfig(seq_len=48), **groups)


def checkpoint(root: str, step: int, seed: int) -> Mapping[str, torch.Tensor]:
    """Write a checkpoint whose weights are the initial values of a seed. Returns them by parameter."""
    values = {spec.name: init_param(spec, seed) for spec in param_specs(MODEL)}
    tensors = {}
    for unit in build_units(param_specs(MODEL), MODEL.max_unit_elements):
        pieces = [values[part.param].flatten()[part.start : part.start + part.numel] for part in unit.parts]
        tensors |= {f"{unit.name}/{name}": torch.cat(pieces) for name in unit.rule.fields}
    write_manifest(root, step, [write_shard(root, step, "r0", tensors)])
    return values


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run directory without checkpoints."""
    directory = tmp_path / "run"
    directory.mkdir()
    OmegaConf.save(OmegaConf.create(asdict(config_of(directory))), directory / CONFIG)
    BytesTokenizer().save(directory / TOKENIZER)
    return directory


def test_a_run_has_the_weights_of_its_newest_checkpoint(run_dir: Path) -> None:
    root = checkpoint_root(config_of(run_dir))
    old, new = checkpoint(root, 10, 1), checkpoint(root, 20, 2)
    saved = open_model(str(run_dir))
    assert (saved.what, saved.seq_len, saved.cfg.vocab_size, saved.cfg.end_token) == ("step 20 of run", 48, 257, 256)
    assert saved.tokenizer is not None
    for spec in param_specs(MODEL):
        assert torch.equal(saved.read(spec), new[spec.name]), spec.name
    spec = next(spec for spec in param_specs(MODEL) if spec.expert is not None)
    for path, step in ((run_dir, 10), (Path(root) / step_dir(10), None)):
        assert torch.equal(open_model(str(path), step).read(spec), old[spec.name])


def test_a_moved_run_is_found(run_dir: Path) -> None:
    values = checkpoint(checkpoint_root(config_of(run_dir)), 10, 1)
    moved = run_dir.rename(run_dir.with_name("moved"))
    spec = param_specs(MODEL)[0]
    assert torch.equal(open_model(str(moved)).read(spec), values[spec.name])


def test_other_paths_are_user_errors(run_dir: Path) -> None:
    with pytest.raises(UserError, match="neither a run directory"):
        open_model(str(run_dir.parent))
    with pytest.raises(UserError, match="no complete checkpoint"):
        open_model(str(run_dir))
    checkpoint(checkpoint_root(config_of(run_dir)), 10, 1)
    with pytest.raises(UserError, match="no complete checkpoint of step 11"):
        open_model(str(run_dir), 11)


def test_a_tokenizer_larger_than_the_weights_is_refused() -> None:
    tokenizer = BytesTokenizer()
    small = ModelConfig(init_from="elsewhere", vocab_size=200)
    with pytest.raises(UserError, match=r"data\.tokenizer has 257 tokens"):
        with_tokenizer(small, tokenizer)
    large = with_tokenizer(ModelConfig(init_from="elsewhere", vocab_size=512), tokenizer)
    assert (large.vocab_size, large.end_token) == (512, 256)
    free = with_tokenizer(ModelConfig(vocab_size=512), tokenizer)
    assert (free.vocab_size, free.end_token) == (257, 256)
