"""The one console script: it hands over to a subcommand, and imports nothing before."""

from __future__ import annotations

import subprocess
import sys

import pytest

from elastic_moe import __version__
from elastic_moe.cli.main import SUBCOMMANDS, main


def test_help_lists_each_subcommand_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-h"]) == main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, meaning in SUBCOMMANDS.items():
        assert f"  {name:<13} {meaning}" in lines
    assert max(map(len, lines)) <= 100


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"elastic-moe {__version__}\n"


@pytest.mark.parametrize(("arguments", "words"), [(["trian"], "no subcommand 'trian'"), ([], "needs a subcommand")])
def test_an_unknown_subcommand_is_one_sentence(
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    assert "describe" in line


def test_subcommands_are_imported_only_when_called() -> None:
    code = (
        "import sys; from elastic_moe.cli.main import main; main(['-h']); "
        "print(sorted({'hydra', 'torch', 'ray', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_each_subcommand_has_a_help(name: str) -> None:
    command = [sys.executable, "-m", "elastic_moe", name, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert f"usage: elastic-moe {name}" in done.stdout
