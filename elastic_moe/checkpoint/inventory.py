"""Lists the checkpoints of a root, whole or not, and compares two of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from elastic_moe.checkpoint.identity import RunIdentity, find_identity
from elastic_moe.checkpoint.manifest import Manifest
from elastic_moe.checkpoint.reader import RetiredCheckpoint, load_manifest, require_current, verify_alone
from elastic_moe.checkpoint.shards import read_units
from elastic_moe.checkpoint.storage import CorruptCheckpoint, Storage
from elastic_moe.checkpoint.writer import list_steps

COMPLETE, UNFINISHED, ABANDONED, DAMAGED = "complete", "unfinished", "abandoned", "damaged"


@dataclass(frozen=True, slots=True)
class Entry:
    """One checkpoint of a root.

    Attributes:
        step: its step.
        state: "complete", "unfinished", "abandoned" or "damaged".
        reason: of a state other than "complete", as a sentence.
        manifest: None where it cannot be read.
    """

    step: int
    state: str
    reason: str
    manifest: Manifest | None

    @property
    def identity(self) -> RunIdentity:
        """What the manifest tells of the run; an empty id where it tells nothing."""
        return RunIdentity("") if self.manifest is None else RunIdentity.of_meta(self.manifest.meta)


def list_checkpoints(root: str, verify: bool = False) -> Iterator[Entry]:
    """Every checkpoint of a root, in the order of their steps.

    Args:
        root: directory or URI.
        verify: compare checksums, which reads every file once.

    Raises:
        StorageUnavailable: something cannot be read.
    """
    steps = list_steps(Storage(root))
    history = find_identity(Storage(root), steps, lambda step: load_manifest(root, step).meta)
    for step in steps:
        manifest = None
        try:
            manifest = load_manifest(root, step)
            if verify:
                verify_alone(manifest)
        except RetiredCheckpoint:
            continue
        except FileNotFoundError:
            yield Entry(step, UNFINISHED, "it has no manifest", None)
            continue
        except CorruptCheckpoint as error:
            yield Entry(step, DAMAGED, str(error), None)
            continue
        try:
            require_current(history, manifest)
            yield Entry(step, COMPLETE, "", manifest)
        except CorruptCheckpoint as error:
            yield Entry(step, ABANDONED, str(error), manifest)


def differences(one: Manifest, other: Manifest, flat: Callable[[Any], dict[str, Any]]) -> Iterator[str]:
    """One line for each difference of two checkpoints: configuration, units, and values.

    Args:
        one, other: the checkpoints.
        flat: gives the keys of a manifest's fingerprint.

    Raises:
        OSError: a file is damaged or cannot be read.
    """
    old, new = flat(one.meta), flat(other.meta)
    for key in sorted({*old, *new}):
        if old.get(key) != new.get(key):
            yield f"{key}: {old.get(key)} -> {new.get(key)}"
    first, second = ({unit for shard in m.shards for unit in shard.units} for m in (one, other))
    yield from (f"only in step {one.step}: {unit}" for unit in sorted(first - second))
    yield from (f"only in step {other.step}: {unit}" for unit in sorted(second - first))
    equal = 0
    for unit in sorted(first & second):
        a, b = (read_units(manifest, [unit], ("weight",))[unit]["weight"] for manifest in (one, other))
        if a.shape != b.shape:
            yield f"{unit}: {tuple(a.shape)} -> {tuple(b.shape)}"
        elif torch.equal(a, b):
            equal += 1
        else:
            norm = max(float(a.norm()), 1e-30)
            yield f"{unit}: weight changed by {float((b - a).norm()) / norm:.2e} of its norm"
    yield f"{equal} of {len(first & second)} common units have equal weights"
