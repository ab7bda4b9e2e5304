"""`build`: every fault of a configuration is one sentence that names the key, and what is built is sealed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from elastic_moe import runtime
from elastic_moe.config.build import build, key_names, start_workers
from elastic_moe.config.rules import ABOVE_ZERO, AT_LEAST_ONE, AT_LEAST_ZERO, CHOICES, FAULT_PHASES, MULTIPLE_OF_4
from elastic_moe.config.schema import TrainConfig
from elastic_moe.errors import UserError


def nested(dotted: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in dotted.items():
        *groups, name = key.split(".")
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
        node[name] = value
    return tree


BAD: list[tuple[dict[str, Any], str]] = [
    ({"run.stepz": 3}, "run.stepz"),
    ({"foo": 3}, "foo"),
    ({"run": 3}, "run"),
    ({"run.steps": "ten"}, "run.steps"),
    ({"run.steps": 1.5}, "run.steps"),
    ({"run.steps": True}, "run.steps"),
    ({"run.steps": None}, "run.steps"),
    ({"run.steps": 0}, "run.steps"),
    ({"run.dir": " "}, "run.dir"),
    ({"run.dir": "s3://bucket/run"}, "run.dir"),
    ({"data.corpus": ""}, "data.corpus"),
    ({"run.overwrite": 1}, "run.overwrite"),
    ({"run.resume": "yes"}, "run.resume"),
    ({"seed": -1}, "seed"),
    ({"precision": "fp16"}, "precision"),
    ({"reduce_precision": "fp16"}, "reduce_precision"),
    ({"reduce_precision": "bf16", "elastic.reproducible": True}, "reduce_precision"),
    ({"device": "tpu"}, "device"),
    ({"cluster.collectives": "mpi"}, "cluster.collectives"),
    ({"cluster.collectives": "nccl", "device": "cpu"}, "cluster.collectives"),
    ({"optim.lr": "high"}, "optim.lr"),
    ({"optim.lr": float("nan")}, "optim.lr"),
    ({"optim.lr": 0}, "optim.lr"),
    ({"optim.beta2": 1.0}, "optim.beta2"),
    ({"optim.min_lr_ratio": 1.5}, "optim.min_lr_ratio"),
    ({"data.global_batch": 0}, "data.global_batch"),
    ({"data.val_fraction": 0.0}, "data.val_fraction"),
    ({"data.vocab_size": 256}, "data.vocab_size"),
    ({"data.corpus": "/no/such/corpus"}, "data.corpus"),
    ({"checkpoint.dir": "ftp://host/x"}, "checkpoint.dir"),
    ({"model.hidden_size": 130}, "model.hidden_size"),
    ({"precision": "bf16", "model.expert_hidden": 68}, "model.expert_hidden"),
    ({"model.num_experts": 2}, "model.experts_per_token"),
    ({"model.num_kv_heads": 3}, "model.num_kv_heads"),
    ({"model.num_dense_layers": 4}, "model.num_dense_layers"),
    ({"elastic.redundancy": 3}, "elastic.redundancy"),
    ({"elastic.redundancy": -1}, "elastic.redundancy"),
    ({"elastic.min_workers": 5, "elastic.max_workers": 4}, "elastic.min_workers"),
    ({"elastic.min_workers": 5}, "elastic.min_workers"),
    ({"elastic.max_workers": 3}, "elastic.max_workers"),
    ({"elastic.slots_per_worker": 3}, "elastic.slots_per_worker"),
    ({"elastic.heartbeat_timeout_s": 0.1}, "elastic.heartbeat_timeout_s"),
    ({"cluster.kind": "cloud"}, "cluster.kind"),
    ({"cluster.object_store_gib": 0.01}, "cluster.object_store_gib"),
    ({"faults.kill_worker_at_step": 3, "faults.kill_rank": 4}, "faults.kill_rank"),
    ({"faults.inject": "1:2:vote"}, "faults.inject"),
    ({"faults.inject": ["1:2"]}, "faults.inject"),
    ({"faults.inject": ["1:2:lunch"]}, "faults.inject"),
    ({"faults.inject": [3]}, "faults.inject"),
    ({"optim.spike": "rollback", "checkpoint.every_steps": 0}, "checkpoint.every_minutes"),
    ({"model.recompute": -1}, "model.stream_segment"),
    ({"model.recompute": 0}, "model.recompute"),
    ({"model.recompute": "some"}, "model.recompute"),
    ({"model.stream_segment": -2}, "model.stream_segment"),
    ({"optim.lr_steps": ["0.8"]}, "optim.lr_steps"),
    ({"optim.lr_steps": ["0.8:0.3", "0.8:0.1"]}, "optim.lr_steps"),
    ({"optim.lr_steps": ["80:0.3"]}, "optim.lr_steps"),
    ({"optim.lr_steps": ["1/0:0.3"]}, "optim.lr_steps"),
    ({"optim.decay_fraction": 1.5}, "optim.decay_fraction"),
    ({"data.batch_ramp": 32, "data.batch_ramp_steps": 5}, "data.batch_ramp (32)"),
    ({"data.batch_ramp": 8}, "data.batch_ramp_steps"),
    ({"data.batch_ramp": 8, "data.batch_ramp_steps": 5, "data.batch_ramp_tokens": 5}, "data.batch_ramp_tokens"),
    ({"data.batch_ramp_tokens": 5}, "data.batch_ramp_tokens"),
    ({"data.pattern": " "}, "data.pattern"),
]


@pytest.mark.parametrize(("dotted", "key"), BAD, ids=lambda value: str(value))
def test_bad_input_is_one_sentence(dotted: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError) as caught:
        build(nested(dotted))
    message = str(caught.value)
    assert key in message
    assert "\n" not in message
    assert message[-1] in ".?"


@pytest.mark.parametrize("key", [*CHOICES, *AT_LEAST_ONE, *ABOVE_ZERO])
def test_zero_or_another_word_is_refused(key: str) -> None:
    with pytest.raises(UserError, match=key):
        build(nested({key: "nonsense" if key in CHOICES else 0}))


def test_rules_name_only_existing_keys() -> None:
    assert {*CHOICES, *AT_LEAST_ONE, *AT_LEAST_ZERO, *ABOVE_ZERO, *MULTIPLE_OF_4} <= set(key_names())


def test_every_number_has_a_range() -> None:
    built = build({})
    ruled = {*AT_LEAST_ONE, *AT_LEAST_ZERO, *ABOVE_ZERO}
    ruled |= {"optim.beta1", "optim.beta2", "data.val_fraction", "data.vocab_size", "cluster.object_store_gib"}
    ruled |= {"model.end_token", "model.stream_segment", "sweep.rung_factor", "optim.momentum"}
    for key in key_names():
        value: Any = built
        for name in key.split("."):
            value = getattr(value, name)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            assert key in ruled, f"{key} has no range"


def test_defaults_are_valid_and_sealed() -> None:
    built = build({})
    assert vars(built).keys() >= {"run", "model", "seed"}
    assert built.run.steps == TrainConfig().run.steps
    with pytest.raises(AttributeError):
        built.run.steps = 5
    with pytest.raises(AttributeError):
        built.seed = 5


def test_values_are_taken() -> None:
    built = build(nested({"optim.lr": 1, "elastic.max_workers": 8, "faults.inject": ["1:2:vote", "0:3:apply:stop"]}))
    assert built.optim.lr == 1.0
    assert isinstance(built.optim.lr, float)
    assert built.elastic.max_workers == 8
    assert built.faults.inject == ["1:2:vote", "0:3:apply:stop"]


def test_start_workers_of_a_simulated_cluster() -> None:
    built = build(nested({"cluster.kind": "simulated", "cluster.nodes": 3, "cluster.workers_per_node": 2}))
    assert start_workers(built) == 6


@pytest.mark.parametrize(
    ("dotted", "key"),
    [
        ({"run.steps": 20, "optim.schedule": "wsd"}, "optim.warmup_steps"),
        ({"optim.schedule": "wsd", "optim.warmup_tokens": 700_000}, r"optim\.warmup_tokens .* never stays"),
        ({"optim.warmup_tokens": 900_000}, r"optim\.warmup_tokens \(900000\) is more than the run's 819200 tokens"),
        ({"optim.warmup_steps": 201}, r"optim\.warmup_steps \(201\) is more than the run's 200 steps"),
        ({"data.batch_ramp": 8, "data.batch_ramp_steps": 200}, r"data\.batch_ramp_steps \(200\) is not less .* 200"),
        ({"data.batch_ramp": 8, "data.batch_ramp_tokens": 900_000}, r"data\.batch_ramp_tokens .* no batch reaches"),
        ({"model.recompute": "5"}, r"model\.recompute \(5\) is more than the 4 layers"),
        ({"cluster.workers": 1}, "elastic.redundancy"),
        ({"device": "cuda"}, "cluster.gpus_per_worker"),
    ],
)
def test_doubtful_settings_are_only_noted(dotted: dict[str, Any], key: str) -> None:
    with pytest.warns(UserWarning, match=key):
        build(nested(dotted))


def test_unknown_key_suggests_the_nearest() -> None:
    with pytest.raises(UserError, match=r"did you mean elastic\.redundancy\?"):
        build(nested({"elastic.redundency": 1}))


def test_fault_phases_are_those_of_the_runtime() -> None:
    source = "".join(path.read_text() for path in Path(runtime.__path__[0]).rglob("*.py"))
    assert set(re.findall(r"(?:fault|_begin)\([^()]*\"(\w+)\"\)", source)) == set(FAULT_PHASES)
