"""Opens a trained model for export and for generating text: its shape, its tokenizer and its weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from elastic_moe.checkpoint.weights import find_checkpoint, locate, weight_reader
from elastic_moe.config.saved import read_config
from elastic_moe.config.schema import ModelConfig
from elastic_moe.data.tokenizer import (
    TOKENIZER_FILE,
    TextTokenizer,
    load_tokenizer,
    read_tokenizer_file,
    with_tokenizer,
)
from elastic_moe.errors import UserError
from elastic_moe.model.experts.local import LocalExperts
from elastic_moe.model.hf.checkpoint import HFCheckpoint, named_tensors, read_fields
from elastic_moe.model.params import param_specs
from elastic_moe.model.transformer import Transformer
from elastic_moe.run_dir import TOKENIZER, checkpoint_root
from elastic_moe.types import ParamSpec


@dataclass(frozen=True)
class SavedModel:
    """A model on disk.

    Attributes:
        cfg: its shape.
        read: returns the fp32 value of a parameter.
        tokenizer: None if the model has no tokenizer file.
        seq_len: tokens per sequence in training; 0 for a Hugging Face model.
        what: name of the model in one line, for people.
    """

    cfg: ModelConfig
    read: Callable[[ParamSpec], torch.Tensor]
    tokenizer: TextTokenizer | None
    seq_len: int
    what: str


def open_run(path: str, step: int | None = None) -> SavedModel:
    """Open a run directory or one of its checkpoints.

    Args:
        path: the directory.
        step: step of the checkpoint to open; the newest one, or the one that `path` names, if None.

    Raises:
        UserError: the path is neither, or has no complete checkpoint.
    """
    run_dir, root, own_step = locate(path)
    config = read_config(run_dir)
    if root is None:
        root = checkpoint_root(config, run_dir)
    tokenizer = load_tokenizer(run_dir / TOKENIZER)
    cfg = with_tokenizer(config.model, tokenizer)
    manifest = find_checkpoint(root, own_step if step is None else step)
    what = f"step {manifest.step} of {run_dir.name}"
    return SavedModel(cfg, weight_reader(manifest, cfg, config.optim.name), tokenizer, config.data.seq_len, what)


def open_hf(path: str) -> SavedModel:
    """Open a Hugging Face directory.

    Raises:
        UserError: its model cannot be expressed by the configuration.
    """
    directory = Path(path).expanduser().absolute()
    cfg = ModelConfig(**read_fields(directory))
    checkpoint = HFCheckpoint(directory, cfg)

    def read(spec: ParamSpec) -> torch.Tensor:
        value = checkpoint.read(spec)
        return torch.zeros(spec.shape) if value is None else value  # the family has no balancing bias

    tokenizer = read_tokenizer_file(directory / TOKENIZER_FILE) if (directory / TOKENIZER_FILE).is_file() else None
    return SavedModel(cfg, read, tokenizer, 0, directory.name)


def open_model(path: str, step: int | None = None) -> SavedModel:
    """Open a run, one of its checkpoints, or a Hugging Face directory (which has a config.json)."""
    if (Path(path).expanduser() / "config.json").is_file():
        return open_hf(path)
    return open_run(path, step)


def load_model(saved: SavedModel) -> Transformer:
    """The whole model on one device: a GPU where there is one.

    Raises:
        UserError: a weight is not finite.
    """
    with torch.device("meta"):
        experts = LocalExperts(saved.cfg, seed=None)
        model = Transformer(saved.cfg, experts)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    experts.to_empty(device=device)
    model.to_empty(device=device)
    tensors = named_tensors(model, experts)
    for spec in param_specs(saved.cfg):
        value = saved.read(spec)
        if not value.isfinite().all():
            raise UserError(f"{saved.what}: {spec.name} has values that are not finite, so no text can be made.")
        tensors[spec.name].copy_(value)
    return model
