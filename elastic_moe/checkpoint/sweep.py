"""Removes what a start that was killed left unfinished in its own directories.

A SIGKILL leaves temporary files, and shards of checkpoints that never got a manifest. They are removed at the next
start of the same run, by the owner of the directory (`coordination/lease.py`), and only where nobody can still be
writing them: every writer gets on within `TIMEOUT_S`, or is left behind. What is younger is told and left alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from elastic_moe.checkpoint import storage as storage_module
from elastic_moe.checkpoint.identity import read_identity
from elastic_moe.checkpoint.manifest import MANIFEST
from elastic_moe.checkpoint.storage import CorruptCheckpoint, FileEntry, Storage, persistent
from elastic_moe.run_dir import LEASE, step_of

_TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.tmp|\.probe-[0-9a-f]{32}")


@dataclass(frozen=True)
class Swept:
    """What was found unfinished in a directory.

    Attributes:
        removed: paths of the files and checkpoints that were removed.
        left: paths of those that may still be written.
    """

    removed: tuple[str, ...] = ()
    left: tuple[str, ...] = ()


def sweep(root_uri: str, run: str) -> Swept:
    """Remove what is unfinished in a directory of a run. The caller holds the directory's lease.

    Args:
        root_uri: run directory or checkpoint root.
        run: id of the run that is about to go on. Nothing is touched in a directory of another one, or of nobody.

    Raises:
        OSError: the storage failed at every attempt.
    """
    storage = Storage(root_uri)
    try:
        identity = read_identity(storage)
    except CorruptCheckpoint:
        return Swept()
    entries = persistent(lambda: storage.entries(""))
    now_s = max((entry.changed_s for entry in entries if entry.name == LEASE), default=0.0)  # by the storage's clock
    if identity is None or not run or identity.run != run or not now_s:
        return Swept()
    removed, left = _sweep_files(storage, "", entries, now_s)
    for step in (entry.name for entry in entries if entry.is_directory and step_of(entry.name) is not None):
        files = persistent(lambda step=step: storage.entries(step))
        if any(file.name == MANIFEST for file in files):
            more_removed, more_left = _sweep_files(storage, f"{step}/", files, now_s)
            removed, left = removed + more_removed, left + more_left
        elif _is_quiet(files, now_s):
            persistent(lambda step=step: storage.remove_directory(step))
            removed.append(step)
        else:
            left.append(step)
    return Swept(tuple(removed), tuple(left))


def _sweep_files(
    storage: Storage, prefix: str, entries: Iterable[FileEntry], now_s: float
) -> tuple[list[str], list[str]]:
    """Remove the temporary files among the entries of one directory. Returns the removed and the others."""
    removed: list[str] = []
    left: list[str] = []
    for entry in entries:
        if entry.is_directory or not _TEMPORARY.fullmatch(entry.name):
            continue
        path = f"{prefix}{entry.name}"
        if _is_quiet([entry], now_s):
            persistent(lambda path=path: storage.remove(path))
            removed.append(path)
        else:
            left.append(path)
    return removed, left


def _is_quiet(entries: Iterable[FileEntry], now_s: float) -> bool:
    """Whether no writer can be at work on these files any more."""
    return all(entry.changed_s < now_s - storage_module.TIMEOUT_S for entry in entries)
