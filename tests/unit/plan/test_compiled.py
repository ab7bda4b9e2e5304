"""The cache of machine code: a folder per version of the sources, in the home directory or beside temporary files."""

from __future__ import annotations

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
