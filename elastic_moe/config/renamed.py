"""Configuration keys and values that have another name now. A user who gives an old one is told the new one.

The configuration of an old run is translated by the same table, so that it can still be exported and drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

Convert = Callable[[Any, Mapping[str, Any]], Any]


def _same(value: Any, _: Mapping[str, Any]) -> Any:
    return value


def _times(factor: float) -> Convert:
    return lambda value, _: value * factor


def _looks_to_steps(looks: Any, group: Mapping[str, Any]) -> Any:
    """Steps between looks at homes: the old key counted looks at the load, which came each `every` steps."""
    return looks * max(1, group.get("every", 1))


@dataclass(frozen=True)
class RenamedKey:
    """The new name of a key.

    Attributes:
        name: the new key, in the same group.
        note: how the value changes; empty where it does not.
        convert: the new value, from the old value and the old group of keys.
    """

    name: str
    note: str = ""
    convert: Convert = _same


RENAMED_KEYS = {
    "optim.clip": RenamedKey("optim.grad_clip"),
    "model.score": RenamedKey("model.router_score"),
    "run.eval_every": RenamedKey("run.eval_every_steps"),
    "balance.every": RenamedKey("balance.every_steps"),
    "balance.home_every": RenamedKey(
        "balance.home_every_steps", " and counts steps: the old value times balance.every_steps", _looks_to_steps
    ),
    "balance.log_every": RenamedKey("balance.log_every_steps"),
    "balance.dispatch_mib": RenamedKey(
        "balance.dispatch_gib", " and counts GiB: the old value over 1024", _times(1 / 1024)
    ),
    "cluster.object_store_mb": RenamedKey(
        "cluster.object_store_gib", " and counts GiB: the old value over 1024", _times(1 / 1024)
    ),
    "cluster.worker_memory_gb": RenamedKey(
        "cluster.worker_memory_gib", " and counts GiB: the old value times 0.9313", _times(1e9 / 2**30)
    ),
}

RENAMED_VALUES = {("model.attention", "v4"): "csa"}


def renamed_key(key: str) -> str | None:
    """One sentence that names the new key, or None for a key that was never renamed."""
    new = RENAMED_KEYS.get(key)
    return f"{key} is now {new.name}{new.note}." if new else None


def renamed_value(key: str, value: object) -> str | None:
    """One sentence that names the new value, or None for a value that was never renamed."""
    new = RENAMED_VALUES.get((key, value)) if isinstance(value, str) else None
    return f"{key}={value} is now {key}={new}." if new else None


def translate(node: Mapping[Any, Any]) -> dict[Any, Any]:
    """The configuration of an old run under the present names. A key under its present name is left as it is."""
    translated: dict[Any, Any] = {}
    for name, value in node.items():
        is_group = isinstance(value, Mapping)
        translated[name] = dict(_translate_group(str(name), cast(Mapping[str, Any], value))) if is_group else value
    return translated


def _translate_group(group: str, keys: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in keys.items():
        key = f"{group}.{name}"
        new = RENAMED_KEYS.get(key)
        if key == "model.recompute" and isinstance(
            value, int
        ):  # it was the number of sub-layers in a segment of streams
            yield "stream_segment", value or 1
        elif new is not None:
            yield new.name.removeprefix(f"{group}."), new.convert(value, keys)
        else:
            yield name, RENAMED_VALUES.get((key, value), value) if isinstance(value, str) else value
