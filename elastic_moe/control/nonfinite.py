"""Steps whose gradients are not finite: who was the cause, and when it is enough. Pure; every rank decides alike.

Such a step is committed without an update. One that is alone in it again and again computes wrongly, or has memory that
does: that worker leaves. When no update is possible for many steps, the run has diverged, and ends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class NonFiniteCount:
    """What one generation has seen of such steps.

    Attributes:
        in_a_row: skipped steps up to now without an update between them.
        alone: worker -> steps in which its numbers alone were not finite.
    """

    in_a_row: int = 0
    alone: Mapping[str, int] = field(default_factory=dict[str, int])

    def after(self, skipped: bool, workers: Sequence[str], active: int) -> NonFiniteCount:
        """The count after one more step.

        Args:
            skipped: the step had no update.
            workers: whose own loss or gradients were not finite.
            active: workers that computed. One that computes by itself is not told from the data that it computes with.
        """
        if not skipped:
            return NonFiniteCount(0, self.alone)
        alone = dict(self.alone)
        if len(workers) == 1 and active > 1:
            alone[workers[0]] = alone.get(workers[0], 0) + 1
        return NonFiniteCount(self.in_a_row + 1, alone)
