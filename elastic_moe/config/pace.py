"""The pace of heartbeats: slower with many members, so that the coordinator hears a bounded number in a second."""

from __future__ import annotations

BEATS_PER_S = 600  # of all members together, from which on each sends fewer
MOST_STRETCHED = 3.0


def pace(heartbeat_s: float, members: int) -> float:
    """Seconds between two heartbeats of each member.

    Deaths close connections and are seen at once. So a slower pace costs nothing but a later look at silent workers.
    """
    return min(max(heartbeat_s, members / BEATS_PER_S), MOST_STRETCHED * heartbeat_s)
