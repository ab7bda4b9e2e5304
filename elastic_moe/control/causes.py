"""What makes a new view necessary, in one word each: for events, counters and whoever sorts recoveries by cause."""

from __future__ import annotations

from collections.abc import Iterable

DEATH = "death"  # a member has died
EVICTION = "eviction"  # a member was removed: it was silent, hung, or stayed beyond its deadline
HANG = "hang"  # no member made progress
COLLECTIVE = "collective"  # a collective failed, and all members live
COORDINATOR = "coordinator"  # the coordinator was lost while a view was entered
PAUSE = "pause"  # enough workers are there again, or an operator ended a pause
DRAIN = "drain"  # a member hands over before it goes
RELEASE = "release"  # a member has handed over
JOIN = "join"  # newcomers are taken in
START = "start"  # the first view

CAUSES = (DEATH, EVICTION, HANG, COLLECTIVE, COORDINATOR, PAUSE, DRAIN, RELEASE, JOIN, START)
"""All causes, the gravest first."""


def gravest(causes: Iterable[str]) -> str:
    """The gravest of some causes; "" if there are none."""
    return min(causes, key=CAUSES.index, default="")
