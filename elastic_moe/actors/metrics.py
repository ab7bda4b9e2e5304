"""Exports a run's metrics through Ray (`ray.util.metrics`), beside Ray Train's own and with the same tags.

The coordinator exports what is known of the run: it lives as long as the run, also without its driver, and gets every
record and event. A worker exports its own memory. Each does so in a daemon thread that owns all calls to Ray. What the
coordinator hands over waits in a bounded queue, so exporting can neither delay nor end a run.

Ray sends a process's values to the agent of its node every ten seconds (`RAY_metrics_report_interval_ms`), and the
agent forgets a gauge that was not set again for two such intervals. What a killed process has not sent yet is lost: a
counter may miss the last seconds of a coordinator that has died.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import psutil
from ray.util.metrics import Counter, Gauge, Histogram

from elastic_moe.actors.link import TrainNames
from elastic_moe.metrics.exported import (
    ACTOR,
    COORDINATOR_MEMORY,
    COUNTER,
    EXPORTED,
    GAUGE,
    PREFIX,
    RANK,
    RUN_ID,
    RUN_NAME,
    WORKER_DEVICE_MEMORY,
    WORKER_MEMORY,
    Exported,
)
from elastic_moe.metrics.jsonl import last_line, read_jsonl
from elastic_moe.metrics.run_metrics import RunMetrics, Sample, Status, of_goodput
from elastic_moe.run_dir import EVENTS, METRICS

PERIOD_S = 1.0  # a gauge that is not set anew between two of Ray's exports is forgotten
MAX_WAITING = 10_000  # records and events that wait for the thread; the oldest are dropped beyond that
CLOSE_S = 2.0
WARN_EVERY_S = 600.0

logger = logging.getLogger(__name__)


class Instruments:
    """Some metrics as Ray's objects, with the tags of one run. Counters begin at 0, so that their first increase shows.

    Args:
        names: of the run.
        metrics: those that this process exports.
        tags: further tags of all of them.
    """

    def __init__(self, names: TrainNames, metrics: Iterable[Exported], tags: Mapping[str, str] | None = None) -> None:
        self._tags = {RUN_NAME: names.name, RUN_ID: names.id} | dict(tags or {})
        self._metrics = {metric.name: metric for metric in metrics}
        self._instruments: dict[str, Any] = {name: _instrument(metric) for name, metric in self._metrics.items()}
        for name, metric in self._metrics.items():
            if metric.kind == COUNTER:
                for value in metric.values or ("",):
                    self._instruments[name]._record(0.0, self._tagged(metric, value))  # `inc` refuses 0

    def apply(self, samples: Iterable[Sample]) -> None:
        """Hand values to Ray."""
        for name, value, tag in samples:
            metric, instrument = self._metrics[name], self._instruments[name]
            tags = self._tagged(metric, tag)
            if metric.kind == GAUGE:
                instrument.set(value, tags)
            elif metric.kind == COUNTER:
                instrument.inc(value, tags)
            else:
                instrument.observe(value, tags)

    def _tagged(self, metric: Exported, value: str) -> dict[str, str]:
        return self._tags | {metric.tag: value} if metric.tag else self._tags


def _instrument(metric: Exported) -> Any:
    name = f"{PREFIX}_{metric.name}"
    if metric.kind == GAUGE:
        return Gauge(name, metric.meaning, metric.tags)
    if metric.kind == COUNTER:
        return Counter(name, metric.meaning, metric.tags)
    return Histogram(name, metric.meaning, list(metric.buckets), metric.tags)


class _Exporter(threading.Thread):
    """Calls `_export` again and again until it is closed; an error is reported now and then, and it goes on."""

    def __init__(self) -> None:
        super().__init__(name="metrics", daemon=True)
        self._closed = threading.Event()
        self._warned_s = -WARN_EVERY_S

    def __enter__(self) -> None:
        self.start()

    def __exit__(self, *raised: object) -> None:
        self.close()

    def close(self) -> None:
        """Export once more and end; waits for `CLOSE_S` at most."""
        self._closed.set()
        if self.is_alive():
            self.join(CLOSE_S)

    def run(self) -> None:
        last = False
        while not last:
            last = self._closed.wait(PERIOD_S)
            try:
                self._export()
            except Exception as error:  # noqa: BLE001 - the thread's loop: a run does not need its metrics
                if time.monotonic() - self._warned_s > WARN_EVERY_S:
                    self._warned_s = time.monotonic()
                    logger.warning("metrics are not exported now: %s: %s", type(error).__name__, error)

    def _export(self) -> None:
        raise NotImplementedError


class RunExporter(_Exporter):
    """Exports the metrics of a run from its coordinator. It listens to the run's recorder.

    Args:
        run_dir: the run directory.
        names: of the run.
        max_workers: largest number of workers.
    """

    def __init__(self, run_dir: str | Path, names: TrainNames, max_workers: int) -> None:
        super().__init__()
        self._run_dir, self._names, self._began_s = Path(run_dir), names, time.time()
        self._metrics = RunMetrics(max_workers, self._began_s)
        self._heard: deque[tuple[bool, Mapping[str, Any]]] = deque(maxlen=MAX_WAITING)  # is it an event, line
        self._status: Callable[[], Any] | None = None
        self._goodput: Callable[[], dict[str, Any]] | None = None
        self._instruments: Instruments | None = None

    def begin(self, status: Callable[[], Any], goodput: Callable[[], dict[str, Any]]) -> None:
        """Start to export.

        Args:
            status: tells the present `coordination.membership.RunStatus`.
            goodput: tells what the workers' time has gone into, as a line of goodput.jsonl.
        """
        self._status, self._goodput = status, goodput
        self.start()

    def record(self, record: Mapping[str, Any]) -> None:
        self._heard.append((False, record))

    def event(self, event: Mapping[str, Any]) -> None:
        self._heard.append((True, event))

    def _export(self) -> None:
        if self._instruments is None:
            self._recall()
            self._instruments = Instruments(self._names, [metric for metric in EXPORTED if not metric.workers])
        while self._heard:
            is_event, line = self._heard.popleft()
            (self._metrics.event if is_event else self._metrics.record)(line)
        assert self._status is not None
        assert self._goodput is not None
        status: Status = self._status()
        self._instruments.apply(self._metrics.samples(status, time.time()))
        self._instruments.apply(of_goodput(self._goodput()))
        self._instruments.apply([Sample(COORDINATOR_MEMORY.name, psutil.Process().memory_info().rss)])

    def _recall(self) -> None:
        """Take over what was written before this process began."""
        events = [event for event in read_jsonl(self._run_dir / EVENTS) if event.get("time", 0.0) < self._began_s]
        self._metrics.recall(last_line(self._run_dir / METRICS), events)


class WorkerExporter(_Exporter):
    """Exports the memory of a worker from its process.

    Args:
        names: of the run.
        rank: the worker's rank in Ray Train, which is the number of its slot.
        actor: id of its actor.
    """

    def __init__(self, names: TrainNames, rank: int, actor: str) -> None:
        super().__init__()
        self._names, self._tags = names, {RANK: str(rank), ACTOR: actor}
        self._instruments: Instruments | None = None

    def _export(self) -> None:
        if self._instruments is None:
            self._instruments = Instruments(self._names, (WORKER_MEMORY, WORKER_DEVICE_MEMORY), self._tags)
        import torch  # which the worker has: the coordinator, of whose process the rest of this file is, has not

        held = torch.cuda.memory_reserved() if torch.cuda.is_initialized() else 0
        rss = psutil.Process().memory_info().rss
        self._instruments.apply([Sample(WORKER_MEMORY.name, rss), Sample(WORKER_DEVICE_MEMORY.name, held)])
