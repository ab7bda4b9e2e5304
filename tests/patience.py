"""Waiting for a condition, with patience for a loaded machine and without asserting any time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

PATIENCE_S = 60.0
T = TypeVar("T")


def until(condition: Callable[[], T], what: str, patience_s: float = PATIENCE_S) -> T:
    """Wait until the condition's value is true, and return it. An assertion fails when the patience is over."""
    deadline_s = time.monotonic() + patience_s
    while not (value := condition()):
        assert time.monotonic() < deadline_s, f"waited in vain for {what}"
        threading.Event().wait(0.005)
    return value


def attempt(action: Callable[[], T], *expected: type[Exception]) -> T | None:
    """The action's value, or None if it raises one of the expected errors."""
    try:
        return action()
    except expected:
        return None
