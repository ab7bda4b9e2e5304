"""Checksums of the raw bits of a unit's state.

A checksum is a sum modulo 2^64 of 64-bit words, each times an odd weight that depends on its place. A word that changes
alone always shows, because an odd number has an inverse. The weights repeat after `PERIOD` words, so one pass of
additions at the speed of memory is enough.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from elastic_moe.optim.unit_state import UnitState

PERIOD = 512  # words; a row of this length stays in the first-level cache

_WEIGHTS = np.arange(1, 2 * PERIOD, 2, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
_FIELD = 0xD1342543DE82EF95  # odd; fields that changed places show too
_MASK = 2**64 - 1


def checksums(states: Sequence[UnitState]) -> NDArray[np.uint64]:
    """Checksum of each unit's state, of all its fields. Those on a GPU are computed there, and read in one go."""
    fields_N = [list(state.fields.values()) for state in states]
    on_device = [tensor for fields in fields_N for tensor in fields if tensor.device.type != "cpu"]
    weights = torch.from_numpy(_WEIGHTS.view(np.int64)).to(on_device[0].device) if on_device else None
    read: Iterator[int] = iter(())
    if weights is not None:
        read = iter(torch.stack([_sum_on_device(tensor, weights) for tensor in on_device]).tolist())
    totals = np.zeros(len(states), dtype=np.uint64)
    for number, fields in enumerate(fields_N):
        total = 0
        for tensor in fields:
            own = _sum(tensor.numpy()) if tensor.device.type == "cpu" else next(read)
            total = (total * _FIELD + own) & _MASK
        totals[number] = total
    return totals


def _sum_on_device(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """`_sum` as a scalar int64 tensor on the values' device: sums of int64 wrap around as those of uint64 do."""
    even = len(values) & ~1
    words = values[:even].clone().view(torch.int64)  # a new vector begins at a whole word
    total = (torch.nn.functional.pad(words, (0, -len(words) % PERIOD)).view(-1, PERIOD).sum(dim=0) * weights).sum()
    if even != len(values):
        total = total + (values[even:].view(torch.int32).to(torch.int64) & 0xFFFFFFFF)[0] * weights[-1]
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
