"""The command line: every shipped configuration composes; a bad one ends with 2 and a sentence, without Ray."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.config_store import ConfigStore

from elastic_moe.cli.compose import check
from elastic_moe.config.reference import config_dir
from elastic_moe.config.schema import TrainConfig
from elastic_moe.errors import UserError

ROOT = Path(__file__).resolve().parents[3]

# Runs the command line with a launch that only writes down what it was given, so that no Ray is needed.
DRIVER = """
import contextlib, json, sys, types
def launch(config, raw_yaml):
    print("LAUNCH", json.dumps([config.run.dir, config.seed, config.run.steps, f"seed: {config.seed}" in raw_yaml]))
    return config.threads
stub = types.ModuleType("elastic_moe.actors.driver")
stub.launch = launch
sys.modules["elastic_moe.actors.driver"] = stub
session = types.ModuleType("elastic_moe.actors.cluster")
session.sweep_session = contextlib.nullcontext
sys.modules["elastic_moe.actors.cluster"] = session
from elastic_moe.cli.train import main
code = main()
print("RAY", "ray" in sys.modules, "TORCH", "torch" in sys.modules)
sys.exit(code)
"""


@pytest.fixture(autouse=True)
def _schema() -> None:
    ConfigStore.instance().store(name="schema", node=TrainConfig)


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (config_dir() / group).glob("*.yaml"))


def run(tmp_path: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", DRIVER, *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def launches(result: subprocess.CompletedProcess[str]) -> list[str]:
    return [line.removeprefix("LAUNCH ") for line in result.stdout.splitlines() if line.startswith("LAUNCH")]


def test_groups_are_shipped() -> None:
    assert options("cluster") == ["address", "auto", "local", "simulated"]
    assert {"tiny", "small"} <= set(options("model"))


@pytest.mark.parametrize(("cluster", "model"), list(itertools.product(options("cluster"), options("model"))))
def test_every_shipped_config_composes(cluster: str, model: str) -> None:
    (built,) = check([f"cluster={cluster}", f"model={model}"])
    assert built.cluster.kind == cluster


def test_ray_address_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert check(["cluster=address"])[0].cluster.address == "10.0.0.1:6379"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("run.stepz=3", "unknown key run.stepz; did you mean run.steps?"),
        ("+foo=1", "unknown key foo."),
        ("foo.bar=1", "unknown key foo.bar."),
        ("+run.foo=1", "unknown key run.foo."),
        ("clustr=local", "unknown key clustr; did you mean cluster?"),
        ("cluster=foo", "cluster has no option foo; it can be address, auto, local, simulated."),
        ("run.steps=abc", "run.steps: Value 'abc' of type 'str' could not be converted to Integer."),
        ("run.steps=0", "run.steps must be at least 1, not 0."),
    ],
)
def test_hydra_errors_become_a_sentence(override: str, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        check([override])
    assert str(caught.value) == expected


@pytest.mark.parametrize(
    ("experiment", "expected"),
    [
        ("old", "optim.clip is now optim.grad_clip."),
        ("bad", "run.steps must be at least 1, not -3."),
        ("none", "experiment has no option none; it can be bad, good, old."),
    ],
)
def test_configurations_of_the_user_are_checked_too(tmp_path: Path, experiment: str, expected: str) -> None:
    folder = tmp_path / "user's own" / "experiment"
    folder.mkdir(parents=True)
    for name, text in (("old", "optim: {clip: 2.0}"), ("bad", "run: {steps: -3}"), ("good", "run: {steps: 7}")):
        (folder / f"{name}.yaml").write_text(f"# @package _global_\n{text}\n")
    with pytest.raises(UserError) as caught:
        check([f"+experiment={experiment}"], user_dir=str(folder.parent))
    assert str(caught.value) == expected
    assert check(["+experiment=good"], user_dir=str(folder.parent))[0].run.steps == 7
    result = run(tmp_path, "--config-dir", str(folder.parent), f"+experiment={experiment}")
    assert (result.returncode, result.stderr) == (2, f"elastic_moe: {expected}\n")


def test_a_directory_of_configurations_that_is_not_there_is_a_sentence(tmp_path: Path) -> None:
    result = run(tmp_path, "--config-dir", "nowhere")
    assert (result.returncode, result.stderr) == (2, "elastic_moe: --config-dir: there is no directory nowhere.\n")


@pytest.mark.parametrize(
    "override", ["model.num_experts=null", "run.steps=[1", "run.dir=${nope}", "=", "cluster=[a,b]"]
)
def test_any_other_error_is_one_line(override: str) -> None:
    with pytest.raises(UserError) as caught:
        check([override])
    assert "\n" not in str(caught.value)


def test_sweep_is_checked_whole() -> None:
    assert [built.seed for built in check(["seed=1,2", "run.steps=7"], multirun=True)] == [1, 2]
    with pytest.raises(UserError, match=r"elastic\.redundancy"):
        check(["seed=1,2", "elastic.redundancy=1,3"], multirun=True)


@pytest.mark.parametrize(
    "arguments",
    [["run.stepz=3"], ["cluster=foo"], ["elastic.redundancy=9"], ["-m", "seed=1,2", "elastic.redundancy=1,3"]],
    ids=" ".join,
)
def test_bad_config_exits_2_before_ray(tmp_path: Path, arguments: list[str]) -> None:
    result = run(tmp_path, *arguments)
    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert "RAY False TORCH False" in result.stdout
    assert not launches(result)
    assert list(tmp_path.iterdir()) == []


def test_one_job(tmp_path: Path) -> None:
    result = run(tmp_path, "run.dir=out", "seed=3", "run.steps=5", "threads=0")
    assert result.returncode == 0, result.stderr
    assert launches(result) == ['["out", 3, 5, true]']
    assert (tmp_path / "out" / ".hydra" / "overrides.yaml").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_exit_code_is_that_of_launch(tmp_path: Path) -> None:
    assert run(tmp_path, "run.dir=out", "threads=1").returncode == 1


def test_sweep_gives_each_job_its_directory(tmp_path: Path) -> None:
    result = run(tmp_path, "-m", "run.dir=out", "seed=5,6", "threads=0")
    assert result.returncode == 0, result.stderr
    assert launches(result) == ['["out/0", 5, 200, true]', '["out/1", 6, 200, true]']
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_exit_code_of_a_sweep_is_the_worst_of_its_jobs(tmp_path: Path) -> None:
    result = run(tmp_path, "-m", "run.dir=out", "threads=0,1,3")
    assert (result.returncode, len(launches(result))) == (3, 3)
    assert "out/1 ended with exit code 1" in result.stderr


def test_interrupt_ends_the_sweep(tmp_path: Path) -> None:
    result = run(tmp_path, "-m", "run.dir=out", "seed=5,6", "threads=130")
    assert result.returncode == 130
    assert len(launches(result)) == 1


@pytest.mark.parametrize("arguments", [["run.dir=file/x"], ["-m", "run.dir=file/x", "seed=1,2"]], ids=" ".join)
def test_a_run_directory_that_cannot_be_written_is_a_sentence(tmp_path: Path, arguments: list[str]) -> None:
    (tmp_path / "file").touch()
    result = run(tmp_path, *arguments)
    told = "elastic_moe: run.dir=file/x cannot be written: Not a directory\n"
    assert (result.returncode, result.stderr) == (2, told)
    assert not launches(result)


def test_other_directories_of_hydra_that_cannot_be_written_are_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = run(tmp_path, "run.dir=out", "hydra.run.dir=file/x")
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert "file/x" in result.stderr


def test_home_and_numbers_in_the_directories_of_a_sweep(tmp_path: Path) -> None:
    result = run(tmp_path, "threads=0", "run.dir='~/out/${hydra:job.num}'", "-m", "seed=5,6", HOME=str(tmp_path))
    assert result.returncode == 0, result.stderr
    found = [json.loads(line) for line in launches(result)]
    assert [(Path(run_dir), seed) for run_dir, seed, *_ in found] == [
        (tmp_path / "out" / "0" / "0", 5),
        (tmp_path / "out" / "1" / "1", 6),
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_page_of_a_run_is_left_alone_by_a_start_that_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    assert run(tmp_path, "run.dir=out", "threads=2").returncode == 2  # the stub of a launch that returns 2
    assert not (tmp_path / "out" / "report.html").exists()


def test_note_is_printed_once_and_the_run_goes_on(tmp_path: Path) -> None:
    result = run(tmp_path, "run.dir=out", "cluster.workers=1", "threads=0")
    assert result.returncode == 0
    assert result.stderr.count("elastic_moe: note: elastic.redundancy") == 1
