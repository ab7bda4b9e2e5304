"""A call that hangs is left behind: its caller goes on, and few threads hang, however often it tries."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from elastic_moe.checkpoint import bounded as bounded_module
from elastic_moe.checkpoint import storage as storage_module
from elastic_moe.checkpoint.bounded import Abandoned, Activity, Call, bounded
from elastic_moe.checkpoint.reader import find_latest
from elastic_moe.checkpoint.shards import write_shard
from elastic_moe.checkpoint.storage import StorageUnavailable, probe
from elastic_moe.checkpoint.writer import write_manifest
from elastic_moe.errors import UserError
from tests.patience import PATIENCE_S, attempt, until
from tests.storage_faults import install, set_fault


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_module, "SLICE_S", 0.01)


@pytest.fixture
def control(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(storage_module, "open_filesystem", storage_module.open_filesystem)
    monkeypatch.setattr(storage_module, "TIMEOUT_S", storage_module.TIMEOUT_S)
    monkeypatch.setattr(storage_module, "PAUSE_S", 0.0)
    control = tmp_path / "control"
    install(control, timeout_s=0.5)
    yield control
    set_fault(control, "")


def test_a_value_and_an_error_come_through() -> None:
    assert bounded("here", lambda _: 7, PATIENCE_S) == 7
    with pytest.raises(KeyError):
        bounded("here", lambda _: {}["none"], PATIENCE_S)


def test_a_call_that_gets_on_is_waited_for() -> None:
    ticks = threading.Event()

    def action(activity: Activity) -> int:
        for _ in range(40):
            ticks.wait(0.02)
            activity.moved(1)
        return activity.moved_bytes

    outer = Activity()
    assert bounded("here", action, 0.5, outer) == 40
    assert outer.moved_bytes == 40


def test_a_hanging_call_is_left_behind_and_bars_the_place_until_it_returns() -> None:
    release, calls = threading.Event(), []

    def hang(_: Activity) -> None:
        calls.append(1)
        release.wait(PATIENCE_S)

    with pytest.raises(TimeoutError, match="there did not answer"):
        bounded("there", hang, 0.05)
    for _ in range(3):
        with pytest.raises(TimeoutError, match="there hangs"):
            bounded("there", hang, 0.05)
    assert len(calls) == 1
    assert bounded("elsewhere", lambda _: 1, PATIENCE_S) == 1
    release.set()
    until(lambda: attempt(lambda: bounded("there", lambda _: 2, PATIENCE_S), TimeoutError) == 2, "the place")


def test_a_call_whose_caller_was_left_behind_ends() -> None:
    reached: list[str] = []

    def inner(activity: Activity) -> None:
        while True:
            threading.Event().wait(0.01)
            activity.moved(1)

    def outer_action(activity: Activity) -> None:
        try:
            bounded("chain", inner, PATIENCE_S, activity)
        except Abandoned:
            reached.append("ended")
            raise

    call = Call("outer", outer_action)
    call.abandon()
    while not call.done:
        call.wait()
    assert reached == ["ended"]


def shard(root: Path, step: int) -> None:
    info = write_shard(str(root), step, "r0", {"a/weight": torch.full((3,), float(step))})
    write_manifest(str(root), step, [info])


@pytest.mark.parametrize("fault", ["hang read", "error read"])
def test_a_storage_that_hangs_or_fails_is_unavailable_and_loses_nothing(
    tmp_path: Path, control: Path, fault: str
) -> None:
    root = tmp_path / "checkpoints"
    shard(root, 10)
    shard(root, 20)
    set_fault(control, fault)
    with pytest.raises(StorageUnavailable):
        find_latest(str(root))
    set_fault(control, "")
    found = until(lambda: attempt(lambda: find_latest(str(root)), StorageUnavailable), "the storage")
    assert found is not None
    assert found.step == 20


@pytest.mark.parametrize("fault", ["hang write", "error write", "full write"])
def test_a_write_that_fails_is_unavailable(tmp_path: Path, control: Path, fault: str) -> None:
    set_fault(control, fault)
    with pytest.raises(StorageUnavailable):
        shard(tmp_path / "checkpoints", 10)


@pytest.mark.parametrize("fault", ["hang write", "error write", "full write", "error read", "absent read"])
def test_a_root_that_does_not_give_back_what_is_written_is_refused(tmp_path: Path, control: Path, fault: str) -> None:
    root = tmp_path / "checkpoints"
    set_fault(control, fault)
    with pytest.raises(UserError, match=str(root)):
        probe(str(root))


def test_the_probe_leaves_nothing_behind(tmp_path: Path) -> None:
    shard(tmp_path, 10)
    before = sorted(tmp_path.rglob("*"))
    probe(str(tmp_path))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_root_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"checkpoint\.dir"):
        probe(str(tmp_path / "file" / "checkpoints"))
