"""The reference of the keys: conf/README.md is the one that the command makes, and every key has a meaning."""

from __future__ import annotations

from elastic_moe.config.build import build, key_names
from elastic_moe.config.reference import config_dir, help_text, keys, markdown, options
from elastic_moe.config.rules import CHOICES


def test_the_committed_page_is_made_from_the_schema() -> None:
    fresh = "python -m elastic_moe.config.reference > conf/README.md makes it"
    assert (config_dir() / "README.md").read_text() == markdown(), fresh


def test_every_key_has_a_comment() -> None:
    assert [key.name for key in keys() if not key.comment] == []


def test_keys_are_those_of_the_schema_once_each() -> None:
    names = [key.name for key in keys()]
    groups = {name.rpartition(".")[0] for name in names} - {""}
    assert sorted(names) == sorted(set(key_names()) - groups)
    assert len(names) == len(set(names))


def test_help_shows_defaults_choices_and_options_within_the_width() -> None:
    text = help_text("Title.", "elastic-moe train", 80)
    steps = build({}).run.steps
    assert f"  run.steps={steps}" in text.splitlines()
    assert ", ".join(CHOICES["model.router_score"]) in " ".join(text.split())
    for name in (*options("model"), *options("cluster")):
        assert name in text
    assert max(map(len, text.splitlines())) <= 80
