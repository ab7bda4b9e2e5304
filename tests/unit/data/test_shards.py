"""Token shards: samples, types, and damage that is noticed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from elastic_moe.data.shards import TokenShard, TokenShardWriter, index_path
from elastic_moe.errors import UserError


def write(path: Path, count: int, vocab_size: int = 1000) -> Path:
    writer = TokenShardWriter(path, vocab_size)
    writer.append(range(count // 2))
    writer.append(range(count // 2, count))
    assert writer.close() == count
    return path


@pytest.mark.parametrize(("vocab_size", "itemsize"), [(1000, 2), (65536, 2), (65537, 4)])
def test_samples(tmp_path: Path, vocab_size: int, itemsize: int) -> None:
    path = write(tmp_path / "a.bin", 41, vocab_size)
    assert path.stat().st_size == 41 * itemsize
    shard = TokenShard.open(path)
    assert (len(shard), shard.vocab_size) == (41, vocab_size)
    assert [shard.num_samples(n) for n in (8, 10, 40, 41)] == [5, 4, 1, 0]
    tokens, targets = shard.batch(np.array([3, 0]), 10)
    assert tokens.dtype == targets.dtype == np.int64
    assert tokens.tolist() == [list(range(30, 40)), list(range(10))]
    assert targets.tolist() == [list(range(31, 41)), list(range(1, 11))]


def test_no_samples_have_a_shape(tmp_path: Path) -> None:
    tokens, targets = TokenShard.open(write(tmp_path / "a.bin", 41)).batch([], 10)
    assert tokens.shape == targets.shape == (0, 10)


@pytest.mark.parametrize("count", [0, 1])
def test_a_shard_without_samples_opens(tmp_path: Path, count: int) -> None:
    assert TokenShard.open(write(tmp_path / "a.bin", count)).num_samples(4) == 0


@pytest.mark.parametrize("sample", [-1, 4])
def test_sample_out_of_range(tmp_path: Path, sample: int) -> None:
    with pytest.raises(IndexError):
        TokenShard.open(write(tmp_path / "a.bin", 41)).batch([sample], 10)


def test_truncated(tmp_path: Path) -> None:
    path = write(tmp_path / "a.bin", 41)
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UserError, match="truncated"):
        TokenShard.open(path)


def test_flipped_bit(tmp_path: Path) -> None:
    path = write(tmp_path / "a.bin", 41)
    data = bytearray(path.read_bytes())
    data[17] ^= 4
    path.write_bytes(data)
    with pytest.raises(UserError, match="corrupt"):
        TokenShard.open(path)
    assert len(TokenShard.open(path, verify=False)) == 41


def test_damaged_or_missing_index(tmp_path: Path) -> None:
    path = write(tmp_path / "a.bin", 41)
    index_path(path).write_text("{")
    with pytest.raises(UserError, match="index"):
        TokenShard.open(path)
    index_path(path).unlink()
    with pytest.raises(UserError, match="cannot read"):
        TokenShard.open(path)
