"""`configure`: the configuration of a run from Python, with the keys, presets and checks of the command line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from os import PathLike, fspath
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from elastic_moe.config.build import build
from elastic_moe.config.reference import GROUP_FILES, config_dir, options
from elastic_moe.config.schema import TrainConfig
from elastic_moe.errors import UserError
from elastic_moe.origin import with_origin

MAPPINGS = ("cluster.price_per_hour",)  # keys whose values are mappings, with keys of the user's
DEFAULTS: dict[str, Any] = {"model": "tiny", "cluster": "auto", "run.dir": "runs/default"}  # those of conf/train.yaml


def configure(settings: Mapping[str, Any] | None = None, /, **groups: Any) -> TrainConfig:
    """A checked configuration of a run.

    Keys are those of the command line (conf/README.md). They may be dotted, nested, or both; the more specific one wins
    over a preset, and a later one over an earlier one:

        configure({"model": "small", "model.num_layers": 6, "optim.lr": 1e-3}, run={"dir": "runs/a", "steps": 500})

    Args:
        settings: keys and values. `model` and `cluster` also take the name of a preset (conf/model, conf/cluster).
        groups: more of them, by group.

    Returns:
        The configuration. It cannot be changed; call `configure` again for another one.

    Raises:
        UserError: an unknown key or preset, or a value that is not allowed; one sentence names the key.
    """
    given = [*DEFAULTS.items(), *_flat(settings or {}), *_flat(groups)]
    tree: dict[str, Any] = {}
    chosen = {name: value for name, value in given if name in GROUP_FILES}
    for group, name in chosen.items():
        _put(tree, group, _preset(group, name))
    for name, value in given:
        if name not in GROUP_FILES:
            _put(tree, name, value)
    try:
        config = OmegaConf.create(tree)
        OmegaConf.resolve(config)
        return build(with_origin(config))
    except OmegaConfBaseException as error:
        raise UserError(f"the configuration cannot be read: {str(error).splitlines()[0]}.") from error


def as_yaml(config: TrainConfig) -> str:
    """The whole configuration as YAML, as it is kept in the run directory."""
    return OmegaConf.to_yaml(OmegaConf.create(asdict(config)))


def _flat(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and plain values of nested keys, in their order."""
    for key, value in node.items():
        if not isinstance(key, str):
            raise UserError(f"{prefix.rstrip('.') or 'the configuration'} has the key {key!r}, which is no text.")
        if isinstance(value, Mapping) and f"{prefix}{key}" not in MAPPINGS:
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, PathLike):
            yield f"{prefix}{key}", fspath(value)
        else:
            yield f"{prefix}{key}", list(value) if isinstance(value, tuple) else value


def _put(tree: dict[str, Any], name: str, value: Any) -> None:
    *groups, key = name.split(".")
    for group in groups:
        tree = tree.setdefault(group, {})
        if not isinstance(tree, dict):
            raise UserError(f"{name} is given, and so is {group} as a single value.")
    if isinstance(tree.get(key), dict) and not isinstance(value, dict):
        raise UserError(f"{name} must be a group of keys, not {value!r}.")
    tree[key] = value


def _preset(group: str, name: Any) -> dict[str, Any]:
    """The keys of a preset.

    Raises:
        UserError: there is none of this name.
    """
    known = options(group)
    if name not in known:
        raise UserError(f"{group} has no option {name}; it can be {', '.join(known)}.")
    node = OmegaConf.to_container(OmegaConf.load(config_dir() / group / f"{name}.yaml"))
    assert isinstance(node, dict)
    return {str(key): value for key, value in node.items()}
