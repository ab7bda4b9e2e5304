"""The pool of a sweep's workers: how many each trial may have now. Pure.

A trial is admitted with its least number of workers; what is left goes to admitted trials, up to their most. Trials of
a higher priority come first in both. Otherwise a trial that trains comes before one that waits, so nobody is sent away
for an equal. A trial that waits is not overtaken by a later one that needs less: it would wait for ever.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Want:
    """What one trial can use.

    Attributes:
        trial: its number; of equals, the lower one comes first.
        least: it does not train with fewer workers; at least 1.
        most: it has no use for more.
        priority: higher ones come first.
        has: workers that it may have now; 0 for a trial that waits.
    """

    trial: int
    least: int
    most: int
    priority: int = 0
    has: int = 0


def allocate(wants: Iterable[Want], capacity: int, max_concurrent: int = 0) -> dict[int, int]:
    """Workers for every trial.

    Args:
        wants: the trials that have not ended.
        capacity: workers that there is room for.
        max_concurrent: trials that train at once at most; 0: no limit.

    Returns:
        Number of workers by trial: 0, or from its least to its most. Their sum is at most the capacity.
    """
    ordered = sorted(wants, key=lambda want: (-want.priority, want.has == 0, want.trial))
    given = {want.trial: 0 for want in ordered}
    admitted = _admit(ordered, capacity, max_concurrent)
    for want in admitted:
        given[want.trial] = want.least
    room = capacity - sum(given.values())
    while room > 0:
        open_wants = [want for want in admitted if given[want.trial] < want.most]
        if not open_wants:
            break
        first = min(open_wants, key=lambda want: (-want.priority, given[want.trial], -want.has, want.trial))
        given[first.trial] += 1
        room -= 1
    return given


def _admit(ordered: Iterable[Want], capacity: int, max_concurrent: int) -> list[Want]:
    """The trials that train. One that the whole capacity could not hold is passed over, and holds nobody up."""
    admitted: list[Want] = []
    room = capacity
    for want in ordered:
        if max_concurrent and len(admitted) >= max_concurrent:
            break
        if want.least <= room:
            admitted.append(want)
            room -= want.least
        elif want.least <= capacity:
            break
    return admitted


class Steady:
    """A number that falls at once only to where it stays: the largest value of the last seconds.

    What others use of a cluster, and a node that is away for a moment, are told late and unsteadily. Workers that are
    moved for a moment's sake cost more than they bring.

    Args:
        window_s: seconds for which a lower value has to last before it counts.
    """

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._seen: list[tuple[float, int]] = []

    def take(self, value: int, now_s: float) -> int:
        """Note a value. Returns the largest one of the window."""
        self._seen = [(at_s, seen) for at_s, seen in self._seen if now_s - at_s < self._window_s and seen > value]
        self._seen.append((now_s, value))
        return max(seen for _, seen in self._seen)
