"""A worker's checkpoint shards hold the state at the time of `save`; a failed write is reported and not raised."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from elastic_moe.checkpoint import local_file
from elastic_moe.checkpoint import storage as storage_module
from elastic_moe.checkpoint.reader import load_manifest
from elastic_moe.checkpoint.shards import read_units
from elastic_moe.checkpoint.writer import write_manifest
from elastic_moe.optim.unit_state import UnitState
from elastic_moe.plan.state.ownership import MIRROR, NONE, PRIMARY
from elastic_moe.plan.state.units import build_units
from elastic_moe.runtime import checkpoints as checkpoints_module
from elastic_moe.runtime.checkpoints import ShardWriter
from elastic_moe.runtime.state import HeldState
from elastic_moe.types import ParamSpec
from tests.storage_faults import install, set_fault

PATIENCE_S = 60.0

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
    assert writer.wait_written(7, PATIENCE_S)
    (report,) = reports.shards
    assert (report["step"], report["generation"], list(report["units"])) == (7, 1, ["owned", "bias"])
    assert report["write_s"] >= 0
    assert not reports.events
    write_manifest(str(tmp_path), 7, [report])

    assert writer.wait_complete(7, PATIENCE_S)
    read = read_units(load_manifest(str(tmp_path), 7), ["owned", "bias"])
    for u in OWNED:
        assert torch.equal(UnitState.stored(UNITS[u], read[UNITS[u].name]).pack(), before[u])


def test_a_failed_write_is_an_event_and_the_next_one_succeeds(
    tmp_path: Path, writer: ShardWriter, reports: Reports, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage_module.time, "sleep", lambda _: None)
    with monkeypatch.context() as patch:
        patch.setattr(local_file, "_sync", full)
        writer.save(7, "r0", held(), OWNED, 1)
        assert not writer.wait_written(7, PATIENCE_S)
        writer.save(7, "r0", held(), OWNED, 2)
        assert not writer.wait_written(7, PATIENCE_S)
    (event,) = reports.events  # the same step and reason again is no news
    assert (event["event"], event["step"]) == ("checkpoint_failed", 7)
    assert "No space left" in event["reason"]
    assert not reports.shards
    writer.save(8, "r0", held(), OWNED, 1)
    assert writer.wait_written(8, PATIENCE_S)
    assert [report["step"] for report in reports.shards] == [8]


@pytest.fixture
def control(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(storage_module, "open_filesystem", storage_module.open_filesystem)
    monkeypatch.setattr(storage_module, "TIMEOUT_S", storage_module.TIMEOUT_S)
    control = tmp_path / "control"
    install(control)
    yield control
    set_fault(control, "")


def test_a_hanging_storage_never_holds_the_step_loop_and_the_newest_copy_is_kept(
    tmp_path: Path, control: Path, writer: ShardWriter, reports: Reports
) -> None:
    set_fault(control, "hang write")
    writer.save(1, "r0", held(), OWNED, 1)
    while writer._waiting is not None:  # the thread takes it
        threading.Event().wait(0.01)
    for step in (2, 3, 4, 5):
        writer.save(step, "r0", held(), OWNED, 1)
    assert not writer.wait_written(1, 0.1)
    assert [(event["event"], event["step"]) for event in reports.events] == [
        ("checkpoint_skipped", step) for step in (2, 3, 4)
    ]
    set_fault(control, "")
    assert writer.wait_written(5, PATIENCE_S)
    assert [report["step"] for report in reports.shards] == [1, 5]


def test_a_storage_that_hangs_for_too_long_is_a_failed_checkpoint(
    tmp_path: Path, control: Path, writer: ShardWriter, reports: Reports, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(control, timeout_s=0.3)
    set_fault(control, "hang write")
    writer.save(1, "r0", held(), OWNED, 1)
    assert not writer.wait_written(1, PATIENCE_S)
    (event,) = reports.events
    assert (event["event"], event["step"]) == ("checkpoint_failed", 1)
    assert "hangs" in event["reason"]


def test_an_unexpected_error_does_not_end_the_thread(
    tmp_path: Path, writer: ShardWriter, reports: Reports, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a fault of the program")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints_module, "write_shard", broken)
        writer.save(1, "r0", held(), OWNED, 1)
        assert not writer.wait_written(1, PATIENCE_S)
    assert [event["reason"] for event in reports.events] == ["a fault of the program"]
    writer.save(2, "r0", held(), OWNED, 1)
    assert writer.wait_written(2, PATIENCE_S)


def test_close_writes_everything_saved_before(tmp_path: Path) -> None:
    reports = Reports()
    writer = ShardWriter(str(tmp_path), reports)
    writer.save(3, "r0", held(), OWNED, 1)
    writer.close()
    assert [report["step"] for report in reports.shards] == [3]
