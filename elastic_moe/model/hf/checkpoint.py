"""Hugging Face checkpoint directories, read and written tensor by tensor.

A reader opens the headers of a directory's files and then reads only the tensors it is asked for. So a worker reads the
units it owns, and no process needs to see all weights. A writer takes one tensor at a time and fills files of a bounded
size. Names and layouts are those of families.py. Needs safetensors besides torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from elastic_moe.config.schema import ModelConfig
from elastic_moe.errors import UserError
from elastic_moe.model.experts.local import LocalExperts
from elastic_moe.model.hf.config_json import config_of, family_of, fields_of
from elastic_moe.model.hf.families import FAMILIES, OWN
from elastic_moe.model.hf.files import FLOATS, INDEX, INTEGERS, SINGLE, read_headers, read_json
from elastic_moe.model.hf.own_format import copy_code
from elastic_moe.model.hf.quantized import block_of
from elastic_moe.model.hf.stored import Place, StoredWeights, aliases, count, find
from elastic_moe.model.params import param_specs
from elastic_moe.model.transformer import Transformer
from elastic_moe.types import ParamSpec

CONFIG_JSON = "config.json"
SHARD_BYTES = 4 << 30


def read_fields(directory: str | Path) -> dict[str, Any]:
    """Fields of ModelConfig that the config.json of a directory implies.

    Raises:
        UserError: the file cannot be read, or its model cannot be expressed.
    """
    return fields_of(read_json(Path(directory) / CONFIG_JSON), Path(directory))


class HFCheckpoint:
    """A directory of safetensors, read by our parameter names.

    Args:
        directory: with config.json and one or several safetensors files.
        cfg: the model's shape: the fields that the directory implies, and the caller's for the rest.

    Raises:
        UserError: a tensor is missing or has another shape, a file cannot be read, or the files hold weights that this
            model has no place for.
    """

    def __init__(self, directory: str | Path, cfg: ModelConfig) -> None:
        self._directory = Path(directory)
        config = read_json(self._directory / CONFIG_JSON)
        fields_of(config, self._directory)
        self._family = FAMILIES[config["model_type"]]
        self._tied = bool(config.get("tie_word_embeddings"))
        self._stored = read_headers(self._directory)
        block = block_of(config, str(self._directory / CONFIG_JSON))
        self._weights = StoredWeights(self._directory, self._stored, block)
        self._check(cfg)

    def _find(self, ours: str) -> Place | None:
        """Place in the files of a parameter of ours; None when the family has no such parameter."""
        theirs = self._family.name(ours)
        if theirs is None:
            return None
        if theirs == "lm_head.weight" and self._tied and theirs not in self._stored:
            theirs = "model.embed_tokens.weight"
        return find(theirs, self._stored)

    def _check(self, cfg: ModelConfig) -> None:
        self._check_count(cfg)
        used: set[str] = set()
        for spec in param_specs(cfg):
            place = self._find(spec.name)
            if place is None or (_is_balancing_bias(spec) and place.name not in self._stored):
                continue
            types = INTEGERS if spec.init == "experts" else FLOATS
            used.update(self._weights.check(place, spec.shape, cfg.num_experts, types))
        extra = [n for n in self._stored if n not in used and not self._is_ignored(n, cfg)]
        if extra:
            raise UserError(f"{self._directory}: this model has no place for {extra[0]} and {len(extra) - 1} others.")

    def _check_count(self, cfg: ModelConfig) -> None:
        """Refuse a config.json that wants far more than the files hold, before anything is made of its size."""
        embed, wanted = str(self._family.name("embed.weight")), (cfg.vocab_size, cfg.hidden_size)
        name = next((alias for alias in aliases(embed) if alias in self._stored), None)
        if name is None:
            raise UserError(f"{self._directory} has no tensor {embed}.")
        if self._stored[name].shape != wanted:
            raise UserError(f"{self._directory}: {name} is {self._stored[name].shape}, not {wanted}.")
        largest = max(cfg.num_layers, cfg.num_experts * cfg.num_moe_layers)
        if largest > count(self._stored):
            raise UserError(
                f"{self._directory} has {count(self._stored)} tensors, too few for the layers and experts that "
                f"{CONFIG_JSON} names."
            )

    def _is_ignored(self, name: str, cfg: ModelConfig) -> bool:
        """Whether to leave a tensor out: empty, a rotary table, or of multi-token prediction, as transformers does."""
        empty = 0 in self._stored[name].shape
        predicts = name.startswith("mtp.") or f".layers.{cfg.num_layers}." in f".{name}"
        return empty or predicts or name.endswith("rotary_emb.inv_freq") or (self._tied and name == "lm_head.weight")

    def read(self, spec: ParamSpec) -> torch.Tensor | None:
        """A parameter's fp32 value; None when the directory has no such parameter."""
        place = self._find(spec.name)
        if place is None or place.name not in self._stored:
            return None
        return self._family.layout(spec.name)(self._weights.read(place)).contiguous()


class _ShardWriter:
    """Writes tensors to files of a bounded size, and the index when it is closed."""

    def __init__(self, directory: Path, shard_bytes: int) -> None:
        self._directory, self._limit = directory, shard_bytes
        self._pending: dict[str, torch.Tensor] = {}
        self._bytes = self._total = 0
        self._placed: list[list[str]] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._bytes + size > self._limit:
            self._flush()
        self._pending[name] = tensor.contiguous()
        self._bytes += size
        self._total += size

    def _flush(self) -> None:
        save_file(self._pending, self._directory / f".shard-{len(self._placed)}", metadata={"format": "pt"})
        self._placed.append(list(self._pending))
        self._pending, self._bytes = {}, 0

    def close(self) -> None:
        self._flush()
        count = len(self._placed)
        files = [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        for i, file in enumerate(files):
            (self._directory / f".shard-{i}").rename(self._directory / file)
        if count > 1:
            weight_map = {name: file for file, names in zip(files, self._placed, strict=True) for name in names}
            index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
            (self._directory / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")


def write_checkpoint(
    directory: str | Path,
    cfg: ModelConfig,
    read: Callable[[ParamSpec], torch.Tensor],
    seq_len: int,
    dtype: torch.dtype = torch.float32,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[Iterable[ParamSpec]], Iterable[ParamSpec]] = iter,
) -> list[str]:
    """Write config.json and safetensors that `transformers` loads with `from_pretrained`; with code where it needs it.

    Args:
        directory: is created; must not have a config.json.
        cfg: the model's shape.
        read: fp32 value of a parameter; called once for each, in order.
        seq_len: longest sequence trained on.
        dtype: of the weights written; router biases and tables keep theirs.
        shard_bytes: size that a file may reach.
        progress: wraps the iteration over the parameters, for instance to show its progress.

    Returns:
        Names of our parameters that the format has no place for: those of the multi-token prediction.

    Raises:
        UserError: the model cannot be expressed, or the directory has a config.json already.
    """
    kind = family_of(cfg)
    family, target = FAMILIES[kind], Path(directory)
    config = config_of(cfg, str(dtype).removeprefix("torch."), seq_len)
    if (target / "config.json").exists():
        raise UserError(f"{target} has a config.json already; name another directory.")
    target.mkdir(parents=True, exist_ok=True)
    writer = _ShardWriter(target, shard_bytes)
    unwritten: list[str] = []
    for spec in progress(param_specs(cfg)):
        name = None if spec.name.startswith("mtp.") and kind != OWN else family.name(spec.name)
        if name is None:
            unwritten.append(spec.name)
            continue
        tensor = family.layout(spec.name)(read(spec))
        if spec.init == "experts":  # a table of expert indices
            tensor = tensor.long()
        elif _is_balancing_bias(spec):
            if kind == "qwen3_moe":
                _refuse_bias(spec.name, tensor)
                continue
        else:
            tensor = tensor.to(dtype)
        writer.add(name, tensor)
    for name, shape in _empty_shared(cfg, kind).items():
        writer.add(name, torch.empty(shape, dtype=dtype))
    writer.close()
    if kind == OWN:
        copy_code(target)
    (target / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    return unwritten


def _is_balancing_bias(spec: ParamSpec) -> bool:
    """Whether it changes at every step without a gradient. Families without such a bias have no tensor for it."""
    return spec.rule.published_each_step and not spec.rule.has_gradient


def _refuse_bias(name: str, bias: torch.Tensor) -> None:
    if bias.any():
        raise UserError(
            f"{name} is not zero, and Hugging Face's qwen3_moe has no balancing bias: "
            "train with model.bias_update_speed=0."
        )


def _empty_shared(cfg: ModelConfig, kind: str) -> Mapping[str, tuple[int, int]]:
    """Shapes by name of the shared experts of width 0 that two families require, where the model has none."""
    if cfg.num_shared_experts or kind not in ("deepseek_v3", "glm4_moe"):
        return {}
    shapes = {"gate": (0, cfg.hidden_size), "up": (0, cfg.hidden_size), "down": (cfg.hidden_size, 0)}
    return {
        f"model.layers.{layer}.mlp.shared_experts.{part}_proj.weight": shape
        for layer in range(cfg.num_dense_layers, cfg.num_layers)
        for part, shape in shapes.items()
    }


def load_model(directory: str | Path, **fields: Any) -> tuple[ModelConfig, Transformer, LocalExperts]:
    """Load the whole model of a directory into this process; for tests, small models and single devices.

    Args:
        directory: see `HFCheckpoint`.
        fields: fields of ModelConfig besides those of the directory.

    Raises:
        UserError: as `HFCheckpoint`.
    """
    cfg = ModelConfig(**{**read_fields(directory), **fields})
    checkpoint, experts = HFCheckpoint(directory, cfg), LocalExperts(cfg)
    model = Transformer(cfg, experts)
    model.initialize(0)
    tensors = named_tensors(model, experts)
    for spec in param_specs(cfg):
        value = checkpoint.read(spec)
        if value is not None:
            tensors[spec.name].copy_(value)
    return cfg, model, experts


def named_tensors(model: Transformer, experts: LocalExperts) -> dict[str, torch.Tensor]:
    """Views of every parameter and buffer of a whole model, by the names of `param_specs`, without gradients."""
    tensors = {name: p.data for name, p in model.named_parameters()} | dict(model.named_buffers())
    return tensors | experts.named_views()
