"""Files of JSON lines: only whole lines count, for the writer and for the readers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from elastic_moe.metrics import jsonl
from elastic_moe.metrics.jsonl import JsonLines, Tail, last_line, last_lines, lines_since, read_jsonl, stream


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


def test_lines_are_moved_to_another_file_and_the_rest_stays(tmp_path: Path) -> None:
    file = JsonLines(tmp_path / "a.jsonl")
    for step in (1, 92, 2, 3):
        file.append({"step": step, "text": "ü"})
    last, moved = file.move_end(lambda value: value["step"] > 2, tmp_path / "b.jsonl")
    assert last == {"step": 2, "text": "ü"}
    assert [value["step"] for value in read_jsonl(file.path)] == [1, 2]
    assert moved == 2
    assert [value["step"] for value in read_jsonl(tmp_path / "b.jsonl")] == [92, 3]
    file.append({"step": 3})
    file.close()
    assert [value["step"] for value in read_jsonl(file.path)] == [1, 2, 3]


@pytest.mark.parametrize("line", range(40))
def test_a_damaged_byte_costs_its_line_alone(tmp_path: Path, line: int) -> None:
    """Every byte of a line, its line break included, is replaced by one that JSON does not have there."""
    lines = [json.dumps({"step": step, "loss": 1.5}).encode() + b"\n" for step in range(1, 41)]
    path = tmp_path / "a.jsonl"
    start = sum(map(len, lines[:line]))
    for position in range(start, start + len(lines[line])):
        data = bytearray(b"".join(lines))
        data[position] = 0
        path.write_bytes(data)
        file = JsonLines(path, "step")
        file.append({"step": 41})
        file.close()
        steps = [value["step"] for value in read_jsonl(path)]
        assert set(range(1, 42)) - set(steps) <= {line + 1}
        assert steps == sorted(steps)
        assert path.read_bytes().endswith(b'{"step": 41}\n')


def test_damaged_lines_are_kept_beside_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": \xff2}\n{"stfp": 3}\n{"step": 4}\n{"st')
    file = JsonLines(path, "step")
    file.close()
    assert file.damaged == 2
    assert path.read_bytes() == b'{"step": 1}\n{"step": 4}\n'
    assert (tmp_path / "a.jsonl.damaged").read_bytes() == b'{"step": \xff2}\n{"stfp": 3}\n{"st\n'
    again = JsonLines(path, "step")
    again.close()
    assert again.damaged == 0


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


def test_tail_notices_a_file_that_was_replaced_and_has_grown_again(tmp_path: Path) -> None:
    """The next writer takes damaged lines out, and goes on before the reader looks again."""
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"step": 1}\n{"st\xff": 2}\n{"step": 3}\n')
    tail = Tail(path)
    assert tail.lines() == [{"step": 1}, {"step": 3}]
    file = JsonLines(path)
    for step in range(4, 10):
        file.append({"step": step})
    file.close()
    assert [line["step"] for line in tail.lines()] == [1, 3, 4, 5, 6, 7, 8, 9]
    assert tail.lines() == read_jsonl(path)


@pytest.fixture
def long_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Forty steps, of which the last few are parsed at first."""
    monkeypatch.setattr(jsonl, "END_BYTES", 100)
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps({"step": step, "loss": 1.5}) + "\n" for step in range(1, 41)))
    return path


def _steps(path: Path) -> list[int]:
    return [value["step"] for value in read_jsonl(path)]


@pytest.mark.parametrize("kept", [0, 1, 20, 37, 39, 40])
def test_the_end_of_a_long_file_is_moved(long_file: Path, tmp_path: Path, kept: int) -> None:
    file = JsonLines(long_file, "step")
    assert file.last == {"step": 40, "loss": 1.5}
    last, moved = file.move_end(lambda value: value["step"] > kept, tmp_path / "moved.jsonl")
    assert (last or {"step": 0})["step"] == kept
    assert moved == 40 - kept
    file.append({"step": kept + 1})
    file.close()
    assert _steps(long_file) == list(range(1, kept + 2))
    assert _steps(tmp_path / "moved.jsonl") == list(range(kept + 1, 41))


@pytest.mark.parametrize("step", [0, 1, 20, 38, 40])
def test_a_long_file_is_read_from_its_end_on(long_file: Path, step: int) -> None:
    assert [value["step"] for value in lines_since(long_file, lambda v: v["step"] <= step)] == list(range(step + 1, 41))
    size = long_file.stat().st_size
    whole = [value["step"] for value in last_lines(long_file, size * step // 40)]
    assert whole == list(range(41 - len(whole), 41))
    assert max(0, step - 1) <= len(whole) <= step + 1
    with long_file.open("rb") as file:
        assert [value["step"] for value in stream(file, size)] == list(range(1, 41))


@pytest.mark.parametrize("damage", [b"\0", b"\xff", b"\n"])
@pytest.mark.parametrize("line", [0, 5, 20, 30, 39])
def test_a_damaged_line_far_from_the_end_is_moved_too(long_file: Path, line: int, damage: bytes) -> None:
    lines = long_file.read_bytes().splitlines(keepends=True)
    lines[line] = lines[line][:4] + damage + lines[line][5:]
    long_file.write_bytes(b"".join(lines))
    file = JsonLines(long_file, "step")
    file.append({"step": 41})
    file.close()
    assert file.damaged == 1 + (damage == b"\n")
    assert _steps(long_file) == [step for step in range(1, 42) if step != line + 1]
    assert len(long_file.read_bytes().splitlines()) == 40


def test_the_last_line_is_found_however_long_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "LINE_BYTES", 16)
    path = tmp_path / "a.jsonl"
    assert last_line(path) is None
    path.write_text('{"step": 1}\n' + json.dumps({"step": 2, "text": "x" * 500}) + '\n{"st')
    found = last_line(path)
    assert found is not None
    assert found["step"] == 2
    path.write_text('{"st')
    assert last_line(path) is None
