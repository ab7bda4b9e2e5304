"""The manifest of a checkpoint: its shards with sizes and checksums. Pure values.

The manifest is written last; a directory without one is an unfinished checkpoint. It carries a checksum of its own
content, so a flipped bit anywhere in a checkpoint is detected.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from elastic_moe.checkpoint.storage import CorruptCheckpoint
from elastic_moe.run_dir import step_dir

FORMAT = 1
MANIFEST = "manifest.json"
SKIPPED_BATCHES = "skipped_batches"  # key of `Manifest.meta`
STAYS = "stays"  # the same


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """One file of a checkpoint.

    Attributes:
        file: name within the step's directory.
        bytes: its size.
        sha256: checksum of the whole file.
        units: names of the units whose whole state is in it.
    """

    file: str
    bytes: int
    sha256: str
    units: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"units": list(self.units)}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> ShardInfo:
        """Inverse of `as_dict`; other keys are ignored.

        Raises:
            ValueError: the file's name, or that of a unit, is not one that a writer gave.
        """
        file = str(value["file"])
        if not re.fullmatch(r"[\w-][\w.-]*", file, re.ASCII):
            raise ValueError(f"{file!r} is not the name of a shard")
        units = tuple(value["units"])
        if not all(isinstance(unit, str) for unit in units):
            raise ValueError(f"{file} has a unit without a name")
        return cls(file, int(value["bytes"]), str(value["sha256"]), units)


@dataclass(frozen=True, slots=True)
class Manifest:
    """A complete checkpoint.

    Attributes:
        root_uri: the checkpoint root that it was read from or written to.
        step: the committed step whose state it holds.
        shards: its files; every unit is in at least one of them.
        meta: additions of the run (generation, world size, configuration, batches that were left out).
    """

    root_uri: str
    step: int
    shards: tuple[ShardInfo, ...]
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def directory(self) -> str:
        return step_dir(self.step)

    @property
    def bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)

    @property
    def skipped_batches(self) -> int:
        """Batches of the data that the run had left out before."""
        return int(self.meta.get(SKIPPED_BATCHES, 0))

    @property
    def stays(self) -> bool:
        """Whether it is kept for good: no newer checkpoint replaces it."""
        return self.meta.get(STAYS) is True

    def to_bytes(self) -> bytes:
        """The file's content."""
        body = {
            "format": FORMAT,
            "step": self.step,
            "shards": [shard.as_dict() for shard in self.shards],
            "meta": self.meta,
        }
        return json.dumps(body | {"sha256": _checksum(body)}, indent=1, sort_keys=True).encode()

    @classmethod
    def from_bytes(cls, root_uri: str, data: bytes) -> Manifest:
        """Read a manifest's content.

        Raises:
            CorruptCheckpoint: it is torn, changed, or of another format.
        """
        try:
            body = json.loads(data)
            checksum = body.pop("sha256")
            if body["format"] != FORMAT:
                raise CorruptCheckpoint(f"manifest format {body['format']} is not {FORMAT}")
            if checksum != _checksum(body):
                raise CorruptCheckpoint("manifest does not match its checksum")
            shards = tuple(ShardInfo.from_dict(shard) for shard in body["shards"])
            manifest = cls(root_uri, int(body["step"]), shards, body["meta"])
            if not 0 <= manifest.step < 2**62:
                raise ValueError(f"its step is {manifest.step}")
            if not 0 <= manifest.skipped_batches < 2**32:
                raise ValueError(f"{SKIPPED_BATCHES} is {manifest.skipped_batches}")
            return manifest
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            raise CorruptCheckpoint(f"manifest cannot be read: {error}") from error


def as_shards(shards: Sequence[ShardInfo | Mapping[str, Any]]) -> tuple[ShardInfo, ...]:
    """Shards given as values or as the dictionaries that travel in messages."""
    return tuple(shard if isinstance(shard, ShardInfo) else ShardInfo.from_dict(shard) for shard in shards)


def _checksum(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
