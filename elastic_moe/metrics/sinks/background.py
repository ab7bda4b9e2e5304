"""Sends a run's metrics to a tracker in a daemon thread, so that the tracker can neither stop nor delay training.

The thread reads metrics.jsonl itself. So nothing waits in memory, and nothing is dropped: not while a tracker starts
slowly, and not after a failure, for another start of the run goes on where the last one has stopped. `tracking.json` in
the run directory keeps, per tracker, the run's id there and the last step that was sent (the *mark*).

A run may go back to a checkpoint and make steps again. A tracker that can replace values gets these steps again, and
its curve goes back with the run. The others have each step once: with its first value, and the curve goes on when the
run has passed its old end.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from elastic_moe.metrics.jsonl import last_line
from elastic_moe.metrics.sinks.marks import Mark, read_mark, write_mark
from elastic_moe.run_dir import GOODPUT, METRICS

POLL_S = 0.5  # between two looks at the file
MARK_EVERY_S = 1.0  # a start that is killed sends what came after its last mark once more
CLOSE_TIMEOUT_S = 20.0
READ_BYTES = 1 << 20
_LOG = logging.getLogger(__name__)

Json = dict[str, Any]


class Backend(Protocol):
    """A tracker: the used part of Accelerate's `GeneralTracker`, and what resuming needs. One thread makes all calls.

    Attributes:
        run_id: of the run there, the same for all starts.
        replaces: a step that is logged again replaces what was logged for it and for later ones.
    """

    run_id: str
    replaces: bool

    def store_init_configuration(self, values: dict) -> Any: ...

    def log(self, values: dict, step: int | None) -> Any: ...

    def flush(self) -> Any:
        """Make sure that what was logged outlives this process, where the tracker can."""
        ...

    def finish(self) -> Any: ...


class BackgroundSink:
    """Sends the records of metrics.jsonl to a backend in the background. No method raises or blocks because of it.

    Args:
        name: of the tracker.
        make: opens the backend with the mark of the start before, called in the sink's thread; None: there is none.
        run_dir: the run directory.
        run_config: the run's whole configuration, stored with the run.
        on_failure: called once, from the sink's thread, with a sentence about why the sink ended.
    """

    def __init__(
        self,
        name: str,
        make: Callable[[Mark], Backend] | None,
        run_dir: Path,
        run_config: Mapping[str, Any],
        on_failure: Callable[[str], None] = _LOG.warning,
    ) -> None:
        self._name, self._run_dir, self._config = name, run_dir, _flat(run_config)
        self._on_failure, self._failed = on_failure, threading.Event()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        if make is not None:
            self._thread = threading.Thread(target=self._run, args=(make,), name="tracker", daemon=True)
            self._thread.start()

    @property
    def failed(self) -> bool:
        """Whether the backend has raised; nothing is sent any more."""
        return self._failed.is_set()

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> bool:
        """Send what metrics.jsonl has, and finish. Returns False when the backend failed or was too late."""
        if self._thread is None:
            return True
        self._closing.set()
        self._thread.join(timeout_s)
        done = not self._thread.is_alive() and not self.failed
        if not done:
            self._abandon()
        return done

    def _abandon(self) -> None:
        """Release the resources of a backend that cannot be finished."""

    def _run(self, make: Callable[[Mark], Backend]) -> None:
        try:
            mark = read_mark(self._run_dir, self._name)
            backend = make(mark)
            mark = Mark(backend.run_id, mark.step, mark.time)
            write_mark(self._run_dir, self._name, mark)
            backend.store_init_configuration(self._config)
            records = Follower(self._run_dir / METRICS)
            while True:
                last = self._closing.is_set()
                mark = self._send(backend, records, mark)
                if last:
                    break
                self._closing.wait(POLL_S)
            backend.finish()
        except BaseException as error:  # noqa: BLE001 - the thread's loop: any error ends the sink and is reported
            self._failed.set()
            try:
                self._on_failure(
                    f"tracking ended: {type(error).__name__}: {error}; another start of the run sends the rest"
                )
            except Exception:  # noqa: BLE001 - the report is the last thing that this thread can do
                _LOG.exception("the report that tracking ended failed")

    def _send(self, backend: Backend, records: Follower, mark: Mark) -> Mark:
        """Send the records that the backend does not have. Returns the new mark, which is in the run directory."""
        sent, told_s, goodput = mark, time.monotonic(), _goodput(self._run_dir)
        for record in records.new():
            step, made_s = int(record["step"]), float(record.get("time") or 0.0)
            unseen = made_s > sent.time if backend.replaces else step > sent.step
            if not unseen:
                continue
            backend.log(numbers(record) | goodput, step)
            goodput, sent = {}, Mark(sent.run_id, step, max(made_s, sent.time))
            if time.monotonic() - told_s > MARK_EVERY_S:
                told_s = time.monotonic()
                self._keep(backend, sent)
        if sent != mark:
            self._keep(backend, sent)
        return sent

    def _keep(self, backend: Backend, mark: Mark) -> None:
        backend.flush()
        write_mark(self._run_dir, self._name, mark)


class Follower:
    """Reads a growing file of JSON lines, a part at a time, and keeps none of it in memory.

    Args:
        path: the file; it may not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._offset, self._last = path, 0, b""

    def new(self) -> Iterator[Json]:
        """The lines since the last call. A file that was cut or replaced meanwhile is read from its beginning."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._offset - len(self._last))
            if file.read(len(self._last)) != self._last:
                self._offset, self._last = 0, b""
                file.seek(0)
            rest = b""
            while part := file.read(READ_BYTES):
                *lines, rest = (rest + part).split(b"\n")
                for line in lines:
                    self._offset += len(line) + 1
                    self._last = line + b"\n"
                    if (value := _parsed(line)) is not None:
                        yield value


def numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """What is sent of a record: a number as it is, a list of numbers as name/index, nothing else."""
    found: dict[str, float] = {
        key: value for key, value in record.items() if isinstance(value, (int, float)) and key != "step"
    }
    for name, items in record.items():
        if isinstance(items, list) and all(isinstance(item, (int, float)) for item in items):
            found |= {f"{name}/{index}": item for index, item in enumerate(items)}
    return found


def _goodput(run_dir: Path) -> dict[str, float]:
    """The newest line of goodput.jsonl, as values for a tracker."""
    line = last_line(run_dir / GOODPUT)
    if line is None:
        return {}
    plain = {key: line[key] for key in ("goodput", "ettr", "failures", "mttr_s", "mtbf_s", "cost")}
    named = {f"goodput/{key}": value for key, value in plain.items() if value is not None}
    return named | {f"goodput/{cause}_s": seconds for cause, seconds in line["worker_s"].items()}


def _parsed(line: bytes) -> Json | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) and type(value.get("step")) is int else None


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested configuration as dotted keys with plain values."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
    return flat
