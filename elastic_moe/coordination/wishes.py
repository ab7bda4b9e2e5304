"""Keeps what an operator asked of a run that goes on, so that a coordinator that is started again knows it too."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from elastic_moe.control.requests import PauseRequest, Request, ResumeRequest, ScaleRequest
from elastic_moe.metrics.recorder import Recorder

REASON = "asked for before the coordinator was started again"
FIRST = "sweep.workers"


class Wishes:
    """The newest number of workers and pause that were asked for.

    Args:
        path: the file that keeps them.
        recorder: told where they cannot be kept or read.
        first_limit: number of workers that the start itself asks for at most; 0: no limit.
    """

    def __init__(self, path: Path, recorder: Recorder, first_limit: int = 0) -> None:
        self._path, self._recorder = path, recorder
        self._limit, self._paused = first_limit, False

    def known(self, restarted: bool) -> Sequence[Request]:
        """What a coordinator has to ask for as it starts; of an earlier start nothing is kept."""
        reason = REASON
        if not restarted:
            self._path.unlink(missing_ok=True)
        try:
            kept = json.loads(self._path.read_text())
            self._limit, self._paused = int(kept["limit"]), bool(kept["paused"])
        except FileNotFoundError:
            reason = FIRST
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            self._tell(f"cannot be read, so the run goes on without what an operator asked for: {error}")
        scale = [ScaleRequest(self._limit, reason)] if self._limit else []
        return [*scale, *([PauseRequest(reason)] if self._paused else [])]

    def note(self, request: Request) -> None:
        """Keep a request that lasts; others change nothing."""
        match request:
            case ScaleRequest(workers):
                self._limit = workers
            case PauseRequest() | ResumeRequest():
                self._paused = isinstance(request, PauseRequest)
            case _:
                return
        new = self._path.with_name(f".{self._path.name}.tmp")
        try:
            new.write_text(json.dumps({"limit": self._limit, "paused": self._paused}))
            os.replace(new, self._path)
        except OSError as error:
            self._tell(f"cannot be written, so a coordinator that is started again will not know of it: {error}")

    def _tell(self, what: str) -> None:
        self._recorder.event(
            {"event": "wish_unkept", "step": self._recorder.last_step, "reason": f"{self._path} {what}"}
        )
