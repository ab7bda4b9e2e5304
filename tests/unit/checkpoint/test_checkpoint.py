"""A checkpoint is complete or not used: torn, truncated and changed ones are detected, and the previous one is used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from elastic_moe.checkpoint import inventory as inventory_module
from elastic_moe.checkpoint import local_file
from elastic_moe.checkpoint import reader as reader_module
from elastic_moe.checkpoint import storage as storage_module
from elastic_moe.checkpoint import writer as writer_module
from elastic_moe.checkpoint.identity import RunIdentity, write_identity
from elastic_moe.checkpoint.manifest import MANIFEST, SKIPPED_BATCHES, STAYS, Manifest
from elastic_moe.checkpoint.reader import RetiredCheckpoint, find_latest, load_manifest
from elastic_moe.checkpoint.shards import read_units, write_shard
from elastic_moe.checkpoint.storage import CorruptCheckpoint, Storage, StorageUnavailable, persistent
from elastic_moe.checkpoint.writer import remove_all, retain, write_manifest
from elastic_moe.errors import UserError
from elastic_moe.run_dir import step_dir, step_of

UNITS = ["embed#0", "embed#1", "layers.1.experts.3", "layers.1.bias"]


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_module.time, "sleep", lambda _: None)


def state_of(step: int, names: list[str]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    state = {}
    for name in names:
        for part in ("weight",) if name.endswith("bias") else ("weight", "m", "v"):
            state[f"{name}/{part}"] = torch.randn(50, generator=generator)
    return state


def write(root: Path | str, step: int, meta: dict[str, Any] | None = None) -> Manifest:
    shards = [write_shard(str(root), step, f"r{i}", state_of(step, UNITS[i::2])) for i in range(2)]
    return write_manifest(str(root), step, shards, {"generation": 3} | (meta or {}))


def check_state(manifest: Manifest) -> None:
    found = read_units(manifest, UNITS)
    for i in range(2):
        for key, value in state_of(manifest.step, UNITS[i::2]).items():
            unit, part = key.rsplit("/", 1)
            assert torch.equal(found[unit][part], value)
    assert set(found["layers.1.bias"]) == {"weight"}


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_round_trip(tmp_path: Path, scheme: str) -> None:
    root = f"{scheme}{tmp_path}/deep/checkpoints"
    assert find_latest(root) is None
    written = write(root, 50)
    found = find_latest(root)
    assert found == written
    assert found is not None
    assert (found.step, found.meta) == (50, {"generation": 3})
    check_state(found)
    assert found.bytes == sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    assert (tmp_path / "deep/checkpoints/step_00000050/manifest.json").exists()


def test_part_of_a_shard_equals_the_library(tmp_path: Path) -> None:
    manifest = write(tmp_path, 1)
    whole = load_file(tmp_path / manifest.directory / manifest.shards[0].file)
    unit = read_units(manifest, ["layers.1.experts.3"])["layers.1.experts.3"]
    assert all(torch.equal(unit[part], whole[f"layers.1.experts.3/{part}"]) for part in ("weight", "m", "v"))
    unit["weight"].add_(1)  # the caller owns what it read
    with pytest.raises(KeyError, match="no unit other"):
        read_units(manifest, ["other"])


def test_empty_shard(tmp_path: Path) -> None:
    info = write_shard(str(tmp_path), 1, "r0", {})
    assert info.units == ()
    assert read_units(write_manifest(str(tmp_path), 1, [info]), []) == {}


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
@pytest.mark.parametrize("victim", ["shard", "manifest"])
def test_damage_is_seen_and_the_previous_used(tmp_path: Path, damage: Callable[[Path], None], victim: str) -> None:
    write(tmp_path, 50)
    newest = write(tmp_path, 100)
    damage(tmp_path / newest.directory / (newest.shards[1].file if victim == "shard" else MANIFEST))
    skipped: list[tuple[int, str]] = []
    found = find_latest(str(tmp_path), on_skip=lambda step, reason: skipped.append((step, reason)))
    assert found is not None
    assert found.step == 50
    check_state(found)
    assert [step for step, _ in skipped] == [100]


def test_every_flipped_bit_of_a_manifest_is_seen(tmp_path: Path) -> None:
    data = write(tmp_path, 7).to_bytes()
    good = Manifest.from_bytes("", data)
    for position in range(len(data)):
        changed = bytearray(data)
        changed[position] ^= 1 << (position % 8)
        try:
            assert Manifest.from_bytes("", bytes(changed)) == good  # only insignificant space may change unseen
        except CorruptCheckpoint:
            continue


def test_torn_checkpoint_is_skipped(tmp_path: Path) -> None:
    write(tmp_path, 50)
    write_shard(str(tmp_path), 100, "r0", state_of(100, UNITS))  # killed before the manifest
    (tmp_path / "step_00000100" / ".half.tmp").write_bytes(b"half")
    skipped: list[tuple[int, str]] = []
    found = find_latest(str(tmp_path), on_skip=lambda *skip: skipped.append(skip))
    assert found is not None
    assert found.step == 50
    assert skipped == [(100, "unfinished")]


@pytest.mark.parametrize("skipped", [-1, 2**40, "many", None])
def test_a_manifest_with_an_impossible_place_in_the_data_is_damaged(tmp_path: Path, skipped: object) -> None:
    manifest = Manifest(str(tmp_path), 5, (), {SKIPPED_BATCHES: skipped})
    with pytest.raises(CorruptCheckpoint):
        Manifest.from_bytes(str(tmp_path), manifest.to_bytes())


def test_manifest_is_refused_while_a_shard_is_missing(tmp_path: Path) -> None:
    info = write_shard(str(tmp_path), 1, "r0", state_of(1, UNITS))
    path = tmp_path / step_dir(1) / info.file
    truncate(path)
    with pytest.raises(CorruptCheckpoint):
        write_manifest(str(tmp_path), 1, [info])
    path.unlink()
    with pytest.raises(CorruptCheckpoint):
        write_manifest(str(tmp_path), 1, [info.as_dict()])
    assert not (tmp_path / step_dir(1) / MANIFEST).exists()


def test_writing_a_step_again_keeps_the_complete_one(tmp_path: Path) -> None:
    first = write(tmp_path, 50)
    write_shard(str(tmp_path), 50, "r0", state_of(51, UNITS))  # the same tag, other content, no manifest
    found = find_latest(str(tmp_path))
    assert found == first
    check_state(first)


def test_damage_after_verification_is_seen_or_harmless(tmp_path: Path) -> None:
    manifest = write(tmp_path, 1)
    path = tmp_path / manifest.directory / manifest.shards[0].file
    data = path.read_bytes()
    for broken in (b"\xff" * 8 + data[8:], data[:8] + b"x" * 40 + data[48:], data[:60], b""):
        path.write_bytes(broken)
        with pytest.raises(CorruptCheckpoint):
            read_units(manifest, ["embed#0"])
    path.unlink()
    with pytest.raises(CorruptCheckpoint):
        read_units(manifest, ["embed#0"])


def test_failed_write_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def full(path: str) -> None:
        calls.append(path)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(local_file, "_sync", full)
        with pytest.raises(OSError, match="No space left"):
            write_shard(str(tmp_path), 1, "r0", state_of(1, UNITS))
    assert len(calls) == storage_module.ATTEMPTS
    assert list((tmp_path / step_dir(1)).iterdir()) == []
    check_state(write(tmp_path, 1))


def test_storage_that_fails_for_a_while() -> None:
    outcomes: list[Exception | int] = [OSError("stalled"), OSError("stalled"), 7]

    def action() -> int:
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    assert persistent(action) == 7
    outcomes[:] = [FileNotFoundError("none"), 7]
    with pytest.raises(FileNotFoundError):
        persistent(action)


@pytest.mark.parametrize("operation", ["read", "sizes", "sha256", "directories"])
@pytest.mark.parametrize("errno", [5, 13, 116])
def test_storage_that_cannot_be_read_is_not_an_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str, errno: int
) -> None:
    """An error tells nothing about the checkpoints, so neither an older one nor none is taken."""
    write(tmp_path, 10)
    newest = write(tmp_path, 20)

    def fail(self: Storage, *_: str) -> None:
        raise OSError(errno, "the storage fails")

    with monkeypatch.context() as patch:
        patch.setattr(Storage, operation, fail)
        with pytest.raises(StorageUnavailable, match="the storage fails"):
            find_latest(str(tmp_path))
    assert find_latest(str(tmp_path)) == newest


def test_retain(tmp_path: Path) -> None:
    for step in (10, 20, 40, 50):
        write(tmp_path, step)
    for step in (5, 30, 60):
        write_shard(str(tmp_path), step, "r0", state_of(step, UNITS))  # unfinished
    damaged = load_manifest(str(tmp_path), 50)
    truncate(tmp_path / damaged.directory / damaged.shards[0].file)
    (tmp_path / "notes").mkdir()
    assert retain(str(tmp_path), 2) == [5, 10]
    assert sorted(step_of(p.name) or 0 for p in tmp_path.iterdir()) == [0, 20, 30, 40, 50, 60]
    assert retain(str(tmp_path), 0) == [20, 30]
    found = find_latest(str(tmp_path))
    assert found is not None
    assert found.step == 40
    assert retain(str(tmp_path / "none"), 1) == []


def test_what_stays_is_read_once_and_not_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, read, identity = str(tmp_path), list[int](), RunIdentity.new("run")
    write_identity(Storage(root), identity)
    for step in (10, 20, 30, 40, 50):
        write(tmp_path, step, {STAYS: True} if step in (10, 30) else {})

    def load(root_uri: str, step: int) -> Manifest:
        read.append(step)
        return load_manifest(root_uri, step)

    monkeypatch.setattr(writer_module, "load_manifest", load)
    stay: set[int] = set()
    assert retain(root, 2, stay) == [20]
    assert stay == {10, 30}
    read.clear()
    assert retain(root, 1, stay) == [40]
    assert not {10, 30} & set(read)
    write_identity(Storage(root), identity.forked(20, 1))
    write(tmp_path, 60, {"timeline": 2})
    assert retain(root, 1) == [30, 50], "what the run has gone back behind does not stay"
    assert retain(root, 1) == []


def test_remove_all(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        write(tmp_path, step)
    assert remove_all(str(tmp_path)) == [10, 20, 30]
    assert find_latest(str(tmp_path)) is None


def test_interrupted_deletion_leaves_an_unfinished_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 10)
    write(tmp_path, 20)

    def killed(self: Storage, name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Storage, "remove_directory", killed)
    with pytest.raises(KeyboardInterrupt):
        retain(str(tmp_path), 1)
    with pytest.raises(FileNotFoundError):
        load_manifest(str(tmp_path), 10)


def test_unknown_scheme_is_a_user_error() -> None:
    with pytest.raises(UserError, match=r"checkpoint\.dir"):
        find_latest("nosuch://bucket/x")


def test_a_checkpoint_that_is_replaced_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that goes on completes one more and keeps the newest only; whoever reads the one before looks again."""
    stale = write(tmp_path, 10)
    verify = reader_module.verify_alone

    def replace_and_verify(manifest: Manifest) -> None:
        write(tmp_path, manifest.step + 10)
        retain(str(tmp_path), 1)
        monkeypatch.setattr(reader_module, "verify_alone", verify)
        verify(manifest)

    skipped: list[int] = []
    monkeypatch.setattr(reader_module, "verify_alone", replace_and_verify)
    found = find_latest(str(tmp_path), on_skip=lambda step, _: skipped.append(step))
    assert found is not None
    assert (found.step, skipped) == (20, [10])
    with pytest.raises(RetiredCheckpoint):
        read_units(stale, UNITS)


def test_a_checkpoint_that_is_removed_while_it_is_verified_is_not_listed_as_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (10, 20):
        write(tmp_path, step)
    verify = inventory_module.verify_alone

    def retire_and_verify(manifest: Manifest) -> None:
        retain(str(tmp_path), 1)
        verify(manifest)

    monkeypatch.setattr(inventory_module, "verify_alone", retire_and_verify)
    found = inventory_module.list_checkpoints(str(tmp_path), verify=True)
    assert [(entry.step, entry.state) for entry in found] == [(20, "complete")]
