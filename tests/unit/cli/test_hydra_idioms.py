"""Idioms of Hydra's command line: those that mean something work, the others are one sentence."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from elastic_moe.cli.compose import check, register_schema
from elastic_moe.cli.hydra_internals import parse_flags, with_home
from elastic_moe.config.reference import options
from elastic_moe.errors import UserError
from elastic_moe.run_dir import make_run_dir


@pytest.fixture(autouse=True)
def _schema() -> None:
    register_schema()


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path / "my home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    return home


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("run.dir=runs/${hydra:job.num}", "runs/0"),
        ("run.dir=runs/${hydra:job.name}", "runs/train"),
        ("run.dir=runs/${hydra:runtime.choices.model}", "runs/tiny"),
    ],
)
def test_values_of_hydra_in_a_single_run(override: str, expected: str) -> None:
    assert check([override])[0].run.dir == expected
    assert not HydraConfig.initialized(), "nothing is left for another program in this process"


def test_values_of_hydra_in_a_sweep() -> None:
    jobs = check(
        [
            "run.dir=runs/${hydra:job.num}_${hydra:runtime.choices.model}",
            "checkpoint.dir=${hydra:runtime.output_dir}/saved",
            "model=tiny,small",
        ],
        multirun=True,
    )
    assert [job.run.dir for job in jobs] == ["runs/0_tiny", "runs/1_small"]
    assert [job.checkpoint.dir.removeprefix(f"{Path.cwd()}/") for job in jobs] == [
        "runs/0_tiny/0/saved",
        "runs/1_small/1/saved",
    ]


def test_globs_mean_the_options_of_a_group(tmp_path: Path) -> None:
    assert len(check(["model=glob(*)"], multirun=True)) == len(options("model"))
    own = tmp_path / "own" / "experiment"
    own.mkdir(parents=True)
    for name, steps in (("a", 3), ("b", 4)):
        (own / f"{name}.yaml").write_text(f"# @package _global_\nrun: {{steps: {steps}}}\n")
    jobs = check(["+experiment=glob(*)"], multirun=True, user_dir=str(own.parent))
    assert [job.run.steps for job in jobs] == [3, 4]


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("seed=glob(*)", "seed=glob(*) has no value, so there is no job to run."),
        ("seed=range(3,0)", "seed=range(3,0) has no value, so there is no job to run."),
        (
            "optim.lr=interval(1e-4,1e-2)",
            "optim.lr=interval(1e-4,1e-2) is an interval, of which Hydra's basic sweeper cannot choose values: list "
            "them, as in key=1,2, or give hydra/sweeper=optuna.",
        ),
    ],
)
def test_a_sweep_without_values_is_a_sentence(override: str, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        check([override, "run.steps=3,4"], multirun=True)
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("seed=range(0,3)", "seed=range(0,3) has several values: give -m to sweep over them."),
        ("seed=glob(*)", "seed=glob(*) has several values: give -m to sweep over them."),
        ("seed=1,2", "seed=1,2 has several values: give -m to sweep over them, or write key=[a,b] for a list."),
        ("+run.dir=x", "run.dir is there already: leave out the + before it."),
        ("++run.nope=1", "unknown key run.nope."),
        ("~run.nope", "unknown key run.nope."),
        ("~seed=3", "~seed=3 deletes nothing, since seed is 0."),
        ("run.dir=null", "run.dir=null: a value is needed, and null is none."),
        ("~run", "hydra.run.dir needs run.dir, which is not there."),
        ("run.dir=${nope}", "hydra.run.dir needs nope, which is not there."),
        ("run.dir=${run.dir}", "hydra.run.dir is made of itself."),
        ("run.dir='~no-such-user/x'", "run.dir=~no-such-user/x: this machine has no home directory ~no-such-user."),
        (
            "model.init_from='~no-such-user/x'",
            "model.init_from=~no-such-user/x: this machine has no home directory ~no-such-user.",
        ),
        (
            "run.dir=~no-such-user/x",
            "run.dir=~no-such-user/x cannot be read: put quotes around the value, and others around it all: "
            "'key=\"value\"'.",
        ),
    ],
)
def test_an_override_that_means_nothing_is_a_sentence(override: str, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        check([override])
    assert str(caught.value) == sentence


def test_a_deleted_key_has_its_default() -> None:
    assert check(["seed=5"])[0].seed == 5
    assert check(["~seed"])[0].seed == check([])[0].seed
    assert check(["++seed=7"])[0].seed == 7


def test_home_directories(home: Path) -> None:
    (home / "texts").mkdir()
    config = check(["run.dir=~/runs/a", "data.corpus=~/texts", "checkpoint.dir=~", "data.cache_dir='~/c'"])[0]
    assert config.run.dir == str(home / "runs" / "a")
    assert config.data.corpus == str(home / "texts")
    assert config.checkpoint.dir == str(home)
    assert config.data.cache_dir == "~/c", "a quoted one is expanded where it is used"
    jobs = check(["run.dir=~/a,~/b"], multirun=True)
    assert [job.run.dir for job in jobs] == [str(home / "a"), str(home / "b")]
    assert with_home(["~seed", "a=b~/c", "~model=tiny"]) == ["~seed", "a=b~/c", "~model=tiny"]


def test_hydra_makes_its_directories_there_too(home: Path) -> None:
    node = OmegaConf.create({"run": {"dir": "~/x"}, "at": "${elastic_moe.home:${run.dir}}"})
    assert node.at == str(home / "x")


def test_flags_may_stand_anywhere(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train", "run.steps=3", "-m", "seed=1,2", "--config-dir", "d", "run.dir=~/x"])
    flags = parse_flags()
    assert flags.multirun is True
    assert flags.config_dir == "d"
    escaped = str(home).replace(" ", "\\ ")
    assert flags.overrides == ["run.steps=3", "seed=1,2", f"run.dir={escaped}/x"]
    assert sys.argv == ["train", *flags.overrides, "-m", "--config-dir", "d"], "as Hydra's own parser takes it"
    assert parse_flags().overrides == flags.overrides


def test_a_run_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, reason in ((tmp_path / "file", "File exists"), (tmp_path / "file" / "x", "Not a directory")):
        with pytest.raises(UserError, match=rf"run\.dir={path} cannot be written: {reason}"):
            make_run_dir(path)
    make_run_dir(tmp_path / "a" / "b")
    assert list((tmp_path / "a").rglob("*")) == [tmp_path / "a" / "b"]
