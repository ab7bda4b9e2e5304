"""A checkpoint is complete once, when the last of its units is in a shard, in whatever order the reports come."""

from __future__ import annotations

from elastic_moe.checkpoint.manifest import ShardInfo
from elastic_moe.checkpoint.pending_shards import PendingShards


def info_of(file: str, *units: str) -> ShardInfo:
    return ShardInfo(file, 1, "0", units)


def test_a_step_completes_once() -> None:
    pending = PendingShards()
    assert not pending.add(5, info_of("a", "x"))  # before it is expected
    pending.expect(5, 3)
    assert not pending.add(5, info_of("b", "y").as_dict())
    assert not pending.add(5, info_of("b", "y"))
    assert pending.pending == (5,)
    assert pending.add(5, info_of("c", "z"))
    assert not pending.add(5, info_of("c", "z"))
    assert [shard.file for shard in pending.shards(5)] == ["a", "b", "c"]
    assert pending.pending == ()


def test_a_step_expected_after_its_last_shard_is_complete() -> None:
    pending = PendingShards()
    assert not pending.add(5, info_of("a", "x", "y"))
    assert pending.expect(5, 2)
    assert not pending.expect(5, 2)
    assert pending.pending == ()


def test_a_step_completes_by_the_next_generations_shards() -> None:
    pending = PendingShards()
    pending.expect(5, 2)
    assert not pending.add(5, info_of("g1-r0", "x"))
    assert pending.add(5, info_of("g2-r0", "x", "y"))
    assert [shard.file for shard in pending.shards(5)] == ["g2-r0"]


def test_a_file_that_is_written_again_counts_as_it_is_now() -> None:
    pending = PendingShards()
    pending.expect(5, 3)
    pending.add(5, info_of("a", "x", "y"))
    assert not pending.add(5, info_of("a", "z"))
    assert not pending.add(5, info_of("b", "x"))
    assert pending.add(5, info_of("c", "y"))


def test_the_oldest_steps_are_forgotten() -> None:
    pending = PendingShards(max_pending=2)
    for step in (1, 2, 3):
        pending.expect(step, 2)
        pending.add(step, info_of("a", "x"))
    assert pending.pending == (2, 3)
    assert pending.add(3, info_of("b", "y"))
    pending.discard_after(1, 9)
    assert pending.pending == ()
    pending.expect(3, 2)
    assert not pending.add(3, info_of("b", "y"))
