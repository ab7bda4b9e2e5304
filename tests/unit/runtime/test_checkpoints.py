"""A worker's checkpoint shards hold the state at the time of `save`; a failed write is reported and not raised."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from elastic_moe.checkpoint import storage as storage_module
from elastic_moe.checkpoint.identity import RunIdentity, write_identity
from elastic_moe.checkpoint.storage import Storage
from elastic_moe.checkpoint.writer import write_manifest
from elastic_moe.errors import UserError
from elastic_moe.optim.unit_state import UnitState
from elastic_moe.plan.state.ownership import MIRROR, NONE, PRIMARY
from elastic_moe.plan.state.units import build_units
from elastic_moe.run_dir import RUN
from elastic_moe.runtime.checkpoints import CheckpointStorage, ShardWriter
from elastic_moe.runtime.state import HeldState
from elastic_moe.types import ParamSpec

UNITS = build_units(
    [
        ParamSpec("owned", (3, 2)),
        ParamSpec("mirrored", (4,)),
        ParamSpec("bias", (2,), optimizer="bias", moe_layer=0),
        ParamSpec("elsewhere", (5,)),
    ],
    0,
)
ROLES = np.array([PRIMARY, MIRROR, PRIMARY, NONE], dtype=np.uint8)
OWNED = [0, 2]


class Reports:
    """Keeps the reports of a writer."""

    def __init__(self) -> None:
        self.shards: list[Mapping[str, Any]] = []
        self.events: list[Mapping[str, Any]] = []

    def shard(self, shard: Mapping[str, Any]) -> None:
        self.shards.append(shard)

    def event(self, event: Mapping[str, Any]) -> None:
        self.events.append(event)


def held() -> HeldState:
    source = {u: UnitState.initial(unit, torch.arange(float(unit.numel)) + u) for u, unit in enumerate(UNITS)}
    return HeldState.build(UNITS, ROLES, source, torch.device("cpu"))


@pytest.fixture
def reports() -> Reports:
    return Reports()


@pytest.fixture
def writer(tmp_path: Path, reports: Reports) -> Iterator[ShardWriter]:
    writer = ShardWriter(str(tmp_path), reports)
    yield writer
    writer.close()


def test_a_shard_has_the_owned_units_as_they_were(tmp_path: Path, writer: ShardWriter, reports: Reports) -> None:
    state = held()
    before = {u: state.states[u].pack() for u in OWNED}
    writer.save(7, "g00001-r00000", state, OWNED, 1)
    for u in OWNED:
        state.states[u].weight.add_(1.0)  # training goes on while the shard is written
    writer.drain()
    (report,) = reports.shards
    assert (report["step"], report["generation"], list(report["units"])) == (7, 1, ["owned", "bias"])
    assert report["write_s"] >= 0
    assert not reports.events
    write_manifest(str(tmp_path), 7, [report])

    storage = CheckpointStorage(str(tmp_path))
    assert storage.latest_step() == 7
    read = storage.read(7, ["owned", "bias"])
    for u in OWNED:
        assert torch.equal(UnitState.stored(UNITS[u], read[UNITS[u].name]).pack(), before[u])
    with pytest.raises(KeyError, match="mirrored"):
        storage.read(7, ["mirrored"])


def test_only_a_run_that_never_wrote_a_checkpoint_begins_anew(tmp_path: Path) -> None:
    storage = CheckpointStorage(str(tmp_path))
    with pytest.raises(UserError, match="no readable checkpoint"):
        storage.latest_step()  # not mounted, or emptied
    identity = RunIdentity.new("run")
    write_identity(Storage(str(tmp_path)), identity)
    assert storage.latest_step() == -1
    write_identity(Storage(str(tmp_path)), replace(identity, first_checkpoint=10))
    with pytest.raises(UserError, match="no readable checkpoint"):
        storage.latest_step()
    (tmp_path / RUN).write_bytes(b"{}")
    with pytest.raises(UserError, match="no readable checkpoint"):
        storage.latest_step()


def test_a_failed_write_is_an_event_and_the_next_one_succeeds(
    tmp_path: Path, writer: ShardWriter, reports: Reports, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage_module.time, "sleep", lambda _: None)
    with monkeypatch.context() as patch:
        patch.setattr(storage_module, "_sync", full)
        writer.save(7, "r0", held(), OWNED, 1)
        writer.drain()
    (event,) = reports.events
    assert (event["event"], event["step"]) == ("checkpoint_failed", 7)
    assert "No space left" in event["reason"]
    assert not reports.shards
    writer.save(8, "r0", held(), OWNED, 1)
    writer.drain()
    assert [report["step"] for report in reports.shards] == [8]


def test_close_writes_everything_saved_before(tmp_path: Path) -> None:
    reports = Reports()
    writer = ShardWriter(str(tmp_path), reports)
    for step in (1, 2, 3):
        writer.save(step, "r0", held(), OWNED, 1)
    writer.close()
    assert [report["step"] for report in reports.shards] == [1, 2, 3]
