"""What is shown while a corpus is prepared: lines without a terminal, a bar with one, nothing for a known corpus."""

from __future__ import annotations

import io
import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from elastic_moe.actors.corpus_progress import CorpusProgress
from elastic_moe.config.schema import DataConfig
from elastic_moe.data.prepare import prepare
from elastic_moe.run_log import JSON, TEXT, RunLog


class Clock:
    """A second passes with each look."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        self.now_s += 1.0
        return self.now_s


class Terminal(io.StringIO):
    """Says that it is a terminal."""

    def isatty(self) -> bool:
        return True


def shown(tmp_path: Path, log_format: str = TEXT, every_s: float = 0.0) -> None:
    corpus = tmp_path / "corpus.txt"
    if not corpus.exists():
        corpus.write_text("the quick brown fox jumps over the lazy dog\n" * 2_000)
    config = DataConfig(corpus=str(corpus), tokenizer="bpe", vocab_size=300, seq_len=16, val_fraction=0.1)
    with CorpusProgress(every_s, RunLog(log_format, "run"), Clock()) as progress:
        prepare(config, tmp_path / "cache", progress)


def test_each_part_is_told_once_and_a_corpus_that_is_known_not_at_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown(tmp_path)
    first, second, third, last = capsys.readouterr().err.splitlines()
    assert first == "preparing the corpus: reading the text, 0.0 of 0.1 MB"
    assert second == "preparing the corpus: training the tokenizer"
    assert third == "preparing the corpus: encoding, 0.0 of 0.1 MB"
    assert last.startswith("the corpus is prepared, in ")
    shown(tmp_path)
    assert capsys.readouterr().err == ""


def test_a_long_part_is_told_now_and_then(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown(tmp_path, every_s=3.0)
    lines = [line for line in capsys.readouterr().err.splitlines() if "encoding" in line]
    assert len(lines) > 3
    assert all(" of 0.1 MB" in line for line in lines)
    assert all(line.endswith(" left") for line in lines[1:])


def test_lines_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown(tmp_path, JSON)
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["event"] for line in lines] == ["preparing"] * 3 + ["prepared"]
    assert lines[0]["of_bytes"] == (tmp_path / "corpus.txt").stat().st_size


def test_a_bar_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    shown(tmp_path, every_s=1.0)
    told = terminal.getvalue()
    assert "reading the text:" in told
    assert "encoding:" in told
    assert "preparing the corpus" not in told, "no lines beside the bar"
    assert "the corpus is prepared" in told


@pytest.mark.parametrize("terminal", [False, True])
def test_what_does_not_move_is_told(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with CorpusProgress(0.05, RunLog(TEXT, "run")) as progress:
        until(lambda: "looking at the files, without progress for" in stream.getvalue())
        progress("encoding", 5_000_000, 9_000_000)
        word = "no progress for" if terminal else "preparing the corpus: encoding, without progress for"
        until(lambda: word in stream.getvalue(), lambda: progress("encoding", 5_000_000, 9_000_000))
    assert not [thread for thread in threading.enumerate() if thread.name == "corpus progress" and thread.is_alive()]


def until(holds: Callable[[], bool], step: Callable[[], object] = lambda: None) -> None:
    deadline_s = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline_s
        step()
        time.sleep(0.01)
