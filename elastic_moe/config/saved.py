"""The configuration that a run directory keeps."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf

from elastic_moe.config.build import build
from elastic_moe.config.renamed import translate
from elastic_moe.config.schema import TrainConfig
from elastic_moe.errors import UserError
from elastic_moe.run_dir import CONFIG


def read_config(run_dir: Path) -> TrainConfig:
    """The configuration with which a run was started last, under the present names of its keys.

    Raises:
        UserError: it is no configuration.
        OSError: it cannot be read.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        node = OmegaConf.to_container(OmegaConf.load(run_dir / CONFIG))
        if not isinstance(node, dict):
            raise UserError(f"{run_dir / CONFIG} is no configuration of a run.")
        values = cast(dict[str, Any], node)
        values.pop("hydra", None)
        return build(translate(values), inputs=False)
