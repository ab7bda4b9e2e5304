"""Writes and reads the shards of a checkpoint: a worker's units, and the units that a caller names.

Shards are safetensors files named after their content. So writing a step again never changes a file that a manifest
names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from elastic_moe.checkpoint.bounded import Activity
from elastic_moe.checkpoint.manifest import Manifest, ShardInfo
from elastic_moe.checkpoint.reader import damaged
from elastic_moe.checkpoint.shard_file import TensorEntry, bytes_of, file_parts, header_length, parse_header, sha256_of
from elastic_moe.checkpoint.storage import CorruptCheckpoint, Storage, persistent
from elastic_moe.run_dir import step_dir


def write_shard(root_uri: str, step: int, tag: str, tensors: Mapping[str, torch.Tensor]) -> ShardInfo:
    """Write one worker's part of a checkpoint, in pieces and without a copy of it.

    Args:
        root_uri: the checkpoint root.
        step: the committed step.
        tag: begins the file's name, so that people see the writer (generation and rank).
        tensors: tensor of each `{unit}/{field}`; may be empty. They must not change until it is written.

    Raises:
        StorageUnavailable: the storage failed at every attempt.
    """
    parts = file_parts({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    sha256 = sha256_of(parts)
    units = tuple(dict.fromkeys(name.rsplit("/", 1)[0] for name in tensors))
    info = ShardInfo(f"{tag}-{sha256[:12]}.safetensors", sum(map(len, parts)), sha256, units)
    storage = Storage(root_uri)
    persistent(lambda: storage.write_pieces(f"{step_dir(step)}/{info.file}", parts))
    return info


def read_units(
    manifest: Manifest,
    names: Sequence[str],
    fields: Sequence[str] | None = None,
    activity: Activity | None = None,
) -> dict[str, dict[str, torch.Tensor]]:
    """Read the state of some units.

    Args:
        manifest: the checkpoint.
        names: units to read.
        fields: fields to read, "weight" among them; None for all that were written.
        activity: told of the bytes that are read.

    Returns:
        Unit name -> field name -> flat fp32 tensor. The caller may change the tensors.

    Raises:
        KeyError: the checkpoint lacks a unit, so it is of another model.
        CorruptCheckpoint: a file is damaged.
        RetiredCheckpoint: the checkpoint was removed meanwhile.
        StorageUnavailable: a file cannot be read.
    """
    home = {unit: shard for shard in manifest.shards for unit in shard.units}
    unknown = [name for name in names if name not in home]
    if unknown:
        raise KeyError(f"checkpoint of step {manifest.step} has no unit {unknown[0]} ({len(unknown)} unknown)")
    wanted: dict[str, set[str]] = {}
    for name in names:
        wanted.setdefault(home[name].file, set()).add(name)
    storage = Storage(manifest.root_uri, activity)
    found: dict[str, dict[str, torch.Tensor]] = {}
    for shard in manifest.shards:
        if shard.file in wanted:
            read = lambda shard=shard: _read_shard(storage, manifest, shard, wanted[shard.file], fields)  # noqa: E731
            found.update(persistent(read))
    return {name: found[name] for name in names}


def _read_shard(
    storage: Storage, manifest: Manifest, shard: ShardInfo, units: set[str], fields: Sequence[str] | None
) -> dict[str, dict[str, torch.Tensor]]:
    """Read some units of one file."""
    file = f"{manifest.directory}/{shard.file}"
    try:
        size = storage.size(file)
        if size != shard.bytes:
            raise CorruptCheckpoint(f"{size} bytes, not {shard.bytes}")
        prefix = bytearray(min(8, size))
        storage.read_into(file, [(0, memoryview(prefix))])
        header = bytearray(header_length(bytes(prefix), size))
        storage.read_into(file, [(8, memoryview(header))])
        wanted = [
            entry
            for entry in parse_header(bytes(header), size).values()
            if entry.unit in units and (fields is None or entry.field in fields)
        ]
        found = _read_entries(storage, file, wanted)
    except FileNotFoundError as error:
        raise damaged(storage, manifest, f"{storage.path(file)} has disappeared") from error
    except CorruptCheckpoint as error:
        raise damaged(storage, manifest, f"{storage.path(file)} cannot be read: {error}") from error
    tensors: dict[str, dict[str, torch.Tensor]] = {unit: {} for unit in units}
    for entry in wanted:
        tensors[entry.unit][entry.field] = found[entry.name]
    if any("weight" not in parts for parts in tensors.values()):
        raise CorruptCheckpoint(f"{storage.path(file)} lacks a unit that the manifest names")
    return tensors


def _read_entries(storage: Storage, file: str, entries: Sequence[TensorEntry]) -> dict[str, torch.Tensor]:
    """Read these tensors, which are in the order of their places."""
    found = {entry.name: torch.empty(entry.shape, dtype=entry.dtype) for entry in entries}
    spans = [(entry.start, bytes_of(found[entry.name])) for entry in entries if entry.stop > entry.start]
    storage.read_into(file, spans)
    return found
