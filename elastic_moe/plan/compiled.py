"""Compiles the planner's loops to machine code with `numba`, which needs no compiler on the user's machine.

The compiled functions are pure: they see arrays and numbers only. This module is the one place of `plan` that touches
the outside. It reads the home directory and creates a cache folder there (or in the temporary directory), because
compiling takes some forty seconds, once per machine and version. The folder's name holds a digest of this package's
compiled sources: numba's own cache does not notice a change in a file that another one calls. Results do not depend on
the cache. Where the order of a sum could matter, the loops compute with integers, so ranks with different processors
make the same plan.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numba  # pyright: ignore[reportMissingTypeStubs]
import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
F = TypeVar("F", bound=Callable[..., Any])


@cache
def cache_dir() -> Path:
    """The folder of this version's machine code; created if it does not exist."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.rglob("*.py")):
        if b"compiled" in (code := source.read_bytes()):
            digest.update(code)
    name = f"plan-{digest.hexdigest()[:16]}"
    for root in (Path.home() / ".cache" / "elastic_moe", Path(tempfile.gettempdir()) / f"elastic_moe-{os.getuid()}"):
        try:
            (root / name).mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(root / name, os.W_OK):
            return root / name
    return Path(tempfile.mkdtemp(prefix="elastic_moe-"))


def compiled(function: F) -> F:
    """Compile a function of arrays and numbers. The machine code does not hold the interpreter's lock."""
    before = numba.config.CACHE_DIR  # pyright: ignore
    numba.config.CACHE_DIR = str(cache_dir())  # pyright: ignore
    try:
        return numba.njit(function, cache=True, nogil=True)  # pyright: ignore
    finally:
        numba.config.CACHE_DIR = before  # pyright: ignore
