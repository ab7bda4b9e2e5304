"""`report` draws a page, or one picture, of a run, and refuses other directories with one sentence."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from elastic_moe.cli.report import main
from tests.unit.metrics.synthetic import write_run


def data_of(page: Path) -> dict[str, Any]:
    """The data that a page draws."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    assert found
    return json.loads(found[1])


def test_the_page_has_all_that_it_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "a & b")
    assert main([str(run)]) == 0
    told = capsys.readouterr()
    assert told.out.strip() == str(run / "report.html")
    assert "the page has" in told.err
    text = (run / "report.html").read_text()
    assert "<title>a &amp; b</title>" in text
    assert not re.search(r"(?:src|href)=[\"']?(?:https?:)?//", text), "nothing is loaded from elsewhere"
    assert len(text) < 1_000_000
    (drawn,) = data_of(run / "report.html")["runs"]
    assert drawn["figures"]["step"] == 7
    assert drawn["figures"]["loss"] == 4.3
    assert drawn["figures"]["died"] == 2
    assert {"loss", "tokens_per_s", "world_size", "balance"} <= set(drawn["curves"]["y"])
    assert drawn["experts"]["layers"] == 1
    assert any("connection closed" in line for _, _, _, line in drawn["told"]["rows"])


def test_text_of_a_run_is_not_taken_for_markup(tmp_path: Path) -> None:
    run = write_run(tmp_path / "</script><script>alert(1)<")
    assert main([str(run), "--to", str(tmp_path / "page.html")]) == 0
    assert "alert(1)<" not in (tmp_path / "page.html").read_text()
    assert data_of(tmp_path / "page.html")["runs"][0]["name"] == "script><script>alert(1)<"


def test_several_runs_have_names_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runs = [str(write_run(tmp_path / name)) for name in ("a/0", "a/1", "b/0")]
    assert main([*runs, runs[0]]) == 0
    names = [run["name"] for run in data_of(tmp_path / "report.html")["runs"]]
    assert names == ["a/0", "1", "b/0", "a/0 (4)"]


def test_a_run_without_experts_or_events_is_drawn(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    (run / "experts.jsonl").unlink()
    (run / "events.jsonl").unlink()
    assert main([str(run)]) == 0
    (drawn,) = data_of(run / "report.html")["runs"]
    assert drawn["experts"] is None
    assert drawn["lanes"]["bars"] == []


def test_a_loss_that_is_not_finite_does_not_stop_the_report(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    path = run / "metrics.jsonl"
    path.write_text(re.sub(r'"loss": [\d.]+', '"loss": null', path.read_text()))
    assert main([str(run)]) == 0
    assert main([str(run), "--svg", str(tmp_path / "run.svg")]) == 0
    assert data_of(run / "report.html")["runs"][0]["figures"]["loss"] is None


def test_one_picture_with_a_title(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "run.svg"
    assert main([str(write_run(tmp_path / "run")), "--svg", str(target), "--title", "four nodes"]) == 0
    assert capsys.readouterr().out.strip() == str(target)
    assert ">four nodes</text>" in target.read_text()
    assert not (tmp_path / "run" / "report.html").exists()


@pytest.mark.parametrize("arguments", [[], ["--svg", "unwritten.svg"], ["--serve"]])
def test_another_directory_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert main([str(tmp_path), *arguments]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "metrics.jsonl" in error
    assert not Path("unwritten.svg").exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(["--svg", "no/run.svg"], "run.svg"), (["--serve", "1.2.3.4:x"], "1.2.3.4:x"), (["--serve", "99999"], "99999")],
)
def test_what_cannot_be_done_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], named: str
) -> None:
    assert main([str(write_run(tmp_path)), *arguments]) == 2
    assert named in capsys.readouterr().err
