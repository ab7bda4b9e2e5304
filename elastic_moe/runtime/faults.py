"""Injected faults: kill or stop this process at a configured phase of a configured step, and record that it happened.

An entry is `rank:step:phase` or `rank:step:phase:stop`. Each fires once in a run directory and leaves a marker file
there, so a replacement worker with the same rank does not die again.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

from elastic_moe.config.schema import FaultConfig


class Faults:
    """The configured faults of one worker.

    Args:
        config: the faults.
        marker_dir: directory shared by the workers of a run, where fired faults are recorded.
    """

    def __init__(self, config: FaultConfig, marker_dir: Path) -> None:
        self._marker_dir = marker_dir
        self._points: dict[tuple[int, int, str], signal.Signals] = {}
        for entry in config.inject:
            rank, step, phase, *how = entry.split(":")
            self._points[int(rank), int(step), phase] = signal.SIGSTOP if how == ["stop"] else signal.SIGKILL
        if config.kill_worker_at_step > 0:
            self._points[config.kill_rank, config.kill_worker_at_step, "committed"] = signal.SIGKILL

    def at(self, rank: int, step: int, phase: str) -> None:
        """Inflict the fault that is configured for this point, unless it has fired before."""
        how = self._points.get((rank, step, phase))
        if how is None:
            return
        self._marker_dir.mkdir(parents=True, exist_ok=True)
        try:
            (self._marker_dir / f"rank{rank}-step{step}-{phase}").touch(exist_ok=False)
        except FileExistsError:
            return
        os.kill(os.getpid(), how)
