"""Runs a trainer to its end; where its Ray Train controller dies, another one takes over the workers.

The workers are detached (`actors/kept.py`) and train on without a controller. The coordinator decides about the
training, so what is missing meanwhile is only the replacement of workers that end.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import ActorDiedError

from elastic_moe.actors.controller import ElasticTrainer
from elastic_moe.actors.link import CoordinatorLink

DEATHS = 3  # controllers that may die one after another without a step between them
PATIENCE_S = 60.0  # for the coordinator's answer
POLL_S = 0.05


def _tell(text: str) -> None:
    print(text, file=sys.stderr)


def fit(make: Callable[[], ElasticTrainer], link: CoordinatorLink, tell: Callable[[str], None] = _tell) -> None:
    """Train until the run is over.

    Args:
        make: makes a trainer; it is called again for every controller.
        link: to the run's coordinator, for this call alone.
        tell: prints a line.

    Raises:
        ActorDiedError: `DEATHS` controllers have died without a step between them, or Ray has been shut down.
        Exception: the error that ended the run.
    """
    died, step = 0, -1
    while True:
        try:
            make().fit()
            return
        except ActorDiedError:
            if not ray.is_initialized():
                raise
            status = _answer(link)
            died = died + 1 if status.get("step", -1) == step else 1
            step = status.get("step", -1)
            if died >= DEATHS:
                raise
            tell("the Ray Train controller died: the workers train on, and another one takes over")


def _answer(link: CoordinatorLink) -> dict[str, Any]:
    """A status that the coordinator gave after this call; {} if it gives none in time."""
    link.forget()
    deadline_s = time.monotonic() + PATIENCE_S
    while not (status := link.poll()) and time.monotonic() < deadline_s:
        time.sleep(POLL_S)
    return status
