"""Free memory of the C library's heap goes back to the system.

glibc keeps blocks below 32 MiB in its heap once it has seen such blocks freed, and what lies between two blocks in use
is not given back. A view change frees and makes many of them, of other sizes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable


def _trim() -> Callable[[int], int] | None:
    """glibc's function, or None where there is none."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


def give_back() -> None:
    """Give all free pages of the heap back to the system; some milliseconds. Does nothing without glibc."""
    trim = _trim()
    if trim is not None:
        trim(0)
