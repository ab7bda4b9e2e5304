"""Copies of the run's metrics for TensorBoard, through Accelerate's tracker layer: event files in the run directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from elastic_moe.metrics.sinks.background import Backend
from elastic_moe.metrics.sinks.marks import Mark

FOLDER = "tensorboard"  # in the run directory


def open_tensorboard(run_dir: Path, mark: Mark) -> Backend:
    """Open event files that go on where the start before has stopped.

    Args:
        run_dir: the run directory.
        mark: what the start before has sent.
    """
    # Imported here: they take seconds, and this runs in the sink's thread.
    from accelerate import PartialState
    from accelerate.tracking import TensorBoardTracker

    PartialState(cpu=True)  # Accelerate's logger, which the tracker uses, refuses to work without it

    class TensorBoard:
        """`purge_step` hides what was written for that step and later ones, so a run that goes back is right."""

        replaces = True

        def __init__(self) -> None:
            self.run_id, self._last = FOLDER, mark.step
            self._tracker = self._open(mark.step + 1) if mark.run_id else self._open(None)

        def _open(self, purge_step: int | None) -> Any:
            # Files are named by the second, and TensorBoard reads them by their names. A second one would be the first.
            number = len(list((run_dir / FOLDER).glob("events.*")))
            tracker = TensorBoardTracker(FOLDER, str(run_dir), purge_step=purge_step, filename_suffix=f".{number:05d}")
            tracker.start()
            return tracker

        def store_init_configuration(self, values: dict) -> None:
            text = "\n".join(f"    {name}: {value}" for name, value in values.items())  # Markdown's code
            self._tracker.tracker.add_text("configuration", text, self._last)

        def log(self, values: dict, step: int | None) -> None:
            if step is not None and step <= self._last:
                self._tracker.finish()
                self._tracker = self._open(step)
            self._last = step or self._last
            self._tracker.log(values, step=step)

        def flush(self) -> None:
            self._tracker.tracker.flush()

        def finish(self) -> None:
            self._tracker.finish()

    return TensorBoard()
