"""The places of a start: absolute paths, run directory, a device that is there, and what `run.overwrite` deletes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from elastic_moe.checkpoint.writer import remove_all
from elastic_moe.config.schema import TrainConfig
from elastic_moe.coordination.start import Found
from elastic_moe.errors import UserError
from elastic_moe.run_dir import (
    ABANDONED_METRICS,
    EVENTS,
    EXPERTS,
    FAULTS,
    GOODPUT,
    METRICS,
    REPORT,
    SUMMARY,
    TRACKING,
    local_path,
)


def absolute(config: TrainConfig) -> TrainConfig:
    """The configuration with places that do not depend on the directory in which a process works."""
    run_dir, root = Path(config.run.dir).expanduser().absolute(), config.checkpoint.dir
    if root and (path := local_path(root)) is not None:
        root = str(path)
    return replace(config, run=replace(config.run, dir=str(run_dir)), checkpoint=replace(config.checkpoint, dir=root))


def check_device(config: TrainConfig) -> None:
    """Refuse a GPU where there is none. On a cluster of other machines each worker checks its own."""
    if config.device != "cuda" or config.cluster.kind == "address":
        return
    import torch  # for this alone, and it takes seconds

    if not torch.cuda.is_available():
        raise UserError("device is cuda, and this machine has no GPU that torch can use; set device=cpu or auto.")


def clear(found: Found) -> None:
    """Delete the run in this directory, as `run.overwrite` asks: its records, its checkpoints and its faults' markers.

    Without `run.overwrite` there is none here, see `check_start`.
    """
    run_dir = found.run_dir
    if found.steps:
        remove_all(found.root)
    for name in (METRICS, EVENTS, EXPERTS, GOODPUT, SUMMARY, TRACKING, REPORT):
        (run_dir / name).unlink(missing_ok=True)
    for path in (*(run_dir / FAULTS).glob("*"), *run_dir.glob(ABANDONED_METRICS)):
        path.unlink()
