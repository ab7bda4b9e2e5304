"""Composing and checking the configuration of a command line, before anything starts or is written.

Hydra reports a bad key with a paragraph, and a bad value after it made directories. Here the whole command line is
composed first (every job of a sweep), and a fault becomes one sentence.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from elastic_moe.cli.hydra_internals import BASIC_SWEEPER, fixed_overrides, split_jobs
from elastic_moe.config.build import build, unknown_key
from elastic_moe.config.reference import config_dir
from elastic_moe.config.schema import TrainConfig
from elastic_moe.errors import UserError
from elastic_moe.origin import with_origin

BAD_CONFIG = 2  # exit code
REFUSED = "hydra_ray_launcher"  # part of the names of launchers that cannot work


def register_schema() -> None:
    """Tell Hydra the typed defaults that conf/train.yaml begins with."""
    ConfigStore.instance().store(name="schema", node=TrainConfig)


def one_sentence(error: BaseException) -> str:
    """The message of a Hydra or OmegaConf error as one sentence that names the key."""
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


@dataclass(frozen=True)
class Checked:
    """A command line that was checked.

    Attributes:
        configs: of each job; of a sweep whose jobs are not known before, the part that they have in common.
        launcher: name of the class that runs the jobs of a sweep; "" without a sweep.
    """

    configs: list[TrainConfig]
    launcher: str = ""


def check(
    overrides: Sequence[str], config_name: str = "train", multirun: bool = False, user_dir: str = ""
) -> list[TrainConfig]:
    """The configurations of `check_command`."""
    return check_command(overrides, config_name, multirun, user_dir).configs


def check_command(
    overrides: Sequence[str], config_name: str = "train", multirun: bool = False, user_dir: str = ""
) -> Checked:
    """Compose and check every job of a command line without starting or writing anything.

    The jobs of a sweeper that is not Hydra's own are its affair: only what they have in common is checked.

    Args:
        overrides: of the command line.
        config_name: the primary configuration.
        multirun: the overrides are those of a sweep.
        user_dir: directory with configurations of the user, as `--config-dir` names it; "": none.

    Raises:
        UserError: with one sentence about the first fault found.
    """
    if user_dir and not Path(user_dir).is_dir():
        raise UserError(f"--config-dir: there is no directory {user_dir}.")
    quoted = str(Path(user_dir).absolute()).replace("'", "\\'")
    more = [f"hydra.searchpath=['file://{quoted}']"] if user_dir else []
    try:
        with initialize_config_dir(version_base=None, config_dir=str(config_dir())):
            jobs, launcher = [list(overrides)], ""
            if multirun:
                jobs, launcher = _jobs(overrides, config_name, more)
            return Checked(
                [build(with_origin(compose(config_name, overrides=[*job, *more]))) for job in jobs], launcher
            )
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(one_sentence(error)) from error


def _jobs(overrides: Sequence[str], config_name: str, more: list[str]) -> tuple[list[list[str]], str]:
    """The overrides of each job of a sweep as far as they are known, and the name of its launcher."""
    own, of_hydra = fixed_overrides(overrides)
    config = compose(config_name, overrides=[*own, *of_hydra, *more], return_hydra_config=True).hydra
    launcher, sweeper = str(config.launcher._target_), config.sweeper
    if REFUSED in launcher:
        raise UserError(
            "hydra/launcher=ray holds CPUs of the cluster for each trial while its workers need them: use "
            "hydra/launcher=elastic, which runs trials side by side on one Ray cluster."
        )
    if str(sweeper._target_) != BASIC_SWEEPER:
        return [own], launcher
    params = [f"{key}={value}" for key, value in (sweeper.params or {}).items()]
    return split_jobs([*params, *overrides]), launcher
