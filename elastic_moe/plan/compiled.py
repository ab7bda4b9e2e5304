"""Machine code for the planner's loops: `numba`, which needs no compiler on the user's machine.

The code is compiled once per machine, kept beside the source (or in the user's cache directory), and loaded in milliseconds afterwards.
It computes with integers where order could matter, so ranks with different processors make the same plan.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba  # pyright: ignore[reportMissingTypeStubs]

F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F) -> F:
    """The function as machine code, which does not hold the interpreter's lock. It sees arrays and numbers only."""
    try:
        return numba.njit(function, cache=True, nogil=True)  # pyright: ignore
    except RuntimeError:  # no directory for the cache can be written
        return numba.njit(function, nogil=True)  # pyright: ignore
