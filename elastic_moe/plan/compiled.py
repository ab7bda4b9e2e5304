"""Compiles loops of planner and optimizer to machine code with `numba`, which needs no compiler on the user's machine.

The compiled functions are pure: they see arrays and numbers only. This module is the one place of `plan` that touches
the outside. It reads the home directory and creates a cache folder there (or in the temporary directory), because
compiling takes a minute or two, once per machine and version. The folder's name holds a digest of this package's
compiled sources: numba's own cache does not notice a change in a file that another one calls. The place of the sources
does not count, because Ray unpacks the working directory of each submitted job somewhere else. Results do not depend on
the cache. Where the order of a sum could matter, the loops compute with integers, so ranks with different processors
make the same plan. In the optimizer's loops every operation rounds once: without "fast math", LLVM neither contracts a
product and a sum to FMA nor takes approximate roots and quotients, whatever the width of the vectors.
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
from numba.core.caching import UserProvidedCacheLocator  # pyright: ignore
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


class ByModule(UserProvidedCacheLocator):
    """Tells numba where the machine code of a function is: by the name of its module, not by the path of its file."""

    def __init__(self, function: Callable[..., Any], file: str) -> None:
        super().__init__(function, file)
        self._cache_path = str(cache_dir() / function.__module__)


def compiled(function: F) -> F:
    """Compile a function of arrays and numbers. The machine code does not hold the interpreter's lock."""
    return _compile(function, "python")


def compiled_for_vectors(function: F) -> F:
    """As `compiled`, but x / 0 is infinite or not a number: a check for it would keep a loop from being vectorised."""
    return _compile(function, "numpy")


def _compile(function: F, error_model: str) -> F:
    config: Any = numba.config  # pyright: ignore
    before = config.CACHE_DIR, config.CACHE_LOCATOR_CLASSES
    config.CACHE_DIR, config.CACHE_LOCATOR_CLASSES = str(cache_dir()), f"{__name__}.{ByModule.__name__}"
    try:
        return numba.njit(function, cache=True, nogil=True, error_model=error_model)  # pyright: ignore
    finally:
        config.CACHE_DIR, config.CACHE_LOCATOR_CLASSES = before
