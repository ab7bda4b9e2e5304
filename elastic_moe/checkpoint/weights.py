"""Reads the weights of a finished or running run, one parameter at a time, for export and for generating text.

A run is named by its directory, or by one of its checkpoints. Only weights are read, never the rest of the optimizer
state, and only from the units that hold a part of the parameter.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from elastic_moe.checkpoint.manifest import Manifest
from elastic_moe.checkpoint.reader import find_latest, load_manifest
from elastic_moe.checkpoint.shards import read_units
from elastic_moe.checkpoint.storage import CorruptCheckpoint, StorageUnavailable
from elastic_moe.config.schema import ModelConfig
from elastic_moe.errors import UserError
from elastic_moe.model.params import param_specs
from elastic_moe.plan.state.units import build_units
from elastic_moe.run_dir import CONFIG, step_of
from elastic_moe.types import ParamSpec, Part


def find_checkpoint(root: str, step: int | None = None) -> Manifest:
    """Find the checkpoint of a step below a checkpoint root, or the newest one if the step is None.

    Raises:
        UserError: there is no such checkpoint, or it is unfinished or damaged.
    """
    try:
        manifest = find_latest(root) if step is None else load_manifest(root, step)
    except StorageUnavailable as error:
        raise UserError(f"{root} cannot be read: {error}.") from error
    except OSError as error:
        raise UserError(
            f"{root} has no complete checkpoint{'' if step is None else f' of step {step}'}: {error}."
        ) from error
    if manifest is None:
        raise UserError(f"{root} has no complete checkpoint.")
    return manifest


def locate(path: str) -> tuple[Path, str | None, int | None]:
    """Interpret a path that a user gave: a run directory, or one of its checkpoints.

    Returns:
        The run directory, the checkpoint root and the step. For a run directory the root and the step are None: the
        run's configuration names the root.

    Raises:
        UserError: it is neither a run directory nor one of its checkpoints.
    """
    given = Path(path).expanduser().absolute()
    step = step_of(given.name)
    run_dir = given.parent.parent if step is not None else given
    if not (run_dir / CONFIG).is_file():
        raise UserError(f"{path} is neither a run directory (with {CONFIG}) nor a checkpoint in one.")
    return run_dir, None if step is None else str(given.parent), step


def weight_reader(manifest: Manifest, cfg: ModelConfig, optimizer: str) -> Callable[[ParamSpec], torch.Tensor]:
    """Make a function that reads the fp32 value of a parameter from a checkpoint.

    `optimizer` is the run's `optim.name`, on which the cuts of large tensors depend.

    The function returns a tensor of the parameter's shape on the CPU. It raises UserError if the checkpoint is of
    another model.
    """
    pieces: dict[str, list[tuple[str, Part]]] = {}
    for unit in build_units(param_specs(cfg, optimizer), cfg.max_unit_elements):
        for part in unit.parts:
            pieces.setdefault(part.param, []).append((unit.name, part))
    last: dict[
        str, torch.Tensor
    ] = {}  # one unit holds the three matrices of an expert, which are read one after the other

    def read(spec: ParamSpec) -> torch.Tensor:
        names = [name for name, _ in pieces[spec.name]]
        missing = [name for name in names if name not in last]
        if missing:
            last.clear()
            try:
                last.update({name: parts["weight"] for name, parts in read_units(manifest, names, ("weight",)).items()})
            except (KeyError, CorruptCheckpoint) as error:
                raise UserError(
                    f"step {manifest.step} of {manifest.root_uri} cannot be read as this model: {error}."
                ) from error
        whole = torch.cat([last[name][part.offset : part.offset + part.numel] for name, part in pieces[spec.name]])
        return whole.view(spec.shape).clone()

    return read
