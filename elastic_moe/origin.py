"""The model of `model.init_from`: its shape, and its tokenizer, become part of the configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from elastic_moe.config.paths import check_home
from elastic_moe.config.schema import TrainConfig


def with_origin(config: DictConfig) -> DictConfig:
    """The configuration with the model's shape, and the tokenizer if there is one, of the directory `model.init_from`.

    Raises:
        UserError: the directory has no model that can be expressed here.
    """
    origin = OmegaConf.select(config, "model.init_from")
    if not origin or not isinstance(origin, str):
        return config  # a value of another type is refused by `config.build`
    from elastic_moe.data.tokenizer import TOKENIZER_FILE
    from elastic_moe.model.hf.checkpoint import read_fields  # torch is imported only where it is needed

    check_home("model.init_from", origin)
    directory = Path(origin).expanduser().absolute()
    fields: dict[str, Any] = {"model": {**read_fields(directory), "init_from": str(directory)}}
    tokenizer, default = directory / TOKENIZER_FILE, TrainConfig().data.tokenizer
    if tokenizer.is_file() and OmegaConf.select(config, "data.tokenizer", default=default) == default:
        fields["data"] = {"tokenizer": str(tokenizer)}
    merged = OmegaConf.merge(config, fields)
    assert isinstance(merged, DictConfig)
    return merged
