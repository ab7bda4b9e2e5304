"""All ranks bring back the same checkpoint, the newest whole one; a storage that cannot be read is waited for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from elastic_moe.checkpoint import storage as storage_module
from elastic_moe.checkpoint.identity import RunIdentity, write_identity
from elastic_moe.checkpoint.manifest import MANIFEST
from elastic_moe.checkpoint.shards import write_shard
from elastic_moe.checkpoint.storage import Storage
from elastic_moe.checkpoint.writer import retain, write_manifest
from elastic_moe.errors import StorageFailed, UserError
from elastic_moe.run_dir import RUN, step_dir
from elastic_moe.runtime import durable as durable_module
from elastic_moe.runtime.durable import DurableCheckpoints
from tests.patience import PATIENCE_S, until
from tests.storage_faults import install, set_fault

RANKS = 3


class Ranks:
    """Collectives between threads."""

    def __init__(self, world_size: int) -> None:
        self.barrier = threading.Barrier(world_size, timeout=PATIENCE_S)
        self.values: list[torch.Tensor] = [torch.empty(0)] * world_size


class ThreadGroup:
    """One rank's collectives."""

    def __init__(self, ranks: Ranks, rank: int) -> None:
        self._ranks, self.rank, self.world_size = ranks, rank, len(ranks.values)

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        self._ranks.values[self.rank] = tensor
        self._ranks.barrier.wait()
        gathered = torch.stack(self._ranks.values)
        self._ranks.barrier.wait()
        return gathered

    def barrier(self) -> None:
        self._ranks.barrier.wait()


class Restore:
    """`restore` on every rank, each in a thread, with the events that the ranks report."""

    def __init__(self, roots: list[Path], wait_s: float = PATIENCE_S, expected: bool = True) -> None:
        self.events: list[Mapping[str, Any]] = []
        self.results: list[Any] = [None] * len(roots)
        ranks = Ranks(len(roots))

        def work(rank: int) -> None:
            durable = DurableCheckpoints(str(roots[rank]), wait_s, self.events.append)
            names = ["shared", f"u{rank}"]
            try:
                self.results[rank] = durable.restore(cast(Any, ThreadGroup(ranks, rank)), names, expected)
            except Exception as error:  # noqa: BLE001 - a result
                self.results[rank] = error

        self.threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(roots))]
        for thread in self.threads:
            thread.start()

    def join(self) -> Restore:
        for thread in self.threads:
            thread.join(PATIENCE_S)
        return self

    def named(self, event: str) -> list[Mapping[str, Any]]:
        return [found for found in self.events if found["event"] == event]

    def wait_for(self, event: str) -> None:
        until(lambda: self.named(event), event)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durable_module, "FIRST_PAUSE_S", 0.0)


@pytest.fixture
def control(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(storage_module, "open_filesystem", storage_module.open_filesystem)
    monkeypatch.setattr(storage_module, "TIMEOUT_S", storage_module.TIMEOUT_S)
    control = tmp_path / "control"
    install(control, timeout_s=0.5)
    yield control
    set_fault(control, "")


def save(root: Path, step: int) -> list[Path]:
    """A checkpoint of four shards. Returns their paths."""
    tensor = torch.full((5,), float(step))
    shards = [write_shard(str(root), step, name, {f"{name}/weight": tensor}) for name in ("shared", "u0", "u1", "u2")]
    write_manifest(str(root), step, shards)
    return [root / step_dir(step) / shard.file for shard in shards]


def assert_restored(restore: Restore, step: int) -> None:
    for rank, result in enumerate(restore.join().results):
        assert not isinstance(result, Exception), result
        state = result.state
        assert result.step == step
        assert set(state) == {"shared", f"u{rank}"}
        assert all((unit["weight"] == step).all() for unit in state.values())


def test_the_newest_checkpoint_comes_back(tmp_path: Path) -> None:
    for step in (10, 20):
        save(tmp_path, step)
    restore = Restore([tmp_path] * RANKS)
    assert_restored(restore, 20)
    assert not restore.events


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("victim", [0, 1, 2, 3])
@pytest.mark.parametrize("damage", [flip, Path.unlink])
def test_damage_in_any_file_leads_all_ranks_to_the_older_one(
    tmp_path: Path, victim: int, damage: Callable[[Path], None]
) -> None:
    """Each file is verified by one rank; all of them pass the checkpoint over."""
    save(tmp_path, 10)
    damage(save(tmp_path, 20)[victim])
    restore = Restore([tmp_path] * RANKS)
    assert_restored(restore, 10)
    assert {event["step"] for event in restore.named("checkpoint_damaged")} == {20}
    assert (tmp_path / step_dir(20)).exists()


def test_a_damaged_manifest_is_passed_over_and_told(tmp_path: Path) -> None:
    save(tmp_path, 10)
    save(tmp_path, 20)
    flip(tmp_path / step_dir(20) / MANIFEST)
    restore = Restore([tmp_path] * RANKS)
    assert_restored(restore, 10)
    assert [event["step"] for event in restore.named("checkpoint_damaged")] == [20]


def test_a_checkpoint_that_lacks_a_unit_is_passed_over(tmp_path: Path) -> None:
    save(tmp_path, 10)
    write_manifest(str(tmp_path), 20, [write_shard(str(tmp_path), 20, "r0", {"shared/weight": torch.zeros(5)})])
    restore = Restore([tmp_path] * RANKS)
    assert_restored(restore, 10)
    assert "has no unit" in restore.named("checkpoint_damaged")[0]["reason"]


@pytest.mark.parametrize("expected", [True, False])
def test_a_run_that_never_saved_begins_anew(tmp_path: Path, expected: bool) -> None:
    write_identity(Storage(str(tmp_path)), RunIdentity.new("run"))
    restore = Restore([tmp_path] * RANKS, expected=expected).join()
    assert [result.step for result in restore.results] == [-1] * RANKS


@pytest.mark.parametrize("content", ["nothing", "a run that has saved", "damage"])
def test_a_run_that_saved_and_finds_nothing_ends_with_a_sentence(tmp_path: Path, content: str) -> None:
    if content == "a run that has saved":
        write_identity(Storage(str(tmp_path)), replace(RunIdentity.new("run"), first_checkpoint=10))
    elif content == "damage":
        (tmp_path / RUN).write_bytes(b"{}")
    for result in Restore([tmp_path] * RANKS, wait_s=0.5).join().results:
        assert isinstance(result, UserError)
        assert "no readable checkpoint" in str(result)
        assert result.exit_code == 2


def test_a_storage_that_is_mounted_late_is_waited_for(tmp_path: Path) -> None:
    save(tmp_path / "elsewhere", 10)
    write_identity(Storage(str(tmp_path / "elsewhere")), replace(RunIdentity.new("run"), first_checkpoint=10))
    restore = Restore([tmp_path / "root"] * RANKS)
    restore.wait_for("storage_unavailable")
    (tmp_path / "elsewhere").rename(tmp_path / "root")
    assert_restored(restore, 10)


@pytest.mark.parametrize("fault", ["error read", "hang read"])
def test_a_storage_that_cannot_be_read_is_waited_for(tmp_path: Path, control: Path, fault: str) -> None:
    root = tmp_path / "checkpoints"
    save(root, 10)
    save(root, 20)
    set_fault(control, fault)
    restore = Restore([root] * RANKS)
    restore.wait_for("storage_unavailable")
    set_fault(control, "")
    assert_restored(restore, 20)


def test_a_storage_that_never_answers_ends_the_run_with_a_sentence(tmp_path: Path, control: Path) -> None:
    root = tmp_path / "checkpoints"
    save(root, 10)
    set_fault(control, "error read")
    restore = Restore([root] * RANKS, wait_s=0.5).join()
    for result in restore.results:
        assert isinstance(result, StorageFailed)
        assert str(root) in str(result)
        assert result.exit_code == 3
    assert (root / step_dir(10) / MANIFEST).exists()


def test_ranks_that_see_different_storage_hold(tmp_path: Path) -> None:
    """On one node the storage is not mounted: its rank sees an empty directory."""
    save(tmp_path / "mounted", 10)
    roots = [tmp_path / "mounted", tmp_path / "mounted", tmp_path / "empty"]
    restore = Restore(roots, wait_s=0.5).join()
    assert all(isinstance(result, StorageFailed) for result in restore.results)
    assert "every node must see the same storage" in restore.named("storage_unavailable")[0]["reason"]


def test_a_storage_that_says_for_a_moment_that_nothing_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 10)
    directories, lies = storage_module.Storage.directories, [True] * RANKS

    def lie(self: storage_module.Storage) -> list[str]:
        return [] if lies and lies.pop() else directories(self)

    monkeypatch.setattr(storage_module.Storage, "directories", lie)
    assert_restored(Restore([tmp_path] * RANKS, expected=True), 10)


def test_a_checkpoint_that_is_replaced_while_it_is_read_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The coordinator completes one more while the ranks read, and keeps the newest only."""
    save(tmp_path, 10)
    replaced, verify = threading.Lock(), durable_module.verify_shards

    def replace_and_verify(*arguments: Any) -> None:
        with replaced:
            if not (tmp_path / step_dir(20)).exists():
                save(tmp_path, 20)
                assert retain(str(tmp_path), 1) == [10]
        verify(*arguments)

    monkeypatch.setattr(durable_module, "verify_shards", replace_and_verify)
    restore = Restore([tmp_path] * RANKS)
    assert_restored(restore, 20)
    assert not restore.events
