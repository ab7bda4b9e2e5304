"""The memory that a view change needs besides the state itself: buckets, and not a second copy."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from elastic_moe.config.schema import ElasticConfig, TrainConfig
from elastic_moe.optim.unit_state import UnitState
from elastic_moe.plan.state import buckets
from elastic_moe.plan.state.ownership import Ownership
from elastic_moe.plan.state.transfers import plan_transfers
from elastic_moe.runtime.local_state import LocalState
from elastic_moe.runtime.reconfigure import Reconfigurer
from elastic_moe.runtime.state import HeldState
from elastic_moe.types import Part, Unit
from tests.dist.ranks import Seat, results

WORLD, COUNT, SIZE = 3, 96, 1 << 17
UNIT_BYTES = 4 * 4 * SIZE  # weight, two moments, gradient: 2 MiB
BUCKET, VECTOR = 1 << 20, 8 << 20  # elements in one direction: 4 MiB; bytes
SLACK = 12 << 20  # the allocator's
UNITS = [Unit(f"u{i}", (Part(f"u{i}", 0, SIZE, 0, (SIZE,)),)) for i in range(COUNT)]


def _ownership(shift: int) -> Ownership:
    """Every unit on two of the three ranks; every second one moves on by `shift` ranks."""
    index = np.arange(COUNT)
    primary_U = (index + (index % 2) * shift) % WORLD
    return Ownership(primary_U.astype(np.int32), ((primary_U + 1) % WORLD)[:, None].astype(np.int32))


def _initial(unit: int) -> UnitState:
    return UnitState.initial(UNITS[unit], torch.full((SIZE,), float(unit)))


def _memory(key: str) -> int:
    """Bytes of this process's resident memory, or of its peak, without the pages of files."""
    status = dict(line.split(":\t") for line in Path("/proc/self/status").read_text().splitlines())
    all_kib, files_kib = (int(status[name].split()[0]) for name in (key, "RssFile"))
    return (all_kib - files_kib) << 10


def _change(seat: Seat) -> dict[str, int]:
    """Bytes of a view change: the state before, what arrives, the peak and the end beyond the state before."""
    buckets.VECTOR_BYTES, buckets.LEAST_ELEMENTS = VECTOR, BUCKET
    group = seat.form(1, seat.rank, seat.world)
    before, after = _ownership(0), _ownership(1)
    old = HeldState.build(UNITS, before.role(group.rank), _initial, torch.device("cpu"))
    held_bytes = UNIT_BYTES * len(old.states)
    local, anything = LocalState(committed=7, holdings=[old]), Any
    del old
    config = TrainConfig(elastic=ElasticConfig(check_every_steps=0))
    reconfigurer = Reconfigurer(config, UNITS, (0, 0), local, anything, anything, anything, lambda *_: None)
    transfers = plan_transfers(before.roles(WORLD), after).transfers
    arrives = UNIT_BYTES * sum(transfer.dst == group.rank for transfer in transfers)
    group.barrier()
    start = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    new, moved = reconfigurer.take_over(group, after, transfers, 7)
    peak, end = _memory("VmHWM") - start, _memory("VmRSS") - start
    assert moved == arrives * 3 // 4
    assert local.holdings == [new]
    for unit in np.flatnonzero(after.role(group.rank)).tolist():
        assert new.states[unit].weight.unique().tolist() == [float(unit)]
        assert not new.states[unit]["m"].any()
    group.close()
    return {"held": held_bytes, "arrives": arrives, "peak": peak, "end": end}


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak of a process cannot be reset")
def test_a_view_change_needs_room_for_what_arrives_and_for_buckets() -> None:
    for found in results(WORLD, _change):
        assert found["arrives"] >= found["held"] // 4
        beyond = found["peak"] - found["arrives"]
        assert beyond <= 2 * 4 * BUCKET + 2 * VECTOR + SLACK, {name: n >> 20 for name, n in found.items()}
        assert beyond < found["held"] // 3, "far from a second copy"
        assert found["end"] <= SLACK, "what has left is freed"
