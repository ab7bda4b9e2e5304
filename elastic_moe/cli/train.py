"""`elastic-moe train key=value ...` trains; `-m` runs a sweep; `python -m elastic_moe.train` is the same command.

The command line is composed and checked first (cli/compose.py), and only then handed to Hydra. A bad configuration ends
with exit code 2 and one sentence, before Ray is imported.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from elastic_moe.cli.compose import check, register_schema
from elastic_moe.cli.hydra_internals import parse_flags
from elastic_moe.cli.key_help import show_help
from elastic_moe.config.build import build
from elastic_moe.config.reference import config_dir
from elastic_moe.config.schema import TrainConfig
from elastic_moe.errors import UserError
from elastic_moe.metrics.report.page import write_report
from elastic_moe.origin import with_origin

SIGNALLED = 128  # exit codes from here on: the run was stopped by a signal


def _own_run_dir(config: DictConfig) -> None:
    """Give a job of a sweep directories of its own: the one Hydra made by its number, and a checkpoint root."""
    settings = HydraConfig.get()
    if settings.mode == RunMode.MULTIRUN:
        config.run.dir = f"{settings.sweep.dir}/{settings.sweep.subdir}"
        if config.checkpoint.dir:
            config.checkpoint.dir = f"{config.checkpoint.dir.rstrip('/')}/{settings.sweep.subdir}"


def _run_job(config: DictConfig) -> int:
    _own_run_dir(config)
    try:
        config = with_origin(config)
        built = build(config)
        from elastic_moe.actors.driver import launch  # Ray is imported here, after everything was checked

        code = launch(built, OmegaConf.to_yaml(config, resolve=True))
    except UserError as error:
        return _complain(error)
    try:
        print(f"elastic_moe: drawn in {write_report(built.run.dir)}", file=sys.stderr)
    except (UserError, OSError):
        pass  # a run that was stopped before its first step, or a full disk
    except Exception as error:  # noqa: BLE001 - the run is over, and its picture is not worth its exit code
        print(f"elastic_moe: the report could not be drawn: {type(error).__name__}: {error}", file=sys.stderr)
    return code


def _one_cluster(configs: Sequence[TrainConfig]) -> AbstractContextManager[None]:
    """The cluster that the jobs of a sweep share, so that only the first one waits for Ray to start."""
    if len(configs) < 2:
        return nullcontext()
    from elastic_moe.actors.cluster import sweep_session  # Ray is imported here, after everything was checked

    return sweep_session(configs)


def _complain(error: UserError) -> int:
    print(f"elastic_moe: {error}", file=sys.stderr)
    return error.exit_code


def _show_warning(message: Warning | str, *_: Any) -> None:
    print(f"elastic_moe: note: {message}", file=sys.stderr)


def main() -> int:
    """Run the command line; exit code 0 when every job committed its steps, 2 for a bad configuration."""
    register_schema()
    arguments = parse_flags()
    if arguments.help:
        show_help("train", "Train a model on a cluster whose workers may come and go.")
        return 0
    only_shows = arguments.hydra_help or arguments.cfg or arguments.info or arguments.shell_completion
    checked: list[TrainConfig] = []
    if not only_shows and not arguments.config_path:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # given once, by the job itself
                name, own = arguments.config_name or "train", arguments.config_dir or ""
                checked = check(arguments.overrides, name, arguments.multirun, own)
        except UserError as error:
            return _complain(error)
    codes: list[int] = []

    def job(config: DictConfig) -> None:
        if max(codes, default=0) < SIGNALLED:  # Ctrl-C ends the whole sweep
            codes.append(_run_job(config))

    try:
        with warnings.catch_warnings(), _one_cluster(checked if arguments.multirun else []):
            warnings.showwarning = _show_warning
            hydra.main(version_base=None, config_path=str(config_dir()), config_name="train")(job)()
    except UserError as error:
        return _complain(error)
    return max(codes, default=0)


if __name__ == "__main__":
    sys.exit(main())
