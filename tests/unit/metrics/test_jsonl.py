"""Files of JSON lines: only whole lines count, for the writer and for the readers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from elastic_moe.metrics.jsonl import JsonLines, Tail, read_jsonl


def test_values_become_types_that_json_has(tmp_path: Path) -> None:
    file = JsonLines(tmp_path / "deep" / "a.jsonl")
    assert file.append({"nan": float("nan"), "array": np.array([1.0, np.inf]), "path": Path("a"), 3: (True, None)})
    file.close()
    assert read_jsonl(file.path) == [{"nan": None, "array": [1.0, None], "path": "a", "3": [True, None]}]


@pytest.mark.parametrize("torn", ['{"a": 2', '{"a": 2\n{', "[1]\n", "\n"])
def test_a_torn_end_is_not_read_and_is_cut_by_the_next_writer(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n' + torn)
    assert read_jsonl(path) == [{"a": 1}]
    file = JsonLines(path)
    file.append({"a": 3})
    file.close()
    assert path.read_text() == '{"a": 1}\n{"a": 3}\n'


def test_a_file_that_is_not_there_has_no_lines(tmp_path: Path) -> None:
    assert read_jsonl(tmp_path / "a.jsonl") == Tail(tmp_path / "a.jsonl").lines() == []


def test_offsets_are_those_of_the_lines(tmp_path: Path) -> None:
    file = JsonLines(tmp_path / "a.jsonl")
    for value in ({"a": 1}, {"b": "ü"}, {"c": 3}):
        file.append(value)
    offsets = [offset for offset, _ in file.values()]
    file.cut(offsets[2])
    file.close()
    assert read_jsonl(file.path) == [{"a": 1}, {"b": "ü"}]


def test_tail_reads_whole_lines_once_and_starts_anew_after_a_cut(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    tail = Tail(path)
    assert tail.lines() == []
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert tail.lines() == [{"step": 1}, {"step": 2}]
    with path.open("a") as file:
        file.write('ep": 3}\n')
    assert tail.lines()[-1] == {"step": 3}
    path.write_text('{"step": 1}\n')
    assert tail.lines() == [{"step": 1}]
