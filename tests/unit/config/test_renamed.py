"""Old keys and values: a user gets a sentence with the new name; the configuration of an old run is translated."""

from __future__ import annotations

from typing import Any

import pytest

from elastic_moe.config.build import build, key_names
from elastic_moe.config.renamed import RENAMED_KEYS, RENAMED_VALUES, translate
from elastic_moe.config.rules import CHOICES
from elastic_moe.errors import UserError


def nested(key: str, value: Any) -> dict[str, Any]:
    group, name = key.split(".")
    return {group: {name: value}}


@pytest.mark.parametrize("old", RENAMED_KEYS)
def test_an_old_key_names_the_new_one(old: str) -> None:
    with pytest.raises(UserError) as caught:
        build(nested(old, 1))
    assert str(caught.value).startswith(f"{old} is now {RENAMED_KEYS[old].name}")
    assert str(caught.value).count(".") >= 3
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize(("key", "value"), RENAMED_VALUES)
def test_an_old_value_names_the_new_one(key: str, value: str) -> None:
    with pytest.raises(UserError, match=f"{key}={value} is now {key}={RENAMED_VALUES[key, value]}"):
        build(nested(key, value))


def test_the_table_leads_to_keys_and_values_that_exist() -> None:
    assert not set(RENAMED_KEYS) & set(key_names())
    assert {new.name for new in RENAMED_KEYS.values()} <= set(key_names())
    for (key, old), new in RENAMED_VALUES.items():
        assert new in CHOICES[key]
        assert old not in CHOICES[key]


@pytest.mark.parametrize(("old", "segment"), [(-1, -1), (0, 1), (3, 3)])
def test_sub_layers_in_a_segment_of_streams_have_a_key_of_their_own(old: int, segment: int) -> None:
    """`model.recompute` was that number; now it is a policy, a text, which stays as it is."""
    assert translate({"model": {"recompute": old}}) == {"model": {"stream_segment": segment}}
    assert translate({"model": {"recompute": "3"}}) == {"model": {"recompute": "3"}}


def test_an_old_run_is_translated_units_too() -> None:
    old = {
        "seed": 3,
        "optim": {"clip": 0.7, "lr": 0.1},
        "model": {"score": "softmax", "attention": "v4", "layer_kinds": []},
        "balance": {"every": 2, "home_every": 5, "log_every": 4, "dispatch_mib": 512},
        "cluster": {"object_store_mb": 100, "worker_memory_gb": 80.0},
        "run": {"eval_every": 7},
    }
    new = translate(old)
    assert new["seed"] == 3
    assert new["optim"] == {"grad_clip": 0.7, "lr": 0.1}
    assert new["model"] == {"router_score": "softmax", "attention": "csa", "layer_kinds": []}
    assert new["balance"] == {
        "every_steps": 2, "home_every_steps": 10, "log_every_steps": 4, "dispatch_gib": 0.5,
    }  # fmt: skip
    assert new["cluster"]["object_store_gib"] * 2**30 == 100 * 2**20
    assert new["cluster"]["worker_memory_gib"] * 2**30 == pytest.approx(80e9)
    assert new["run"] == {"eval_every_steps": 7}


def test_present_names_are_left_as_they_are() -> None:
    present = {"balance": {"every_steps": 2, "home_every_steps": 5}, "model": {"attention": "csa"}}
    assert translate(present) == present
