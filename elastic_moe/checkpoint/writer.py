"""Completes checkpoints, once the workers have written the shards (`checkpoint.shards`), and deletes old ones.

Without torch, as `checkpoint.reader`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from elastic_moe.checkpoint.identity import RunIdentity, find_identity
from elastic_moe.checkpoint.manifest import MANIFEST, Manifest, ShardInfo, as_shards
from elastic_moe.checkpoint.reader import check_sizes, load_manifest, require_current
from elastic_moe.checkpoint.storage import CorruptCheckpoint, Storage, persistent
from elastic_moe.run_dir import step_dir, step_of


def write_manifest(
    root_uri: str, step: int, shards: Sequence[ShardInfo | Mapping[str, Any]], meta: Mapping[str, Any] | None = None
) -> Manifest:
    """Make a checkpoint complete. Call it only after all shards are written.

    Raises:
        CorruptCheckpoint: a shard is missing or has another size; no manifest is written.
        StorageUnavailable: the storage failed at every attempt.
    """
    manifest = Manifest(root_uri, step, as_shards(shards), dict(meta or {}))
    storage = Storage(root_uri)
    check_sizes(storage, manifest)
    persistent(lambda: storage.write(f"{manifest.directory}/{MANIFEST}", manifest.to_bytes()))
    return manifest


def retain(root_uri: str, keep: int, stay: set[int] | None = None) -> list[int]:
    """Delete all but the newest `keep` complete checkpoints (at least one), and unfinished ones older than those.

    A checkpoint that lacks a file does not count as complete, nor does one that the run has gone back behind. Such
    a one is kept until the present timeline has a complete checkpoint of its step or a later one. Those whose manifest
    says that they stay are not deleted.

    Args:
        root_uri: the checkpoint root.
        keep: how many.
        stay: older steps that are known to stay and need not be read again; what is found is added.

    Returns:
        The deleted steps.
    """
    stay = set() if stay is None else stay
    storage = Storage(root_uri)
    steps = list_steps(storage)
    history = find_identity(storage, steps, lambda step: load_manifest(root_uri, step).meta)
    kept: list[int] = []
    passed: list[int] = []
    for step in reversed(steps):
        if len(kept) == max(keep, 1):
            break
        try:
            manifest = load_manifest(root_uri, step)
        except (CorruptCheckpoint, FileNotFoundError):
            continue
        try:
            require_current(history, manifest)
            kept.append(step)
        except CorruptCheckpoint:
            passed += [step] if kept else []
    older = [step for step in steps if kept and step < kept[-1] and step not in stay]
    stay |= {step for step in older if _stays(root_uri, step, history)}
    return _delete(storage, sorted({*passed, *older} - stay))


def _stays(root_uri: str, step: int, history: RunIdentity) -> bool:
    """Whether a checkpoint of the present history is kept for good."""
    try:
        manifest = load_manifest(root_uri, step)
        require_current(history, manifest)
        return manifest.stays
    except (CorruptCheckpoint, FileNotFoundError):
        return False


def remove_all(root_uri: str) -> list[int]:
    """Delete all checkpoints, complete or not: the user asked for it.

    Returns:
        The deleted steps.
    """
    storage = Storage(root_uri)
    return _delete(storage, list_steps(storage))


def remove(root_uri: str, steps: Sequence[int]) -> list[int]:
    """Delete the checkpoints of these steps. Returns the steps."""
    return _delete(Storage(root_uri), list(steps))


def list_steps(storage: Storage) -> list[int]:
    """Steps that have a directory in a checkpoint root, in order.

    Raises:
        OSError: the storage failed at every attempt.
    """
    return sorted(step for name in persistent(storage.directories) if (step := step_of(name)) is not None)


def _delete(storage: Storage, steps: list[int]) -> list[int]:
    for step in steps:
        # The manifest is deleted first: an interrupted deletion leaves an unfinished checkpoint, never a damaged one.
        persistent(lambda step=step: storage.remove(f"{step_dir(step)}/{MANIFEST}"))
        persistent(lambda step=step: storage.remove_directory(step_dir(step)))
    return steps
