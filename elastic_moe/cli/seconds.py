"""Numbers of seconds on a command line."""

from __future__ import annotations

import argparse

from elastic_moe.errors import UserError


def check_seconds(options: argparse.Namespace, *names: str) -> None:
    """Refuse seconds that are no time to wait for; None, where an option was not given, is none.

    Raises:
        UserError: the value of one of these options is not finite, or not above 0.
    """
    for name in names:
        if (value := getattr(options, name)) is not None and not 0 < value < float("inf"):
            raise UserError(f"--{name} must be a number of seconds above 0, not {value:g}")
