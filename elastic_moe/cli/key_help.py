"""The help of the commands that take configuration keys."""

from __future__ import annotations

import shutil

from elastic_moe.config.reference import help_text


def show_help(command: str, title: str) -> None:
    """Print every configuration key with its default, values and meaning, as wide as the terminal allows."""
    width = max(60, min(shutil.get_terminal_size().columns, 120))
    print(help_text(title, f"elastic-moe {command} [model=OPTION] [cluster=OPTION] [KEY=VALUE ...]", width))
