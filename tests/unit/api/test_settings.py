"""`elastic_moe.configure` makes the configuration that the same keys make on the command line."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

import elastic_moe
from elastic_moe.cli.compose import check, register_schema


@pytest.mark.parametrize(
    ("settings", "overrides"),
    [
        ({}, []),
        ({"model": "small", "model.num_layers": 6}, ["model=small", "model.num_layers=6"]),
        ({"model.num_layers": 6, "model": "small"}, ["model=small", "model.num_layers=6"]),
        (
            {"cluster": "simulated", "cluster.nodes": 3, "run": {"dir": Path("runs/a"), "steps": 7}},
            ["cluster=simulated", "cluster.nodes=3", "run.dir=runs/a", "run.steps=7"],
        ),
        ({"optim": {"lr": 1}, "seed": 3, "model.layer_kinds": ()}, ["optim.lr=1", "seed=3"]),
    ],
)
def test_as_on_the_command_line(settings: dict[str, Any], overrides: list[str]) -> None:
    register_schema()
    assert asdict(elastic_moe.configure(settings)) == asdict(check(overrides)[0])


def test_groups_are_more_keys() -> None:
    config = elastic_moe.configure({"run.steps": 5}, model="small", run={"steps": 6}, **{"optim.lr": 2e-3})
    assert (config.run.steps, config.optim.lr) == (6, 2e-3)
    with pytest.raises(AttributeError, match="sealed"):
        config.run.steps = 7


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"model": "huge"}, "model has no option huge; it can be "),
        ({"optim.lrr": 1.0}, "unknown key optim.lrr; did you mean optim.lr?"),
        ({"run.steps": "many"}, "run.steps must be a whole number, not 'many'."),
        ({"run": 5}, "run must be a group of keys, not 5."),
        ({"run.steps.more": 5, "run.steps": 4}, "run.steps must be a group of keys, not 4."),
        ({"run": 5, "run.steps": 4}, "run must be a group of keys, not 5."),
        ({"seed": 5, "seed.of": 4}, "seed.of is given, and so is seed as a single value."),
        ({"run": {1: 2}}, "run has the key 1, which is no text."),
        ({"model.init_from": "/nowhere"}, "/nowhere"),
        ({"run.dir": "${nothing}"}, "the configuration cannot be read"),
    ],
)
def test_a_fault_is_one_sentence(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(elastic_moe.UserError) as caught:
        elastic_moe.configure(settings)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_package_imports_no_torch_and_no_ray() -> None:
    code = (
        "import sys, elastic_moe\n"
        "elastic_moe.configure(model='small')\n"
        "print(*sorted({'torch', 'ray', 'hydra', 'pandas'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []


def test_all_names_are_there() -> None:
    assert {getattr(elastic_moe, name) for name in elastic_moe.__all__}
    assert set(elastic_moe.__all__) <= set(dir(elastic_moe))
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        _ = elastic_moe.trian  # type: ignore[attr-defined]
