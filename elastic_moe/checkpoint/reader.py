"""Finds checkpoints: the newest complete one that verifies. `checkpoint.shards` reads what is in it.

Without torch: a coordinator or a driver has no use for it, and importing it takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from elastic_moe.checkpoint.bounded import Activity
from elastic_moe.checkpoint.identity import RunIdentity, find_identity
from elastic_moe.checkpoint.manifest import MANIFEST, Manifest
from elastic_moe.checkpoint.storage import CorruptCheckpoint, Storage, persistent
from elastic_moe.run_dir import step_dir, step_of

READERS = 4  # files that a process verifies at once where no other ranks help
LOOKS = 3  # at a root whose checkpoints change while they are read


class RetiredCheckpoint(FileNotFoundError):
    """The checkpoint was removed while it was read. That is no damage: a newer one has taken its place."""


def load_manifest(root_uri: str, step: int) -> Manifest:
    """Read the manifest of one step, and check that its files exist and have their sizes.

    Raises:
        FileNotFoundError: the checkpoint is unfinished, does not exist, or was removed meanwhile.
        CorruptCheckpoint: the manifest is damaged, or a file is missing or truncated.
        StorageUnavailable: something cannot be read, so nothing is known.
    """
    storage = Storage(root_uri)
    manifest = _read_manifest(storage, root_uri, step)
    try:
        check_sizes(storage, manifest)
    except CorruptCheckpoint as error:
        raise damaged(storage, manifest, str(error)) from error
    return manifest


def newest_manifest(
    root_uri: str,
    below: int | None = None,
    activity: Activity | None = None,
    on_damage: Callable[[int, str], None] | None = None,
) -> Manifest | None:
    """The manifest of the newest checkpoint that has an undamaged one; its files are not looked at.

    A checkpoint of a timeline that the run has gone back behind does not count.

    Args:
        root_uri: the checkpoint root; need not exist.
        below: look for checkpoints of earlier steps than this.
        activity: told of the bytes that are read.
        on_damage: called as on_damage(step, reason) for every damaged manifest that is passed over.

    Raises:
        StorageUnavailable: the root, or a manifest, cannot be read.
    """
    storage = Storage(root_uri, activity)
    steps = _steps(storage)
    history = find_identity(storage, steps, lambda step: _read_manifest(storage, root_uri, step).meta)
    for step in steps:
        if below is None or step < below:
            try:
                manifest = _read_manifest(storage, root_uri, step)
                if history.holds(RunIdentity.of_meta(manifest.meta).timeline, step):
                    return manifest
            except FileNotFoundError:
                continue
            except CorruptCheckpoint as error:
                if on_damage is not None:
                    on_damage(step, str(error))
    return None


def _steps(storage: Storage) -> list[int]:
    """Steps that have a directory, the newest first."""
    names = persistent(storage.directories)
    return sorted((step for name in names if (step := step_of(name)) is not None), reverse=True)


def _read_manifest(storage: Storage, root_uri: str, step: int) -> Manifest:
    manifest = Manifest.from_bytes(root_uri, persistent(lambda: storage.read(f"{step_dir(step)}/{MANIFEST}")))
    if manifest.step != step:
        raise CorruptCheckpoint(f"manifest in {step_dir(step)} is of step {manifest.step}")
    RunIdentity.of_meta(manifest.meta)  # its types are checked once, here
    return manifest


def damaged(storage: Storage, manifest: Manifest, reason: str) -> OSError:
    """The error of a checkpoint that lacks something. Removing one begins with its manifest, which tells the two apart.

    Raises:
        StorageUnavailable: the manifest cannot be looked for.
    """
    try:
        persistent(lambda: storage.read(f"{manifest.directory}/{MANIFEST}"))
    except FileNotFoundError:
        return RetiredCheckpoint(f"the checkpoint of step {manifest.step} was removed while it was read")
    return CorruptCheckpoint(reason)


def check_sizes(storage: Storage, manifest: Manifest) -> None:
    """Compare the sizes of a checkpoint's files, which one listing tells.

    Raises:
        CorruptCheckpoint: a file is missing or has another size.
        StorageUnavailable: the directory cannot be listed.
    """
    sizes = persistent(lambda: storage.sizes(manifest.directory))
    for shard in manifest.shards:
        if sizes.get(shard.file, -1) != shard.bytes:
            path = storage.path(f"{manifest.directory}/{shard.file}")
            raise CorruptCheckpoint(f"{path} has {sizes.get(shard.file, -1)} bytes, not {shard.bytes}")


def verify_shards(manifest: Manifest, rank: int = 0, world_size: int = 1, activity: Activity | None = None) -> None:
    """Compare every file with its size and checksum, or one rank's share of the files.

    Args:
        manifest: the checkpoint.
        rank, world_size: the share; every file is in the share of one rank.
        activity: told of the bytes that are read.

    Raises:
        CorruptCheckpoint: a file differs.
        RetiredCheckpoint: the checkpoint was removed meanwhile.
        StorageUnavailable: a file cannot be read.
    """
    storage = Storage(manifest.root_uri, activity)
    for shard in sorted(manifest.shards, key=lambda shard: (-shard.bytes, shard.file))[rank::world_size]:
        name = f"{manifest.directory}/{shard.file}"
        try:
            found = persistent(lambda name=name, size=shard.bytes: storage.sha256(name, size))
        except FileNotFoundError as error:
            raise damaged(storage, manifest, f"{storage.path(name)} is missing") from error
        if found != shard.sha256:
            raise CorruptCheckpoint(f"{storage.path(name)} does not match its checksum")


def verify_alone(manifest: Manifest) -> None:
    """As `verify_shards` of all files, by one process that reads several at once."""
    readers = min(READERS, max(1, len(manifest.shards)))
    with ThreadPoolExecutor(readers, thread_name_prefix="verify") as pool:
        for share in [pool.submit(verify_shards, manifest, reader, readers) for reader in range(readers)]:
            share.result()


def find_latest(
    root_uri: str, verify: bool = True, on_skip: Callable[[int, str], None] | None = None
) -> Manifest | None:
    """Find the newest complete checkpoint. None if the root was listed, and holds none that is complete and whole.

    A checkpoint of a timeline that the run has gone back behind (`checkpoint.identity`) does not count. A root that has
    changed meanwhile is looked at again: a run that goes on replaces its checkpoints.

    Args:
        root_uri: the checkpoint root; need not exist.
        verify: compare checksums too, which reads every file once. Sizes are always compared.
        on_skip: called as on_skip(step, reason) for every newer checkpoint that is unfinished, damaged or abandoned.

    Raises:
        StorageUnavailable: the root cannot be listed, or a checkpoint newer than every whole one cannot be read. The
            storage may answer later, so the caller must not take an older state.
    """
    storage = Storage(root_uri)
    seen: list[int] | None = None
    for _ in range(LOOKS):
        steps = _steps(storage)
        if steps == seen:
            break
        found = _newest_whole(root_uri, steps, verify, on_skip)
        if found is not None:
            return found
        seen = steps
    return None


def _newest_whole(
    root_uri: str, steps: Sequence[int], verify: bool, on_skip: Callable[[int, str], None] | None
) -> Manifest | None:
    """The newest of these checkpoints that is complete and whole; see `find_latest`."""
    history = find_identity(Storage(root_uri), steps, lambda step: load_manifest(root_uri, step).meta)
    for step in steps:
        try:
            manifest = load_manifest(root_uri, step)
            require_current(history, manifest)
            if verify:
                verify_alone(manifest)
            return manifest
        except RetiredCheckpoint as error:
            reason = str(error)
        except FileNotFoundError:
            reason = "unfinished"
        except CorruptCheckpoint as error:
            reason = str(error)
        if on_skip is not None:
            on_skip(step, reason)
    return None


def require_current(history: RunIdentity, manifest: Manifest) -> None:
    """Check that a checkpoint belongs to the present history of its run.

    Raises:
        CorruptCheckpoint: the run has gone back behind it, so it is abandoned.
    """
    timeline = RunIdentity.of_meta(manifest.meta).timeline
    if not history.holds(timeline, manifest.step):
        raise CorruptCheckpoint(f"abandoned: the run went back behind step {manifest.step} of timeline {timeline}")
