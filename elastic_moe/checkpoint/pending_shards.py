"""The shards that workers have reported for each step; the coordinator decides from them when a checkpoint is complete.

Pure. Workers die between writing and reporting, and the next generation may write a step again. So reports come in any
order and more than once, and shards overlap. A step is complete when every unit is in some shard. The workers tell how
many units there are: a coordinator that named them itself would have to build the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from elastic_moe.checkpoint.manifest import ShardInfo

NUM_UNITS = "num_units"  # key of a report: units of the whole model
MAX_PENDING = 8  # incomplete steps that are remembered; beyond this, the oldest one is forgotten


class PendingShards:
    """Shards of the incomplete steps, and of the last complete ones.

    Args:
        max_pending: incomplete steps that are remembered, and complete ones; the oldest are forgotten.
    """

    def __init__(self, max_pending: int = MAX_PENDING) -> None:
        self._max_pending = max_pending
        self._expected: dict[int, int] = {}  # units of a checkpoint of this step
        self._present: dict[int, set[str]] = {}  # units that some shard of the step holds
        self._shards: dict[int, dict[str, ShardInfo]] = {}
        self._generation: dict[tuple[int, str], int] = {}  # step, file -> generation that wrote it
        self._complete: dict[int, tuple[ShardInfo, ...]] = {}

    def expect(self, step: int, num_units: int) -> bool:
        """Tell how many units a checkpoint of this step must hold.

        Returns:
            True if the shards reported before make the step complete: write the manifest now.
        """
        if step in self._complete:
            return False
        self._expected[step] = num_units
        for old in sorted(self._expected)[: -self._max_pending]:
            self._drop(old)
        return self._completed(step)

    def add(self, step: int, shard: ShardInfo | Mapping[str, Any], generation: int = 0) -> bool:
        """Note that a shard is written, by a worker of this generation.

        Returns:
            True for the one shard that makes the step complete: write the manifest now.
        """
        if step in self._complete:
            return False
        info = shard if isinstance(shard, ShardInfo) else ShardInfo.from_dict(shard)
        shards = self._shards.setdefault(step, {})
        before, shards[info.file] = shards.get(info.file), info
        if before is not None and before.units != info.units:
            self._count(step)
        else:
            self._present.setdefault(step, set()).update(info.units)
        self._generation[step, info.file] = generation
        for old in sorted(self._shards)[: -self._max_pending]:
            self._drop(old)
        return self._completed(step)

    def _completed(self, step: int) -> bool:
        if step not in self._expected or step not in self._shards or len(self._present[step]) < self._expected[step]:
            return False
        self._complete[step] = self._cover(step)
        self._drop(step)
        for old in sorted(self._complete)[: -self._max_pending]:
            del self._complete[old]
        return True

    def _count(self, step: int) -> None:
        """Collect the units of the step from scratch. Each shard's are added as it comes, so this is rarely needed."""
        self._present[step] = {unit for shard in self._shards[step].values() for unit in shard.units}

    def shards(self, step: int) -> tuple[ShardInfo, ...]:
        """The shards that the manifest of a complete step names."""
        return self._complete[step]

    @property
    def pending(self) -> tuple[int, ...]:
        """Incomplete steps, in order."""
        return tuple(sorted(set(self._expected) | set(self._shards)))

    def forget(self, step: int) -> None:
        """Forget a step, complete or not: its shards must be reported again."""
        self._drop(step)
        self._complete.pop(step, None)

    def discard_after(self, step: int, generation: int) -> None:
        """Forget the shards of later steps from earlier generations: this generation rolled back to this step."""
        for later in [s for s in self.pending if s > step]:
            old = {f for s, f in self._generation if s == later and self._generation[s, f] < generation}
            kept = {file: info for file, info in self._shards.get(later, {}).items() if file not in old}
            for file in old:
                del self._generation[later, file]
            if kept:
                self._shards[later] = kept
                self._count(later)
            else:
                self._drop(later)
        for later in [s for s in self._complete if s > step]:
            del self._complete[later]

    def _drop(self, step: int) -> None:
        self._expected.pop(step, None)
        self._present.pop(step, None)
        for file in self._shards.pop(step, ()):
            self._generation.pop((step, file), None)

    def _cover(self, step: int) -> tuple[ShardInfo, ...]:
        """Choose shards that hold all units, the newest first, so that one generation's set is preferred."""
        left, chosen = set(self._present[step]), []
        for shard in reversed(self._shards[step].values()):
            if left.intersection(shard.units):
                chosen.append(shard)
                left.difference_update(shard.units)
        return tuple(sorted(chosen, key=lambda shard: shard.file))
