"""The internals of Hydra that the command line uses. tests/unit/cli/test_hydra_contract.py holds their behaviour.

Hydra has no public way to parse its flags, or to list the jobs of a sweep, without running them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser


def parse_flags() -> argparse.Namespace:
    """Hydra's flags and the overrides of the command line in sys.argv."""
    return get_args_parser().parse_args()


BASIC_SWEEPER = f"{BasicSweeper.__module__}.{BasicSweeper.__name__}"


def split_jobs(overrides: Sequence[str]) -> list[list[str]]:
    """The overrides of each job of a sweep: the product of the values given to its keys."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    own = [item for item in parsed if not item.is_hydra_override()]
    return [list(job) for batch in BasicSweeper.split_arguments(own, None) for job in batch]


def fixed_overrides(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """The overrides with one value: those of the jobs, and those of Hydra itself."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    fixed = [item for item in parsed if not item.is_sweep_override()]
    lines = [[item.input_line or "" for item in fixed if item.is_hydra_override() == of] for of in (False, True)]
    return lines[0], lines[1]
