"""Composing and checking the configuration of a command line, before anything starts or is written.

Hydra reports a bad key with a paragraph, and a bad value after it made directories. Here the whole command line is
composed first (every job of a sweep), and a fault becomes one sentence.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from elastic_moe.cli.hydra_internals import BASIC_SWEEPER, fixed_overrides, loader_of, split_jobs, with_home
from elastic_moe.config.build import build, unknown_key
from elastic_moe.config.reference import config_dir
from elastic_moe.config.schema import TrainConfig
from elastic_moe.errors import UserError
from elastic_moe.origin import with_origin
from elastic_moe.sweep.values import hydra_values, without_hydra

BAD_CONFIG = 2  # exit code
REFUSED = "hydra_ray_launcher"  # part of the names of launchers that cannot work

# Here, so that a process which is handed a job has it too: Hydra makes its directories from `run.dir`.
OmegaConf.register_new_resolver("elastic_moe.home", os.path.expanduser, replace=True)

# What Hydra says in a paragraph, and the sentence for it.
SENTENCES = (
    (r"Sweep parameters '(.*)' requires --multirun", "{} has several values: give -m to sweep over them."),
    (
        r"Ambiguous value for argument '(.*)'",
        "{} has several values: give -m to sweep over them, or write key=[a,b] for a list.",
    ),
    (r"Could not append to config\. An item is already at '(.*)'", "{} is there already: leave out the + before it."),
    (
        r"Could not delete from config\. The value of '(.*)' is (.*) and not (.*)\.",
        "~{0}={2} deletes nothing, since {0} is {1}.",
    ),
    (r"Error merging override (.*)\n.*is not Optional", "{}: a value is needed, and null is none."),
    (r"(?:RecursionError raised|Recursive interpolation detected)[^\n]*\n\s*full_key: (\S+)", "{} is made of itself."),
    (r"Interpolation key '(.*)' not found\s+full_key: (\S+)", "{1} needs {0}, which is not there."),
    (
        r"LexerNoViableAltException: (.*)",
        "{} cannot be read: put quotes around the value, and others around it all: 'key=\"value\"'.",
    ),
)


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
    for pattern, sentence in SENTENCES:
        if match := re.search(pattern, text):
            return sentence.format(*match.groups())
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
        sweep: what the jobs of a sweep have in common, with Hydra's own node; None without a sweep.
    """

    configs: list[TrainConfig]
    sweep: DictConfig | None = None

    @property
    def launcher(self) -> str:
        """Name of the class that runs the jobs of a sweep; "" without a sweep."""
        return "" if self.sweep is None else str(self.sweep.hydra.launcher._target_)


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
    given = with_home(overrides)
    try:
        with initialize_config_dir(version_base=None, config_dir=str(config_dir())):
            if not multirun:
                return Checked([_built(config_name, [*given, *more])])
            jobs, sweep = _jobs(given, config_name, more, user_dir)
            return Checked([_built(config_name, [*job, *more], number) for number, job in enumerate(jobs)], sweep)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(one_sentence(error)) from error


def _built(config_name: str, overrides: Sequence[str], number: int | None = None) -> TrainConfig:
    """The configuration of one job, whose `hydra` node has what it will have in the job.

    Args:
        config_name: the primary configuration.
        overrides: of the job.
        number: of the job in its sweep; None: there is none.
    """
    config = compose(config_name, list(overrides), return_hydra_config=True)
    hydra = config.hydra
    with read_write(hydra), open_dict(hydra):
        hydra.mode = RunMode.RUN if number is None else RunMode.MULTIRUN
        if number is not None:
            hydra.job.num = number
            hydra.job.id = str(number)
    with hydra_values(config):
        output = hydra.run.dir if number is None else os.path.join(str(hydra.sweep.dir), str(hydra.sweep.subdir))
    with read_write(config.hydra.runtime), open_dict(config.hydra.runtime):
        config.hydra.runtime.output_dir = os.path.abspath(str(output))
    with hydra_values(config):
        return build(with_origin(without_hydra(config)))


def _jobs(
    overrides: Sequence[str], config_name: str, more: list[str], user_dir: str
) -> tuple[list[list[str]], DictConfig]:
    """The overrides of each job of a sweep as far as they are known, and what the jobs have in common."""
    own, of_hydra = fixed_overrides(overrides)
    config = compose(config_name, overrides=[*own, *of_hydra, *more], return_hydra_config=True)
    sweeper = config.hydra.sweeper
    if REFUSED in str(config.hydra.launcher._target_):
        raise UserError(
            "hydra/launcher=ray holds CPUs of the cluster for each trial while its workers need them: use "
            "hydra/launcher=elastic, which runs trials side by side on one Ray cluster."
        )
    if str(sweeper._target_) != BASIC_SWEEPER:
        return [own], config
    params = [f"{key}={value}" for key, value in (sweeper.params or {}).items()]
    return split_jobs([*params, *overrides], loader_of(config_dir(), user_dir)), config
