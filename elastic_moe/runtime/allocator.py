"""When free memory of the C library's heap goes back to the system: between views, and not within a step.

A step frees and makes the same blocks again and again. Where glibc gives them back in between, each page is made, and
cleared, once more: 7 % of a worker's processor time (2 million elements, four workers, glibc's own thresholds).
A view change frees and makes many blocks of other sizes; there all that is free goes back.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt (malloc.h)
KEEP_BYTES = 512 << 20  # free memory at the top of a heap that stays
OWN_MAP_BYTES = 32 << 20  # from this size on a block is mapped by itself; glibc takes no more


def keep() -> None:
    """What a step frees stays in the heap, for this process. Does nothing without glibc."""
    if (option := _of_libc("mallopt")) is not None:
        option(_TRIM_THRESHOLD, KEEP_BYTES)
        option(_MMAP_THRESHOLD, OWN_MAP_BYTES)


def give_back() -> None:
    """Give all free pages of the heap back to the system; some milliseconds. Does nothing without glibc."""
    if (trim := _of_libc("malloc_trim")) is not None:
        trim(0)


def _of_libc(name: str) -> Callable[..., int] | None:
    """A function of glibc, or None where there is none."""
    return getattr(ctypes.CDLL(None), name, None)
