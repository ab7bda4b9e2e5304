"""The step's commit protocol as a pure model, so that a test can exhaust the points at which ranks die.

A rank goes through the phases of a step in order. Some phases end with a collective: a rank can complete it only if every rank has reached it
(and, once in it, may or may not see it complete before another dies). What survives is judged by `recover`, the rule that
`runtime/reconfigure.py` carries out: nothing is asked of the dead, and no rank needs to know how far it was from its end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import product


class Phase(IntEnum):
    """How far a rank has come within step `s`; every phase includes the ones before it."""

    COMPUTE = 0  # forward and backward, local
    REDUCE = 1  # has its own units' reduced gradients (all-to-all)
    MIRROR = 2  # has its mirrored units' reduced gradients (exchange)
    VOTE_ENTERED = 3  # has contributed to the vote
    VOTE_DONE = 4  # knows the vote's result: the step is committed (all-reduce)
    APPLIED = 5  # has applied the update to the state it holds, local
    PUBLISHED = 6  # new weights have reached those who compute with them (all-to-all)


COLLECTIVE = frozenset({Phase.REDUCE, Phase.MIRROR, Phase.VOTE_DONE, Phase.PUBLISHED})


@dataclass(frozen=True, slots=True)
class Status:
    """What one living rank truthfully reports.

    Attributes:
        committed: newest step whose update its state contains.
        reduced: step whose reduced gradients it holds for all that it owns and mirrors; -1 if none.
        voted: newest step of whose vote it knows the result.
    """

    committed: int
    reduced: int
    voted: int


@dataclass(frozen=True, slots=True)
class Decision:
    """Outcome of a recovery: every survivor's state is brought to `committed`, and step `redo` comes next.

    Attributes:
        committed: the step that all survivors are at afterwards.
        forward: indices of survivors that roll forward by applying the vote of `committed`.
        stale: indices of survivors too far behind to be rolled forward; they count as holding nothing.
    """

    committed: int
    forward: tuple[int, ...]
    stale: tuple[int, ...]

    @property
    def redo(self) -> int:
        return self.committed + 1


def status(step: int, phase: Phase) -> Status:
    """Report of a rank that came this far in `step`. Knowing the vote's result and applying it are separate moments."""
    return Status(
        committed=step if phase >= Phase.APPLIED else step - 1,
        reduced=step if phase >= Phase.MIRROR else -1,
        voted=step if phase >= Phase.VOTE_DONE else step - 1,
    )


def recover(survivors: Sequence[Status]) -> Decision:
    """Where the survivors meet.

    The newest step of which any survivor knows the vote is committed: completing the vote took every rank's contribution, and a rank contributes
    only with all its reduced gradients in hand, so each of the others can apply it. If nobody knows it, nobody alive can have applied it.
    """
    committed = max(s.voted for s in survivors)
    forward = tuple(
        i
        for i, s in enumerate(survivors)
        if s.committed == committed - 1 and (s.reduced == committed or s.voted == committed)
    )
    stale = tuple(i for i, s in enumerate(survivors) if s.committed != committed and i not in forward)
    return Decision(committed, forward, stale)


def reachable(phases: Sequence[Phase]) -> bool:
    """Whether ranks can be at these points at the same time: a collective completes for someone only if all have come to it."""
    slowest = min(phases)
    return all(phase > max(phases) or slowest >= phase - 1 for phase in COLLECTIVE)


def failure_points(num_ranks: int) -> Iterator[tuple[Phase, ...]]:
    """All combinations of points at which `num_ranks` ranks can be when some of them die."""
    return (phases for phases in product(Phase, repeat=num_ranks) if reachable(phases))


@dataclass(frozen=True, slots=True)
class Held:
    """One rank's copy of one unit: the sequence of updates that it contains, as (step, gradients of which ranks)."""

    updates: tuple[tuple[int, frozenset[int]], ...]

    def apply(self, step: int, contributors: frozenset[int]) -> Held:
        assert not self.updates or self.updates[-1][0] == step - 1, "an update applied twice or out of order"
        return Held((*self.updates, (step, contributors)))
