"""Sends a run's metrics somewhere else in a daemon thread, so that the destination can neither stop nor delay training.

A sink is a copy: the run's own files are complete without it. Its calls wait in a bounded queue; a failure is reported
once and ends the sink, and closing waits for a bounded time.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

MAX_QUEUED = 1000
CLOSE_TIMEOUT_S = 20.0
_LOG = logging.getLogger(__name__)


class Backend(Protocol):
    """A destination of metrics: the used part of Accelerate's `GeneralTracker`. All calls come from one thread."""

    def store_init_configuration(self, values: dict) -> Any: ...

    def log(self, values: dict, step: int | None) -> Any: ...

    def finish(self) -> Any: ...


class BackgroundSink:
    """Sends metrics to a backend in the background. No method raises or blocks because of the backend.

    Args:
        make: opens the backend, called in the sink's thread; None for a sink that is switched off.
        run_config: the run's whole configuration, stored with the run.
        on_failure: called once, from the sink's thread, with a sentence about why the sink ended.

    Attributes:
        dropped: number of steps that were dropped because the queue was full.
    """

    def __init__(
        self,
        make: Callable[[], Backend] | None,
        run_config: Mapping[str, Any],
        on_failure: Callable[[str], None] = _LOG.warning,
    ) -> None:
        self.dropped = 0
        self._on_failure, self._failed = on_failure, threading.Event()
        self._jobs: queue.Queue[Callable[[Backend], Any] | None] = queue.Queue(maxsize=MAX_QUEUED)
        self._thread: threading.Thread | None = None
        if make is not None:
            values = _flat(run_config)
            self._jobs.put(lambda backend: backend.store_init_configuration(values))
            self._thread = threading.Thread(target=self._run, args=(make,), name="tracker", daemon=True)
            self._thread.start()

    @property
    def failed(self) -> bool:
        """Whether the backend has raised; nothing is sent any more."""
        return self._failed.is_set()

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Send the numbers of a step; dropped when the queue is full.

        Args:
            values: a number is sent as it is, a list of numbers as name/index, anything else is left out.
            step: the committed step.
        """
        if self._thread is None or self.failed:
            return
        numbers = {key: value for key, value in values.items() if isinstance(value, (int, float)) and key != "step"}
        for name, items in values.items():
            if isinstance(items, list) and all(isinstance(item, (int, float)) for item in items):
                numbers |= {f"{name}/{index}": item for index, item in enumerate(items)}
        try:
            self._jobs.put_nowait(lambda backend: backend.log(numbers, step))
        except queue.Full:
            self.dropped += 1

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> bool:
        """Send the queue's content and finish. Returns False when the backend failed or was too late."""
        if self._thread is None:
            return True
        deadline_s = time.monotonic() + timeout_s
        if self._thread.is_alive():
            with contextlib.suppress(queue.Full):
                self._jobs.put(None, timeout=timeout_s)
            self._thread.join(max(deadline_s - time.monotonic(), 0.0))
        done = not self._thread.is_alive() and not self.failed
        if not done:
            self._abandon()
        return done

    def _abandon(self) -> None:
        """Release the resources of a backend that cannot be finished."""

    def _run(self, make: Callable[[], Backend]) -> None:
        try:
            backend = make()
            while (job := self._jobs.get()) is not None:
                job(backend)
            backend.finish()
        except BaseException as error:  # noqa: BLE001 - the thread's loop: any error ends the sink and is reported
            self._failed.set()
            try:
                self._on_failure(f"tracking ended: {type(error).__name__}: {error}")
            except Exception:  # noqa: BLE001 - the report is the last thing that this thread can do
                _LOG.exception("the report that tracking ended failed")


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested configuration as dotted keys with plain values."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
    return flat
