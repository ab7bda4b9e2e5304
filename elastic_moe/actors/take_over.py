"""Before a start: what an earlier driver of the same run left on this cluster saves its state, and ends."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import suppress

import ray
from ray.exceptions import RayError

from elastic_moe.actors.kept import end_actor, end_all
from elastic_moe.actors.link import NAMESPACE, OVER, CoordinatorLink, coordinators
from elastic_moe.coordination.start import Found
from elastic_moe.errors import UserError

TAKES_OVER = "another start of the run takes over"
PATIENCE_S = 600.0  # for workers that save; the coordinator bounds it too, see `DriverWatcher`
SILENT_S = 120.0  # a coordinator without an answer for so long is not started again: its node is gone
ALONE_S = 30.0  # after the end of the run, for the coordinator of a dead driver to end all by itself
CLOSE_S = 60.0
GONE_S = 60.0  # for Ray to forget a killed actor's name
POLL_S = 0.2


def take_over(found: Found) -> bool:
    """End the coordinator and the workers that an earlier start of this run left, once they have saved their state.

    The caller owns the run directory, so the earlier driver is dead, or has lost the run and ends itself.

    Args:
        found: contents of the run's directories.

    Returns:
        Whether there were any: the directories may hold more than was found.

    Raises:
        UserError: Ray does not end them.
    """
    if found.own is None or not found.own.run:
        return False
    names = coordinators(str(found.run_dir), found.own.run)
    for name in names:
        _end(name, found)
    return bool(names)


def _end(name: str, found: Found) -> None:
    """End one start's coordinator and workers. Their state is saved first where the coordinator is still there."""
    told = f"they save their state first, which is waited for at most {PATIENCE_S:.0f} s"
    note = f"the coordinator and workers of an earlier start still live: {told}"
    if not _exists(name):
        note = "the workers of an earlier start have lost their coordinator for good: they are ended without a save"
    print(f"elastic_moe: note: {note}", file=sys.stderr)
    link = CoordinatorLink(name)
    link.submit({"event": "stop", "reason": TAKES_OVER})

    def over() -> bool:
        return not _exists(name) or link.poll().get("phase") in OVER or link.silent_s > SILENT_S

    _wait(over, PATIENCE_S)
    if not _wait(lambda: not _exists(name), ALONE_S):
        with suppress(ValueError, RayError, TimeoutError):
            ray.get(ray.get_actor(name, namespace=NAMESPACE).close.remote(), timeout=CLOSE_S)
    end_all(name)
    end_actor(name)
    if not _wait(lambda: not _exists(name), GONE_S):
        raise UserError(
            f"run.dir={found.run_dir} has a coordinator of an earlier start ({name}) that Ray does not end: ask for it "
            f"with `ray list actors`, and start again once it is gone"
        )


def _exists(name: str) -> bool:
    try:
        ray.get_actor(name, namespace=NAMESPACE)
    except ValueError:
        return False
    return True


def _wait(holds: Callable[[], bool], patience_s: float) -> bool:
    deadline_s = time.monotonic() + patience_s
    while not holds():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(POLL_S)
    return True
