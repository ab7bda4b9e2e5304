"""`report` draws a page, or one picture, of a run, and refuses other directories with one sentence."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from elastic_moe.cli.report import main
from tests.unit.metrics.synthetic import write_run


def test_the_page_shows_curves_experts_and_events(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "a & b")
    assert main([str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    page = (run / "report.html").read_text()
    assert "<h1>a &amp; b</h1>" in page
    assert "7 steps committed, loss 4.3000, 3 workers at the end" in page
    assert page.count("data:image/png") == 3
    assert page.count("data:image/svg+xml") == 1
    assert page.count("<polyline") == 4, "loss, speed, workers, balance"
    assert "speed (tokens/s)" in page
    assert "drain of f" in page
    assert "connection closed" in page
    assert not re.search(r"(?:src|href)=\"http", page)
    assert "<script" not in page


def test_a_run_without_experts_or_events_is_drawn(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    (run / "experts.jsonl").unlink()
    (run / "events.jsonl").unlink()
    assert main([str(run)]) == 0
    assert "data:image/png" not in (run / "report.html").read_text()


def test_a_loss_that_is_not_finite_does_not_stop_the_report(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    path = run / "metrics.jsonl"
    path.write_text(re.sub(r'"loss": [\d.]+', '"loss": null', path.read_text()))
    assert main([str(run)]) == 0
    assert main([str(run), "--svg", str(tmp_path / "run.svg")]) == 0
    assert "loss not finite" in (run / "report.html").read_text()


def test_one_picture_with_a_title(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "run.svg"
    assert main([str(write_run(tmp_path / "run")), "--svg", str(target), "--title", "four nodes"]) == 0
    assert capsys.readouterr().out.strip() == str(target)
    assert ">four nodes</text>" in target.read_text()
    assert not (tmp_path / "run" / "report.html").exists()


@pytest.mark.parametrize("arguments", [[], ["--svg", "unwritten.svg"]])
def test_another_directory_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert main([str(tmp_path), *arguments]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "metrics.jsonl" in error
    assert not Path("unwritten.svg").exists()


def test_a_picture_that_cannot_be_written_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(write_run(tmp_path)), "--svg", str(tmp_path / "no" / "run.svg")]) == 2
    assert "run.svg" in capsys.readouterr().err
