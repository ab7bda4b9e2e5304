"""Shards are written in pieces: the library reads them, memory stays flat, and no other thread is held up."""

from __future__ import annotations

import json
import struct
import threading
import time
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from elastic_moe.checkpoint.shard_file import file_parts, header_length, parse_header, sha256_of
from elastic_moe.checkpoint.shards import read_units, write_shard
from elastic_moe.checkpoint.storage import PIECE, CorruptCheckpoint
from elastic_moe.checkpoint.writer import write_manifest

TENSORS = {
    "a#0/weight": torch.arange(7, dtype=torch.float32),
    "a#0/m": torch.randn(2, 3, generator=torch.Generator().manual_seed(0)),
    "b/weight": torch.arange(5, dtype=torch.bfloat16),
    "b/count": torch.tensor(3, dtype=torch.int64),
    "c/weight": torch.empty(0),
}


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    info = write_shard(str(tmp_path), 1, "r0", TENSORS)
    path = tmp_path / "step_00000001" / info.file
    read = load_file(path)
    assert read.keys() == TENSORS.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in TENSORS.items())
    assert path.stat().st_size == info.bytes


def test_files_of_the_library_are_read(tmp_path: Path) -> None:
    data = save({name: tensor.contiguous() for name, tensor in TENSORS.items()})
    length = header_length(data[:8], len(data))
    entries = parse_header(data[8 : 8 + length], len(data))
    assert entries.keys() == TENSORS.keys()
    assert all(entries[name].shape == tuple(tensor.shape) for name, tensor in TENSORS.items())


def test_the_parts_are_views_of_the_tensors() -> None:
    tensor = torch.zeros(4)
    parts = file_parts({"a/weight": tensor})
    before = sha256_of(parts)
    tensor += 1
    assert sha256_of(parts) != before


def header_of(entries: object) -> bytes:
    return json.dumps(entries).encode()


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ([], "TypeError"),
        ({"a/w": {"dtype": "F32", "shape": [2]}}, "KeyError"),
        ({"a/w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, "shape's size"),
        ({"a/w": {"dtype": "F32", "shape": [-2], "data_offsets": [0, -8]}}, "no size"),
        ({"a/w": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, "no size"),
        ({"a/w": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}}, "KeyError"),
        ({"a/w": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}, "the tensors end"),
        ({n: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for n in ("a/w", "b/w")}, "begins at byte"),
    ],
)
def test_a_header_that_does_not_fit_its_file_is_damage(entries: object, reason: str) -> None:
    header = header_of(entries)
    with pytest.raises(CorruptCheckpoint, match=reason):
        parse_header(header, 8 + len(header) + 8)


def test_headers_without_bounds_are_damage() -> None:
    with pytest.raises(CorruptCheckpoint):
        parse_header(b"[" * 100_000, 200_000)
    for prefix in (struct.pack("<Q", 2**63), struct.pack("<Q", 93), b"short"):
        with pytest.raises(CorruptCheckpoint):
            header_length(prefix, 100)


def test_a_large_shard_is_written_and_read_without_a_copy_or_a_pause(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A thread like that of the heartbeats runs all the while; the library's `save` would hold it for seconds."""
    tensors = {f"u{i}/weight": torch.full((PIECE,), float(i)) for i in range(8)}  # 32 MiB each
    gaps, ended = [0.0], threading.Event()

    def beat() -> None:
        last_s = time.monotonic()
        while not ended.wait(0.005):
            now_s = time.monotonic()
            gaps.append(now_s - last_s)
            last_s = now_s

    thread = threading.Thread(target=beat)
    thread.start()
    tracemalloc.start()
    try:
        info = write_shard(str(tmp_path), 1, "r0", tensors)
        peak = tracemalloc.get_traced_memory()[1]
        read = read_units(write_manifest(str(tmp_path), 1, [info]), [f"u{i}" for i in range(8)])
    finally:
        tracemalloc.stop()
        ended.set()
        thread.join()
    assert all(torch.equal(read[f"u{i}"]["weight"], tensors[f"u{i}/weight"]) for i in range(8))
    with capsys.disabled():
        print(f"\n{info.bytes >> 20} MiB: longest silence {max(gaps):.3f} s, {peak >> 20} MiB of Python's memory")
    assert peak < 2 * PIECE
    assert max(gaps) < 5.0
