"""Paths in the configuration. `~` means a home directory in each of them."""

from __future__ import annotations

import os

from elastic_moe.config.schema import TrainConfig
from elastic_moe.errors import UserError


def check_paths(config: TrainConfig) -> None:
    """Check the paths of a configuration.

    Raises:
        UserError: one begins with a home directory that is not known.
    """
    data = config.data
    for key, value in (
        ("run.dir", config.run.dir),
        ("checkpoint.dir", config.checkpoint.dir),
        ("data.corpus", data.corpus),
        ("data.cache_dir", data.cache_dir),
        ("data.tokenizer", data.tokenizer),
        ("model.init_from", config.model.init_from),
        *(("data.mixture", corpus) for corpus in data.mixture),
    ):
        check_home(key, value)


def check_home(key: str, value: str) -> None:
    """Refuse a path that begins with the home directory of a user who is not known here.

    Raises:
        UserError: it does.
    """
    if value.startswith("~") and os.path.expanduser(value).startswith("~"):
        raise UserError(f"{key}={value}: this machine has no home directory {value.partition('/')[0]}.")
