"""From a composed configuration to a sealed TrainConfig: every key, type, range and rule is checked here, once.

Takes any nested mapping (OmegaConf's DictConfig is one), so that nothing below the command line knows Hydra. A fault
of the user's is one sentence that names the key; it is raised before anything starts.
"""

from __future__ import annotations

import difflib
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, cast, get_type_hints

from elastic_moe.config.renamed import renamed_key
from elastic_moe.config.rules import check_model_rules, check_rules, start_workers
from elastic_moe.config.schema import TrainConfig
from elastic_moe.errors import UserError

__all__ = ["build", "check_model_fields", "key_names", "nearest", "start_workers", "unknown_key"]


def build(config: Mapping[Any, Any], inputs: bool = True) -> TrainConfig:
    """Check a composed configuration and return it as a sealed TrainConfig.

    Args:
        config: nested mapping of the keys of TrainConfig; a key that is absent keeps the dataclass's default.
        inputs: the corpus and the tokenizer have to be there; a run that is only read needs them no more.

    Raises:
        UserError: an unknown key, a value of the wrong type, out of range, or at odds with another key.
    """
    built = cast(TrainConfig, _build_node(TrainConfig, config, ""))
    for note in check_rules(built, inputs):
        warnings.warn(note, stacklevel=2)
    built.seal()
    return built


def check_model_fields(fields: Mapping[str, Any]) -> None:
    """Check fields of `model` that come from elsewhere than the user's configuration.

    Raises:
        UserError: a value of the wrong type, out of range, or at odds with another one.
    """
    check_model_rules(cast(TrainConfig, _build_node(TrainConfig, {"model": fields}, "")))


_TABLES = ("data.mixture", "cluster.price_per_hour")  # whose names are the user's


def key_names(cls: type[Any] = TrainConfig, prefix: str = "") -> list[str]:
    """Every dotted key of a configuration class, groups included."""
    names: list[str] = []
    for name, kind in _hints(cls).items():
        names.append(prefix + name)
        if isinstance(kind, type) and is_dataclass(kind):
            names += key_names(kind, f"{prefix}{name}.")
    return names


def nearest(key: str, known: Iterable[str]) -> str:
    """`; did you mean X?` when one of the known keys looks like it, else an empty string."""
    close = difflib.get_close_matches(key, list(known), n=1, cutoff=0.7)
    return f"; did you mean {close[0]}?" if close else ""


def unknown_key(key: str) -> str:
    """One sentence about a key that does not exist: its new name, how to add it, the nearest key, or neither."""
    table = next((name for name in _TABLES if key == name or key.startswith(f"{name}.")), "")
    if table:
        return f"{table} takes further names after a plus sign: +{table}={{NAME:NUMBER}} or +{table}.NAME=NUMBER"
    return renamed_key(key) or f"unknown key {key}{nearest(key, key_names()) or '.'}"


def _hints(cls: type[Any]) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in fields(cls)}


def _build_node(cls: type[Any], node: object, path: str) -> Any:
    if not isinstance(node, Mapping):
        raise UserError(f"{path or 'the configuration'} must be a group of keys, not {node!r}.")
    kinds = _hints(cls)
    values: dict[str, Any] = {}
    for name, value in cast(Mapping[Any, Any], node).items():
        key = f"{path}.{name}" if path else str(name)
        if name not in kinds:
            raise UserError(unknown_key(key))
        kind = kinds[name]
        if isinstance(kind, type) and is_dataclass(kind):
            values[name] = _build_node(kind, value, key)
        else:
            values[name] = _value(kind, value, key)
    return cls(**values)


def _value(kind: Any, value: Any, key: str) -> Any:
    """The value as the declared type; only an integer is taken for a float, nothing else is converted."""
    if kind is bool and isinstance(value, bool):
        return value
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise UserError(f"{key} must be a finite number, not {value!r}.")
        return float(value)
    if kind is str and isinstance(value, str | int) and not isinstance(value, bool):
        return str(value)
    if kind == list[str] and isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [_value(str, item, key) for item in cast(Sequence[Any], value)]
    if kind == dict[str, float] and isinstance(value, Mapping):
        return {str(name): _value(float, one, f"{key}.{name}") for name, one in cast(Mapping[Any, Any], value).items()}
    names: dict[Any, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    names[dict[str, float]] = "a group of numbers"
    raise UserError(f"{key} must be {names.get(kind, 'a list of texts')}, not {value!r}.")
