"""Machine code for the planner's loops: `numba`, which needs no compiler on the user's machine.

Compiling takes some forty seconds, once per machine and version: the code is kept in the user's cache directory under a digest of this
package's source, because numba's own cache does not notice a change in a file that another one calls. It computes with integers where
order could matter, so ranks with different processors make the same plan.
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

F = TypeVar("F", bound=Callable[..., Any])


@cache
def cache_dir() -> Path:
    """Where the machine code is kept; made if it is not there."""
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
    """The function as machine code, which does not hold the interpreter's lock. It sees arrays and numbers only."""
    before = numba.config.CACHE_DIR  # pyright: ignore
    numba.config.CACHE_DIR = str(cache_dir())  # pyright: ignore
    try:
        return numba.njit(function, cache=True, nogil=True)  # pyright: ignore
    finally:
        numba.config.CACHE_DIR = before  # pyright: ignore
