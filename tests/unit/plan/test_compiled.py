"""The cache of machine code: a folder per version of the sources, in the home directory or beside temporary files."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from elastic_moe.plan.compiled import Ints, cache_dir, compiled


def test_the_cache_lies_in_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = cache_dir.__wrapped__()
    assert folder.parent == tmp_path / ".cache" / "elastic_moe"
    assert folder.is_dir()
    assert folder.name == cache_dir.__wrapped__().name, "the same sources have the same folder"


def test_without_a_home_directory_it_lies_beside_temporary_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_home, temporary = tmp_path / "file", tmp_path / "tmp"
    no_home.write_text("")
    temporary.mkdir()
    monkeypatch.setenv("HOME", str(no_home))
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    folder = cache_dir.__wrapped__()
    assert folder.is_dir()
    assert temporary in folder.parents


def _total(values: Ints) -> int:
    total = np.int64(0)
    for value in values:
        total += value
    return total


def test_a_compiled_function_gives_the_same_result() -> None:
    values = np.arange(10)
    assert compiled(_total)(values) == _total(values) == 45


SCALED = """
from elastic_moe.plan.compiled import compiled

@compiled
def scaled(value):
    return FACTOR * value

assert scaled(2) == 2 * FACTOR
(hits,) = scaled.stats.cache_hits.values() or [0]
print("hits", hits)
"""


def test_machine_code_serves_a_copy_of_the_sources_elsewhere_but_no_other_sources(tmp_path: Path) -> None:
    """Ray unpacks the working directory of each job in a folder of its own."""

    def hits(folder: str, factor: int) -> str:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "module.py").write_text(SCALED.replace("FACTOR", str(factor)))
        path = os.pathsep.join([str(tmp_path / folder), str(Path(__file__).parents[3])])
        environment = {**os.environ, "HOME": str(tmp_path), "PYTHONPATH": path}
        command = [sys.executable, "-c", "import module"]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    assert [hits("here", 3), hits("there", 3), hits("changed", 4)] == ["hits 0", "hits 1", "hits 0"]
