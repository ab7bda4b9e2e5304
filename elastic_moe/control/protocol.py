"""The commit protocol of a step as a pure model, so that a test can try every combination of points of failure.

A rank goes through the phases of a step in order. Some phases end with a collective. A rank completes it only if every
rank has reached it; after that, it may or may not see the collective complete before another rank dies.

`recover` is the rule of recovery, which `runtime/reconfigure.py` carries out. It uses the reports of the survivors
alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import product


class Phase(IntEnum):
    """The last phase of a step that a rank has completed; it includes the phases before it."""

    COMPUTE = 0  # forward and backward pass; local
    REDUCE = 1  # has the reduced gradients of the units that it owns; all-to-all
    MIRROR = 2  # has the reduced gradients of the units that it mirrors; all-to-all
    VOTE_ENTERED = 3  # has contributed to the vote
    VOTE_DONE = 4  # knows the vote's result, so the step is committed; all-reduce
    APPLIED = 5  # has applied the update to the state that it holds; local
    PUBLISHED = 6  # the new weights have reached the ranks that compute with them; all-to-all


COLLECTIVE = frozenset({Phase.REDUCE, Phase.MIRROR, Phase.VOTE_DONE, Phase.PUBLISHED})


@dataclass(frozen=True, slots=True)
class Status:
    """The report of one living rank.

    Attributes:
        committed: newest step whose update its state contains.
        reduced: step of the reduced gradients that it has for all units that it owns or mirrors; -1 if it has none.
        voted: newest step whose vote it knows the result of.
        timeline: generation in which the state was last read from storage or initialised. States of two timelines never
            mix, also at the same step.
    """

    committed: int
    reduced: int
    voted: int
    timeline: int = 0


@dataclass(frozen=True, slots=True)
class Recovery:
    """The way of the survivors to one step.

    Attributes:
        committed: the step that the state of all survivors is at afterwards.
        forward: indices of the survivors that roll forward: they apply the vote of `committed`.
        stale: indices of the survivors too far behind to roll forward; they count as holding nothing.
        timeline: of the state of the others.
    """

    committed: int
    forward: tuple[int, ...]
    stale: tuple[int, ...]
    timeline: int = 0

    @property
    def redo(self) -> int:
        """The step that comes next."""
        return self.committed + 1


def status(step: int, phase: Phase) -> Status:
    """Report of a rank whose last completed phase in `step` is `phase`.

    A rank knows the vote's result before it has applied it, so it can die or report in between.
    """
    return Status(
        committed=step if phase >= Phase.APPLIED else step - 1,
        reduced=step if phase >= Phase.MIRROR else -1,
        voted=step if phase >= Phase.VOTE_DONE else step - 1,
    )


def recover(survivors: Sequence[Status]) -> Recovery:
    """The newest step that all survivors can be at, and the ranks that must roll forward to it.

    This is the newest step whose vote any survivor knows the result of. That vote needed the contribution of every
    rank, and a rank contributes only when it has all its reduced gradients. So every survivor can apply the vote. If no
    survivor knows the result of a vote, no survivor has applied it.

    Args:
        survivors: reports of all living ranks, at least one.
    """
    committed = max(s.voted for s in survivors)
    forward = tuple(
        i
        for i, s in enumerate(survivors)
        if s.committed == committed - 1 and (s.reduced == committed or s.voted == committed)
    )
    stale = tuple(i for i, s in enumerate(survivors) if s.committed != committed and i not in forward)
    return Recovery(committed, forward, stale)


def choose(survivors: Sequence[Status], complete: Callable[[Sequence[int]], bool]) -> Recovery:
    """The newest step at which some survivors together hold the whole state.

    Survivors of one view agree by `recover`. Workers that were cut off and came back may be of another timeline, or far
    behind. They count only if the others lack state that they have.

    Args:
        survivors: reports of all living ranks, at least one.
        complete: whether the survivors with these indices hold every unit.

    Returns:
        The way to that step; if no step is complete, the way to the newest one, for the report of the lost steps.
    """
    options: list[tuple[Recovery, bool]] = []
    for timeline in {s.timeline for s in survivors}:
        members = [i for i, s in enumerate(survivors) if s.timeline == timeline]
        newest = recover([survivors[i] for i in members])
        forward = tuple(members[k] for k in newest.forward)
        good = [i for k, i in enumerate(members) if k not in newest.stale]
        ways = [(newest.committed, forward, good)]
        older = {survivors[i].committed for i in members} - {newest.committed}
        ways += [(step, (), [i for i in members if survivors[i].committed == step]) for step in older]
        for step, ahead, holders in ways:
            stale = tuple(i for i in range(len(survivors)) if i not in holders)
            options.append((Recovery(step, ahead, stale, timeline), complete(holders)))
    return max(options, key=lambda option: (option[1], option[0].committed, option[0].timeline))[0]


def reachable(phases: Sequence[Phase]) -> bool:
    """Whether ranks can be at these points at one time: no rank completes a collective that another has not reached."""
    slowest = min(phases)
    return all(phase > max(phases) or slowest >= phase - 1 for phase in COLLECTIVE)


def failure_points(num_ranks: int) -> Iterator[tuple[Phase, ...]]:
    """Each combination of points that `num_ranks` ranks can be at when some of them die."""
    return (phases for phases in product(Phase, repeat=num_ranks) if reachable(phases))


@dataclass(frozen=True, slots=True)
class Held:
    """One rank's copy of one unit.

    Attributes:
        updates: the updates that it contains, oldest first: (step, ranks whose gradients were summed).
    """

    updates: tuple[tuple[int, frozenset[int]], ...]

    def apply(self, step: int, contributors: frozenset[int]) -> Held:
        """This copy after one more update."""
        assert not self.updates or self.updates[-1][0] == step - 1, "an update applied twice or out of order"
        return Held((*self.updates, (step, contributors)))
