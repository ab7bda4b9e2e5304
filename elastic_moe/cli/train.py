"""The command line: `python -m elastic_moe.train key=value ...`, or `elastic-moe-train`; `-m` runs a sweep.

The only place that knows Hydra. Hydra reports a bad key with a paragraph and exit code 1, and a bad value after it made
directories; so the command line is first composed and checked here (every job of a sweep), and only then handed to
Hydra. A bad configuration ends with exit code 2 and one sentence, before Ray is imported.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

import hydra
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from elastic_moe.config.build import build, unknown_key
from elastic_moe.config.schema import TrainConfig
from elastic_moe.errors import UserError
from elastic_moe.metrics.report.page import write_report

BAD_CONFIG = 2
SIGNALLED = 128  # exit codes from here on: the run was stopped by a signal


def config_dir() -> Path:
    """Where the YAML files are: inside the installed package, or at the top of a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def register_schema() -> None:
    """Tell Hydra the typed defaults that conf/train.yaml begins with."""
    ConfigStore.instance().store(name="schema", node=TrainConfig)


def one_sentence(error: BaseException) -> str:
    """What a Hydra or OmegaConf error means for the user, in one sentence that names the key."""
    text = "\n".join(filter(None, (str(error), str(error.__cause__ or ""))))
    if match := re.search(r"Could not find '([^'/]+)/([^']+)'", text):
        options = re.findall(r"^\t(\S+)$", text, re.MULTILINE)
        known = f"; it can be {', '.join(options)}." if options else "."
        return f"{match[1]} has no option {match[2]}{known}"
    value_error = re.search(r"(Value '.*?' .*?could not be converted.*|Cannot convert .*|Invalid value .*)", text)
    full_key = re.search(r"full_key: (\S+)", text)
    if value_error and full_key:
        return f"{full_key[1]}: {value_error[1].strip().rstrip('.')}."
    unknown = re.search(r"Could not (?:override|append|delete)[^']*'([^']+)'", text)
    if unknown or (full_key and "not in" in text):
        key = unknown[1] if unknown else full_key[1] if full_key else ""
        return unknown_key(key)
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]).rstrip(".") + "."


def _jobs(overrides: Sequence[str], multirun: bool) -> list[list[str]]:
    """The overrides of each job: one job, or the product of a sweep's values."""
    if not multirun:
        return [list(overrides)]
    parsed = [
        item for item in OverridesParser.create().parse_overrides(list(overrides)) if not item.is_hydra_override()
    ]
    return [job for batch in BasicSweeper.split_arguments(parsed, None) for job in batch]


def check(overrides: Sequence[str], config_name: str = "train", multirun: bool = False) -> list[TrainConfig]:
    """Compose and check every job of a command line without starting or writing anything.

    Raises:
        UserError: with one sentence about the first fault found.
    """
    checked: list[TrainConfig] = []
    try:
        with initialize_config_dir(version_base=None, config_dir=str(config_dir())):
            for job in _jobs(overrides, multirun):
                checked.append(build(with_origin(compose(config_name, overrides=job))))
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(one_sentence(error)) from error
    return checked


def with_origin(config: DictConfig) -> DictConfig:
    """The configuration with what `model.init_from` says: the model's shape, and its tokenizer where the directory has one.

    Raises:
        UserError: the directory has no model that can be expressed here.
    """
    origin = config.model.init_from
    if not origin:
        return config
    from elastic_moe.data.tokenizer import TOKENIZER_FILE
    from elastic_moe.model.hf.checkpoint import read_fields  # torch is imported only where it is needed

    directory = Path(origin).expanduser().absolute()
    fields: dict[str, Any] = {"model": {**read_fields(directory), "init_from": str(directory)}}
    tokenizer = directory / TOKENIZER_FILE
    if tokenizer.is_file() and config.data.tokenizer == TrainConfig().data.tokenizer:
        fields["data"] = {"tokenizer": str(tokenizer)}
    merged = OmegaConf.merge(config, fields)
    assert isinstance(merged, DictConfig)
    return merged


def _own_run_dir(config: DictConfig) -> None:
    """Give a job of a sweep a run directory of its own: the one Hydra made for it by its number."""
    settings = HydraConfig.get()
    if settings.mode == RunMode.MULTIRUN:
        config.run.dir = f"{settings.sweep.dir}/{settings.sweep.subdir}"


def _run_job(config: DictConfig) -> int:
    _own_run_dir(config)
    try:
        config = with_origin(config)
        built = build(config)
        from elastic_moe.actors.driver import launch  # Ray is imported here, after everything was checked

        code = launch(built, OmegaConf.to_yaml(config, resolve=True))
    except UserError as error:
        return _complain(error)
    with suppress(UserError, OSError):  # a run that was stopped before its first step, or a full disk
        print(f"elastic_moe: drawn in {write_report(built.run.dir)}", file=sys.stderr)
    return code


def _one_cluster(configs: Sequence[TrainConfig]) -> AbstractContextManager[None]:
    """The cluster that the jobs of a sweep share, so that only the first one waits for Ray to start."""
    if len(configs) < 2:
        return nullcontext()
    from elastic_moe.actors.cluster import sweep_session  # Ray is imported here, after everything was checked

    return sweep_session(configs)


def _complain(error: UserError) -> int:
    print(f"elastic_moe: {error}", file=sys.stderr)
    return BAD_CONFIG


def _show_warning(message: Warning | str, *_: Any) -> None:
    print(f"elastic_moe: note: {message}", file=sys.stderr)


def main() -> int:
    """Run the command line; exit code 0 when every job committed its steps, 2 for a bad configuration."""
    register_schema()
    arguments = get_args_parser().parse_args()
    only_shows = arguments.help or arguments.hydra_help or arguments.cfg or arguments.info or arguments.shell_completion
    other_files = arguments.config_path or arguments.config_dir
    checked: list[TrainConfig] = []
    if not only_shows and not other_files:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # given once, by the job itself
                checked = check(arguments.overrides, arguments.config_name or "train", arguments.multirun)
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
