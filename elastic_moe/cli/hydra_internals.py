"""The internals of Hydra that the command line uses. tests/unit/cli/test_hydra_contract.py holds their behaviour.

Hydra has no public way to parse its flags, or to list the jobs of a sweep, without running them.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import create_config_search_path, get_args_parser
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.override_parser.overrides_parser import OverridesParser

from elastic_moe.errors import UserError

BASIC_SWEEPER = f"{BasicSweeper.__module__}.{BasicSweeper.__name__}"
_HOME = re.compile(r"(?<=[=,\[])~(?=[/,\]]|$)")  # the shell expands none of these, and Hydra's grammar has no ~ there
_SPECIAL = re.compile(r"([\\()\[\]{}:=, \t])")  # characters that Hydra's grammar wants escaped


def parse_flags() -> argparse.Namespace:
    """Hydra's flags and the overrides of the command line in sys.argv, which may stand in any order.

    Hydra reads sys.argv again. So it is left in the order that Hydra takes, with `~/` as the home directory.
    """
    flags = get_args_parser().parse_intermixed_args()
    overrides = Counter(flags.overrides)
    others = [text for text in sys.argv[1:] if not overrides[text]]
    flags.overrides = with_home(flags.overrides)
    sys.argv[1:] = [*flags.overrides, *others]
    return flags


def with_home(overrides: Sequence[str]) -> list[str]:
    """The overrides with the home directory for a `~` that begins a value."""
    home = _SPECIAL.sub(r"\\\1", os.path.expanduser("~"))
    return [_HOME.sub(lambda _: home, override) for override in overrides]


def loader_of(folder: Path, user_dir: str) -> ConfigLoader:
    """Hydra's loader of the configurations in a folder, and in one of the user's ("": none), which comes first."""
    path = create_config_search_path(str(folder))
    if user_dir:
        found = f"file://{Path(user_dir).absolute()}"
        path.prepend(provider="command-line", path=found, anchor=SearchPathQuery(provider="schema"))
    return ConfigLoaderImpl(config_search_path=path)


def split_jobs(overrides: Sequence[str], loader: ConfigLoader) -> list[list[str]]:
    """The overrides of each job of a sweep: the product of the values given to its keys.

    Args:
        overrides: of the command line.
        loader: knows the options that `model=glob(*)` means.

    Raises:
        UserError: a key has no value at all, or an interval of them.
    """
    parsed = OverridesParser.create(config_loader=loader).parse_overrides(list(overrides))
    own = [item for item in parsed if not item.is_hydra_override()]
    for item in own:
        if item.is_sweep_override() and not item.is_discrete_sweep():
            raise UserError(
                f"{item.input_line} is an interval, of which Hydra's basic sweeper cannot choose values: list them, as "
                "in key=1,2, or give hydra/sweeper=optuna."
            )
        if item.is_sweep_override() and not list(item.sweep_string_iterator()):
            raise UserError(f"{item.input_line} has no value, so there is no job to run.")
    return [list(job) for batch in BasicSweeper.split_arguments(own, None) for job in batch]


def fixed_overrides(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """The overrides with one value: those of the jobs, and those of Hydra itself."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    fixed = [item for item in parsed if not item.is_sweep_override()]
    lines = [[item.input_line or "" for item in fixed if item.is_hydra_override() == of] for of in (False, True)]
    return lines[0], lines[1]
