"""`explain` tells where the experts are and why they moved, in the words of the records."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from elastic_moe.cli.explain import main
from tests.unit.metrics.synthetic import EXPERTS, write_run


@pytest.fixture
def run(tmp_path: Path) -> str:
    return str(write_run(tmp_path / "run"))


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    assert main(list(arguments)) == 0
    return capsys.readouterr().out.splitlines()


def test_overview(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = said(capsys, run)
    assert lines[0] == "1 MoE layers, 2 experts each, 2 ranks, as of step 2."
    assert lines[2:5] == [
        "  step      0      0 copies     0 homes   start",
        "  step      1      1 copies     0 homes   load: 2.00 ms a step expected, for 4.00 ms",
        "  step      2      0 copies     1 homes   lost b and c",
    ]
    assert lines[-1] == "    0       2  0 (1.50: 0 + []), 1 (0.50: 1 + [])"


def test_a_layer_as_of_a_step(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = said(capsys, run, "--layer", "0", "--step", "1")
    assert lines[1] == "     0   1.50  rank 0 (a on n0)  [-]  where it began"
    assert lines[2] == "     1   0.50  rank 1 (b on n1)  [3]  step 1: load: 2.00 ms a step expected, for 4.00 ms"


def test_one_expert(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, run, "--layer", "0", "--expert", "1") == [
        "MoE layer 0, expert 1: began with its home at rank 1 (b on n1)",
        "  step 1: a copy came to rank 3 (d on n3); load 0.50 of the mean; load: 2.00 ms a step expected, for 4.00 ms; "
        "the layer's slowest rank from 1.500 to 1.100 of the mean",
        "  step 2: the home moved to rank 1 (d on n3); load 0.50 of the mean; lost b and c",
        "  now: home at rank 1 (d on n3), replicas: none",
    ]


def test_a_run_of_an_earlier_version_reads_the_same(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    now = said(capsys, run, "--layer", "0")
    old = [{"why" if key == "cause" else key: value for key, value in record.items()} for record in EXPERTS]
    (Path(run) / "experts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in old))
    assert said(capsys, run, "--layer", "0") == now


def test_a_run_without_loads(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    records = [record for record in EXPERTS if record["event"] == "placement"]
    (Path(run) / "experts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert "(?: 0 + [])" in said(capsys, run)[-1]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--expert", "1"], "--expert needs --layer"),
        (["--layer", "1"], "the MoE layers are 0 to 0"),
        (["--layer", "0", "--expert", "2"], "layer 0 has no such expert"),
        (["--step", "-1"], "no placement is recorded up to step -1"),
    ],
)
def test_wrong_arguments_get_one_sentence(
    run: str, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    assert main([run, *arguments]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert sentence in error


def test_another_directory_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert "experts.jsonl" in capsys.readouterr().err
