"""Copies of frozen values with other values in some fields: the coordinator makes several of them for every event."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import cache
from typing import Any, TypeVar

T = TypeVar("T")


def replace(value: T, /, **changes: Any) -> T:
    """As `dataclasses.replace`, in a quarter of its time, for a dataclass with slots and without `__post_init__`."""
    copied, setters = _copier(type(value))
    copy = copied(value)
    for name, changed in changes.items():
        setters[name](copy, changed)
    return copy


@cache
def _copier(cls: type) -> tuple[Callable[[Any], Any], dict[str, Callable[[object, object], None]]]:
    """A function that copies values of this class, written out field by field, and the setters of its fields."""
    setters = {field.name: getattr(cls, field.name).__set__ for field in fields(cls)}
    names: dict[str, Any] = {f"set_{name}": setter for name, setter in setters.items()}
    names |= {"new": object.__new__, "cls": cls}
    lines = [f"set_{name}(copy, value.{name})" for name in setters]
    exec("\n    ".join(["def copied(value):", "copy = new(cls)", *lines, "return copy"]), names)
    return names["copied"], setters
