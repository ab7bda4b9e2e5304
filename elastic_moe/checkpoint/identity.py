"""The identity of a run: who wrote a directory, and which of its checkpoints belong to the run's present history.

A *timeline* is one unbroken line of committed steps. Each time the run goes back to a durable checkpoint behind
its newest step, a new timeline begins there. Checkpoints of later steps stay on disk, but no longer count: the
run's history has passed them by. So going back deletes nothing, on object stores too, where nothing can be renamed.

The identity is kept in `run.json`, in the run directory and in the checkpoint root. The manifests repeat run,
timeline and forks, so a lost or damaged `run.json` is made again from them.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from elastic_moe.checkpoint.storage import CorruptCheckpoint, Storage, persistent
from elastic_moe.run_dir import RUN

FORMAT = 1


@dataclass(frozen=True, slots=True)
class RunIdentity:
    """The identity of one run.

    Attributes:
        run: id, made at the first start; "" for a run that an older version wrote.
        timeline: number of the present timeline, counted from 1.
        forks: (timeline, step) for every timeline but the first: it goes on from this step of those before it.
        first_checkpoint: step of the first complete checkpoint; 0 while there has been none.
        run_dir: the run directory at the newest start.
        fingerprint: see `config.fingerprint`; empty where it is not known.
        forked_in: generation that began the present timeline; 0 if none of the newest start has.
    """

    run: str
    timeline: int = 1
    forks: tuple[tuple[int, int], ...] = ()
    first_checkpoint: int = 0
    run_dir: str = ""
    fingerprint: dict[str, Any] = field(default_factory=dict)
    forked_in: int = 0

    @classmethod
    def new(cls, run_dir: str, fingerprint: Mapping[str, Any] | None = None) -> RunIdentity:
        """The identity of a run that begins."""
        return cls(uuid.uuid4().hex, run_dir=run_dir, fingerprint=dict(fingerprint or {}))

    def forked(self, step: int, generation: int) -> RunIdentity:
        """The identity after the run went back to this step in this generation: a new timeline begins there."""
        timeline = self.timeline + 1
        return replace(self, timeline=timeline, forks=(*self.forks, (timeline, step)), forked_in=generation)

    @property
    def last_fork(self) -> tuple[int, int]:
        """The generation of the newest start that went back last, and to which step; (0, 0) if none has."""
        return (self.forked_in, self.forks[-1][1]) if self.forked_in and self.forks else (0, 0)

    def holds(self, timeline: int, step: int) -> bool:
        """Whether a step that a timeline committed belongs to the present history."""
        later = (fork for number, fork in self.forks if number > timeline)
        return timeline <= self.timeline and all(step <= fork for fork in later)

    def meta(self) -> dict[str, Any]:
        """What a manifest repeats of the identity."""
        forks = [list(fork) for fork in self.forks]
        return {"run": self.run, "timeline": self.timeline, "forks": forks, "fingerprint": self.fingerprint}

    @classmethod
    def of_meta(cls, meta: Mapping[str, Any]) -> RunIdentity:
        """The identity that a manifest repeats. The manifests of older versions repeat none.

        Raises:
            CorruptCheckpoint: the values are of other types.
        """
        try:
            forks = tuple((int(timeline), int(step)) for timeline, step in meta.get("forks", ()))
            fingerprint: dict[str, Any] = dict(meta.get("fingerprint") or {})
            _ = {**fingerprint.get("keys", {})}, {*fingerprint.get("shape", ())}
            return cls(str(meta.get("run", "")), int(meta.get("timeline", 1)), forks, 0, "", fingerprint)
        except (ValueError, TypeError, AttributeError, OverflowError) as error:
            raise CorruptCheckpoint(f"manifest has a damaged identity: {error}") from error

    def to_bytes(self) -> bytes:
        """The content of `run.json`."""
        body = {"format": FORMAT} | asdict(self) | {"forks": [list(fork) for fork in self.forks]}
        return json.dumps(body | {"sha256": _checksum(body)}, indent=1, sort_keys=True).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> RunIdentity:
        """Inverse of `to_bytes`; keys that a later version added are ignored.

        Raises:
            CorruptCheckpoint: it is torn, changed, or of another format.
        """
        try:
            body = json.loads(data)
            checksum = body.pop("sha256")
            if body["format"] != FORMAT or checksum != _checksum(body):
                raise CorruptCheckpoint(f"{RUN} does not match its checksum")
            known = cls.of_meta(body)
            first, forked_in = int(body["first_checkpoint"]), int(body.get("forked_in", 0))
            return replace(known, first_checkpoint=first, run_dir=str(body["run_dir"]), forked_in=forked_in)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            raise CorruptCheckpoint(f"{RUN} cannot be read: {error}") from error


def read_identity(storage: Storage) -> RunIdentity | None:
    """The identity in a directory's `run.json`; None if there is no such file.

    Raises:
        CorruptCheckpoint: the file is damaged.
        OSError: the storage failed at every attempt.
    """
    try:
        return RunIdentity.from_bytes(persistent(lambda: storage.read(RUN)))
    except FileNotFoundError:
        return None


def never_saved(storage: Storage) -> bool:
    """Whether this is the root of a run that has not completed a checkpoint yet: only such a run may begin anew.

    Raises:
        OSError: the storage failed at every attempt.
    """
    try:
        identity = read_identity(storage)
    except CorruptCheckpoint:
        return False
    return identity is not None and not identity.first_checkpoint


def write_identity(storage: Storage, identity: RunIdentity) -> None:
    """Write a directory's `run.json`.

    Raises:
        OSError: the storage failed at every attempt.
    """
    persistent(lambda: storage.write(RUN, identity.to_bytes()))


def find_identity(storage: Storage, steps: Iterable[int], read_meta: Callable[[int], Mapping[str, Any]]) -> RunIdentity:
    """The identity of the run whose checkpoints lie in a root.

    Without a whole `run.json` it is taken from the manifests: that of the newest timeline counts.

    Args:
        storage: the checkpoint root.
        steps: the steps that have a directory there.
        read_meta: returns `Manifest.meta` of a step; a step that raises FileNotFoundError or CorruptCheckpoint is
            passed over.

    Raises:
        OSError: the storage failed at every attempt.
    """
    try:
        identity = read_identity(storage)
    except CorruptCheckpoint:
        identity = None
    if identity is not None:
        return identity
    newest = RunIdentity("")
    for step in steps:
        try:
            found = RunIdentity.of_meta(read_meta(step))
        except (FileNotFoundError, CorruptCheckpoint):
            continue
        newest = max(newest, found, key=lambda one: (one.timeline, bool(one.run)))
    return newest


def _checksum(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
