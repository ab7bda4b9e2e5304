"""Checksums of the raw bits of a unit's state.

A checksum is a sum modulo 2^64 of 64-bit words, each times an odd weight that depends on its place. A word that changes
alone always shows, because an odd number has an inverse. The weights repeat after `PERIOD` words, so one pass of
additions at the speed of memory is enough.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from elastic_moe.optim.unit_state import UnitState

PERIOD = 512  # words; a row of this length stays in the first-level cache

_WEIGHTS = np.arange(1, 2 * PERIOD, 2, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
_FIELD = 0xD1342543DE82EF95  # odd; fields that changed places show too
_MASK = 2**64 - 1


def checksum(state: UnitState) -> int:
    """Checksum of all fields of a unit's state, below 2^64."""
    total = 0
    for tensor in state.fields.values():
        total = (total * _FIELD + _sum(tensor.cpu().numpy())) & _MASK
    return total


def _sum(values: NDArray[np.float32]) -> int:
    """Weighted sum of the words of a vector; an odd last value is a word of its own."""
    even = len(values) & ~1
    words = values[:even].view(np.uint64)
    rows = len(words) // PERIOD
    tail = words[rows * PERIOD :]
    total = int(np.dot(tail, _WEIGHTS[: len(tail)]))
    if rows:
        total += int(np.dot(np.add.reduce(words[: rows * PERIOD].reshape(rows, PERIOD), axis=0), _WEIGHTS))
    if even != len(values):
        total += int(values[even:].view(np.uint32)[0]) * int(_WEIGHTS[-1])
    return total
