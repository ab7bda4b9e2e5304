"""Random damage of a checkpoint directory: the exact state comes back, or the older one, and never a wrong one.

Half of the mutations leave the checksums as they were, as a disk would. The other half makes them right again, as a
program would that writes nonsense.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch

from elastic_moe.checkpoint.manifest import MANIFEST, _checksum
from elastic_moe.checkpoint.reader import find_latest
from elastic_moe.checkpoint.shards import read_units, write_shard
from elastic_moe.checkpoint.storage import PIECE, CorruptCheckpoint
from elastic_moe.checkpoint.writer import write_manifest
from elastic_moe.run_dir import step_dir

ROUNDS, SEED = 150, 0
UNITS = ["embed#0", "embed#1", "layers.1.experts.3"]
ODD_NUMBERS = [float("inf"), float("nan"), -1, 0, 1, 2**40, 2**70, 1.5]
VALUES: list[Any] = [
    *ODD_NUMBERS,
    None,
    -1,
    0,
    1,
    2**40,
    2**70,
    1.5,
    float("inf"),
    float("nan"),
    "",
    "x",
    "../x",
    [],
    {},
    [[]],
    {"a": 1},
    True,
    "F64",
    "\x00",
]
SPARE_BYTES = 4 << 20  # of memory beside the directory's size: modules, buffers of one piece are views


def state(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {f"{unit}/{part}": torch.randn(40, generator=generator) for unit in UNITS for part in ("weight", "m", "v")}


def save(root: Path, step: int) -> None:
    tensors = state(step)
    halves = [dict(list(tensors.items())[:6]), dict(list(tensors.items())[6:])]
    shards = [write_shard(str(root), step, f"r{i}", half) for i, half in enumerate(halves)]
    write_manifest(str(root), step, shards, {"generation": 1})


def mutate_bytes(data: bytes, draw: random.Random) -> bytes:
    """One change as a disk, a copy or a full file system makes it."""
    at, length = draw.randrange(len(data) + 1), draw.choice([1, 1, 8, 64, 4096])
    return draw.choice(
        [
            data[:at],
            data[:at] + bytes(draw.randrange(256) for _ in range(min(length, 64))) + data[at + length :],
            data[:at] + data[at + length :],
            data[:at] + data[at : at + length] * 2 + data[at + length :],
            b"\0" * len(data),
            b"",
            data + data[:length],
        ]
    )


def mutate_json(value: Any, draw: random.Random) -> Any:
    """A copy of a JSON value with one place in it changed, removed or doubled."""
    if isinstance(value, dict) and value and draw.random() < 0.85:
        key = draw.choice(list(value))
        how = draw.random()
        if how < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if how < 0.2:
            return {draw.choice(["x", key]) if k == key else k: v for k, v in value.items()}
        return {k: mutate_json(v, draw) if k == key else v for k, v in value.items()}
    if isinstance(value, list) and value and draw.random() < 0.85:
        at = draw.randrange(len(value))
        how = draw.random()
        if how < 0.1:
            return value[:at] + value[at + 1 :]
        if how < 0.2:
            return [*value, value[at]]
        return [mutate_json(v, draw) if i == at else v for i, v in enumerate(value)]
    return draw.choice(VALUES)


def reseal(directory: Path, draw: random.Random) -> None:
    """Change a manifest or a shard's header or data, and make every checksum right again."""
    manifest = json.loads((directory / MANIFEST).read_bytes())
    manifest.pop("sha256")
    if draw.random() < 0.5:
        manifest = mutate_json(manifest, draw)
    else:
        shard = draw.choice(manifest["shards"])
        path = directory / shard["file"]
        data = path.read_bytes()
        if draw.random() < 0.3:
            data = mutate_bytes(data[: 8 + int.from_bytes(data[:8], "little")], draw) + data[-400:]
        else:
            length = int.from_bytes(data[:8], "little")
            header = json.dumps(mutate_json(json.loads(data[8 : 8 + length]), draw)).encode()
            data = len(header).to_bytes(8, "little") + header + data[8 + length :]
        path.write_bytes(data)
        shard |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    seal = {"sha256": _checksum(manifest)} if isinstance(manifest, dict) else {}
    (directory / MANIFEST).write_text(json.dumps(manifest | seal if isinstance(manifest, dict) else manifest))


def read_back(root: Path, sealed: bool) -> int:
    """Read as a resume does: the newest checkpoint, and an older one where that is damaged. Returns the step."""
    manifest = find_latest(str(root))
    assert manifest is not None, "the intact checkpoint is not found"
    try:
        found = read_units(manifest, UNITS)
    except (CorruptCheckpoint, KeyError):
        assert sealed, "a checkpoint whose checksums are right cannot be read"
        return -1
    expected = state(manifest.step)
    for unit in UNITS:
        for part, tensor in found[unit].items():
            if not sealed:
                assert torch.equal(tensor, expected[f"{unit}/{part}"]), "a wrong state"
    return manifest.step


@pytest.mark.parametrize("sealed", [False, True])
def test_random_damage(tmp_path: Path, sealed: bool) -> None:
    damage_and_read(tmp_path, sealed, ROUNDS, SEED)


def damage_and_read(tmp_path: Path, sealed: bool, rounds: int, seed: int) -> None:
    """Damage the newer of two checkpoints in so many ways, and read the directory each time."""
    origin = tmp_path / "origin"
    for step in (10, 20):
        save(origin, step)
    outcomes: dict[int, int] = {}
    for number in range(rounds):
        draw, root = random.Random(f"{seed}.{number}"), tmp_path / f"{number}"
        shutil.copytree(origin, root)
        newest = root / step_dir(20)
        if sealed:
            reseal(newest, draw)
        else:
            path = draw.choice(sorted(newest.iterdir()))
            path.unlink() if draw.random() < 0.05 else path.write_bytes(mutate_bytes(path.read_bytes(), draw))
        tracemalloc.start()
        try:
            step = read_back(root, sealed)
        except Exception as error:
            raise AssertionError(f"seed {seed}, round {number}: {error!r}") from error
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert peak < SPARE_BYTES + 2 * PIECE, f"round {number} takes {peak} bytes"
        outcomes[step] = outcomes.get(step, 0) + 1
        shutil.rmtree(root)
    assert outcomes.get(10, 0) > rounds // 10, outcomes
